"""Checkpoints as people publish them: their config.json and their tensors' names mean what they mean in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import MISSING, change_config, open_runner, same_as_transformers, tiny_model

from cai_runtime.errors import (
    CheckpointError,
    InvalidConfigError,
    MemoryBudgetError,
    TensorMissingError,
    UnsupportedModelError,
)
from cai_runtime.layers.rotary import RopeConfig, cos_sin_table

Tensors = dict[str, torch.Tensor]


def change_tensors(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    found = {name: tensor.clone() for name, tensor in change(load_file(path / "model.safetensors")).items()}
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})


LINEAR = {"type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "biases that config.json denies": {"attention_bias": False, "mlp_bias": False},
    "biases of the attention alone": {"mlp_bias": False},
    "biases that config.json does not mention": {"attention_bias": MISSING, "mlp_bias": MISSING},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "partial_rotary_factor of rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                                     "partial_rotary_factor": 0.5}},
    "head_dim null": {"head_dim": None, "num_key_value_heads": None},
    "rope_scaling of old": {"rope_parameters": MISSING, "rope_theta": 5000.0, "rope_scaling": LINEAR},
    "rope_scaling beside rope_parameters": {"rope_theta": 5000.0, "rope_scaling": LINEAR},
    "rope_scaling null": {"rope_parameters": MISSING, "rope_theta": 5000.0, "rope_scaling": None},
    "rope_type before type": {"rope_parameters": MISSING, "rope_scaling": {**LINEAR, "rope_type": "default"}},
    "llama3 without its original context": {"rope_parameters": MISSING, "rope_scaling": LLAMA3},
    "llama3's original context outside": {
        "rope_parameters": MISSING, "original_max_position_embeddings": 64,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32},
    },
    "yarn's original context outside": {
        "rope_parameters": MISSING, "original_max_position_embeddings": 64, "rope_scaling": YARN},
    "keys of other architectures": {"sliding_window": 4, "layer_types": ["full_attention"] * 2, "pretraining_tp": 2},
}  # fmt: skip


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_configs(tmp_path: Path, change: dict[str, Any]):
    tiny_model(tmp_path, attention_bias=True, mlp_bias=True)
    change_config(tmp_path, **change)
    same_as_transformers(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": "linear"}, {"rope_theta": "x", "rope_parameters": None},
        {"rope_theta": -1.0, "rope_parameters": None},
        {"max_position_embeddings": "long"}, {"max_position_embeddings": float("nan")}, {"rms_norm_eps": float("inf")},
        {"tie_word_embeddings": "false"}, {"attention_bias": 1}, {"head_dim": 0}, {"head_dim": 15},
        {"rope_parameters": {"rope_type": "linear"}}, {"rope_parameters": {"rope_type": "linear", "factor": "2"}},
        {"max_position_embeddings": 0}, {"max_position_embeddings": -1}, {"rms_norm_eps": -1.0},
        {"num_hidden_layers": 10**12},
    ],
)  # fmt: skip
@pytest.mark.parametrize("max_context", [None, 16])
def test_a_value_that_can_not_be_is_named(tmp_path: Path, change: dict[str, Any], max_context: int | None):
    tiny_model(tmp_path)
    change_config(tmp_path, **change)
    named = r"rope|rotated|factor|position|eps|tie|bias|head_dim|layers"
    with pytest.raises(InvalidConfigError, match=named) as caught:
        open_runner(tmp_path, max_context=max_context)
    assert caught.value.file is not None


@pytest.mark.parametrize("model_type", [None, 5, ["llama"], {}])
def test_a_model_type_that_is_no_text_is_unknown(tmp_path: Path, model_type: Any):
    tiny_model(tmp_path)
    change_config(tmp_path, model_type=model_type)
    with pytest.raises(UnsupportedModelError, match="model_type"):
        open_runner(tmp_path)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_max_context_may_reach_what_dynamic_rope_adds(tmp_path: Path, key: str):
    tiny_model(tmp_path)
    change_config(tmp_path, max_position_embeddings=32, **{key: {"rope_type": "dynamic", "factor": 4.0}})
    assert open_runner(tmp_path, max_context=100).max_context == 100
    with pytest.raises(MemoryBudgetError, match="128 positions"):
        open_runner(tmp_path, max_context=129)


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def prefix_twice(tensors: Tensors) -> Tensors:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def only_the_head(tensors: Tensors) -> Tensors:
    found = dict(tensors)
    found["lm_head.weight"] = found.pop("model.embed_tokens.weight")
    return found


def another_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": torch.randn(300, 64, generator=torch.Generator().manual_seed(4))}


def both_the_same(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", [without_prefix, prefix_twice, lambda t: without_prefix(without_prefix(t))])
def test_names_with_another_prefix(tmp_path: Path, change: Callable[[Tensors], Tensors], tied: bool):
    tiny_model(tmp_path, tie_word_embeddings=tied)
    change_tensors(tmp_path, change)
    same_as_transformers(tmp_path)


@pytest.mark.parametrize("change", [only_the_head, another_head, both_the_same])
def test_what_a_tied_checkpoint_may_hold(tmp_path: Path, change: Callable[[Tensors], Tensors]):
    tiny_model(tmp_path, tie_word_embeddings=True)
    change_tensors(tmp_path, change)
    same_as_transformers(tmp_path)


def test_a_head_that_differs_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tiny_model(tmp_path, tie_word_embeddings=True)
    change_tensors(tmp_path, another_head)
    open_runner(tmp_path)
    assert "lm_head" in caplog.text and "differ" in caplog.text


def test_an_end_that_is_missing_is_named(tmp_path: Path):
    tiny_model(tmp_path)
    change_tensors(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    with pytest.raises(TensorMissingError, match=r"lm_head\.weight"):
        open_runner(tmp_path)


def test_an_index_that_lists_a_buffer_of_old(tmp_path: Path):
    tiny_model(tmp_path).save_pretrained(tmp_path, max_shard_size="200KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    for layer in range(2):
        index["weight_map"][f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = shards[0]
    file.write_text(json.dumps(index))
    same_as_transformers(tmp_path)
    del index["weight_map"]["model.norm.weight"]
    tensors = {name: load_file(tmp_path / name) for name in shards}
    holder = next(name for name in shards if "model.norm.weight" in tensors[name])
    del tensors[holder]["model.norm.weight"]
    save_file(tensors[holder], tmp_path / holder, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        open_runner(tmp_path)


ROPES = {
    "default": {},
    "linear": {"rope_scaling": LINEAR},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 48},
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 256},
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
}


@pytest.mark.parametrize("config", ROPES.values(), ids=ROPES)
def test_a_shorter_table_has_the_same_bits(config: dict[str, Any]):
    rope = RopeConfig.from_config(config, 24)
    whole = cos_sin_table(rope, 1000)
    for positions in (1, 16, 33, 500, 999):
        assert torch.equal(cos_sin_table(rope, positions), whole[:positions])


def test_a_context_of_millions_costs_what_the_cache_holds(tmp_path: Path):
    tiny_model(tmp_path)
    change_config(tmp_path, max_position_embeddings=10_000_000)
    runner = open_runner(tmp_path)
    held = runner.num_pages * runner.page_size
    assert runner.max_context == 10_000_000 > held
    assert runner._opened.cos_sin.shape[0] == held  # type: ignore[attr-defined]
    same_as_transformers(tmp_path)
