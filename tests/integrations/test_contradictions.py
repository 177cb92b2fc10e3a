"""Slim checkpoints whose config.json says something else than their tensors: transformers and the engine agree on them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cai_runtime.engine.open import load_runner
from cai_runtime.engine.runner import ScheduledSequence
from cai_runtime.errors import UnsupportedModelError


def configure(path, **entries):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@torch.inference_mode()
def logits(path, ids):
    """Of the last of ids [1, T], by transformers and by the engine."""
    runner, _ = load_runner(path, kv_cache="1MiB", activations="fp32", progress=False)
    ours = runner.run([ScheduledSequence(ids[0].tolist(), 0, [0], True)])[0]
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits[0, -1], ours


@pytest.mark.parametrize("head", [("lowrank", "int8"), ("dense", "int8"), ("dense", "bf16")], ids=str)
@pytest.mark.parametrize("embedding", ["int8", "bf16"])
def test_tied_ends_that_are_two(make_slim, ids, head, embedding):
    path = make_slim("lowrank", "int8", embedding=embedding, head=head)
    wanted = logits(path, ids[:1])
    configure(path, tie_word_embeddings=True)
    for found, expected in zip(logits(path, ids[:1]), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(*wanted, rtol=0, atol=1e-3)


def test_a_packed_head_that_is_the_embedding(make_slim):
    path = make_slim("lowrank", "int8", head=("dense", "int8"))
    configure(path, tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]["modules"]["model.embed_tokens"]
    (path / "config.json").write_text(json.dumps(config))
    load_runner(path, kv_cache="1MiB", progress=False)
    with pytest.raises(UnsupportedModelError, match=r"ties model\.embed_tokens\.weight to lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(path)


def test_biases_that_config_json_denies(make_slim, ids):
    path = make_slim(["lowrank", "dense"], "int8", bias=True)
    with_biases = logits(path, ids[:1])[0]
    configure(path, attention_bias=False, mlp_bias=False)
    found, ours = logits(path, ids[:1])
    torch.testing.assert_close(ours, found, rtol=0, atol=1e-3)
    assert float((found - with_biases).abs().max()) > 0.1
