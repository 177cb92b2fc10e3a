"""Our llama against transformers', on tiny random models that cover its options: prefill, chunks and decode."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import feed, open_runner, tiny_model

from cai_runtime.engine.runner import ScheduledSequence
from cai_runtime.errors import InvalidConfigError, TensorShapeError, UnsupportedModelError
from cai_runtime.stock.cached_forward import cached_forward

# Under the interpreter only Triton's kernels are of interest: test_llama_interpreted.py starts such a process.
BACKENDS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["cpu", "reference"]
STEPS = 3 if BACKENDS == ["triton"] else 30  # tokens decoded one at a time

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 48},
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        "max_position_embeddings": 256,
    },
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 10},
    "mistral without a window": {"model_type": "mistral", "sliding_window": None},
    "window of a page": {"model_type": "mistral", "sliding_window": 16, "tie_word_embeddings": True},
    "window beyond the text": {"model_type": "mistral", "sliding_window": 200},
    "ministral": {
        "model_type": "ministral",
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 10,
        "head_dim": 24,
    },
    "ministral in one pool": {
        "model_type": "ministral",
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 17,
        "head_dim": 16,
    },
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96},
    "qwen2 tied": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2 with windows": {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 10,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 24},
    "qwen3 with biases": {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 16, "attention_bias": True},
    "qwen3 with windows": {
        "model_type": "qwen3",
        "layer_types": ["sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 10,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "max_position_embeddings": 256,
        "rope_theta": 500000.0,
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
@torch.inference_mode()
def test_logits_match_transformers(tmp_path: Path, name: str, backend: str):
    model = tiny_model(tmp_path, **OPTIONS[name])
    runner = open_runner(tmp_path, backend=backend)
    assert runner.max_context == (192 if name == "dynamic" else 256)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 300, (40 + STEPS,), generator=g).tolist()

    # transformers: a prompt of 40, then one token at a time, over its own cache.
    out, cache = cached_forward(model, None, input_ids=torch.tensor([ids[:40]]))
    expected = [out.logits[0, -1]]
    for token in ids[40:]:
        out, cache = cached_forward(model, cache, input_ids=torch.tensor([[token]]))
        expected.append(out.logits[0, -1])
    pages = [9, 3, 5, 11, 2]
    ours = feed(runner, ids, pages, [40] + [1] * STEPS)
    torch.testing.assert_close(ours, torch.stack(expected), rtol=0, atol=1e-4)
    chunked = feed(runner, ids, [1, 4, 6, 7, 8], [7, 16, 1, 16] + [1] * STEPS)
    torch.testing.assert_close(chunked[3:], ours, rtol=0, atol=0 if backend == "cpu" else 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 6e-2), ("fp16", 6e-3)])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.inference_mode()
def test_half_precision(tmp_path: Path, dtype: str, tolerance: float, backend: str):
    model = tiny_model(tmp_path, num_key_value_heads=2, tie_word_embeddings=True)
    runner = open_runner(tmp_path, dtype=dtype, backend=backend)
    ids = torch.randint(0, 300, (33,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = model(torch.tensor([ids])).logits[0, -1]
    ours = feed(runner, ids, [0, 1, 2], [33])[0]
    assert float((ours - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gqa", "qwen3 with windows"])
@torch.inference_mode()
def test_a_cache_of_int8(tmp_path: Path, name: str, backend: str):
    """Near transformers' logits, which a cache of floats gives exactly; the same bits in any chunks; a quarter of the bytes
    and the scales."""
    model = tiny_model(tmp_path, **OPTIONS[name])
    plain, runner = open_runner(tmp_path, backend=backend), open_runner(tmp_path, backend=backend, kv_dtype="int8")
    dim = model.config.head_dim
    for ours, theirs in zip(runner.groups, plain.groups, strict=True):
        assert ours.page_bytes * 4 * dim == theirs.page_bytes * (dim + 4)
    ids = torch.randint(0, 300, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = model(torch.tensor([ids])).logits[0, 39:]
    whole = feed(runner, ids, [9, 3, 5], [40] + [1] * 8)
    off = float((whole - expected).norm() / expected.norm())
    assert 0 < off < 0.03
    chunked = feed(runner, ids, [1, 4, 6], [7, 16, 1, 16] + [1] * 8)
    # The reference's sums change their last bits, and so a code here and there.
    torch.testing.assert_close(chunked[3:], whole, rtol=0, atol=0 if backend == "cpu" else 3e-3)


@torch.inference_mode()
def test_a_batch_gives_the_bits_of_each_alone(tmp_path: Path):
    tiny_model(tmp_path, num_attention_heads=6, num_key_value_heads=2, hidden_size=96)
    runner = open_runner(tmp_path)
    rng = random.Random(0)
    prompts = [[rng.randrange(300) for _ in range(n)] for n in (1, 5, 16, 17, 40, 3, 64, 31)]
    tables = [list(range(8 * i, 8 * i + 8)) for i in range(len(prompts))]
    alone = []
    for p, t in zip(prompts, tables, strict=True):
        first = runner.run([ScheduledSequence(p, 0, t, True)])
        alone.append(torch.cat([first, runner.run([ScheduledSequence([7], len(p), t, True)])]))
    runner = open_runner(tmp_path)
    order = rng.sample(range(len(prompts)), len(prompts))
    first = runner.run([ScheduledSequence(prompts[i], 0, tables[i], True) for i in order])
    second = runner.run([ScheduledSequence([7], len(prompts[i]), tables[i], True) for i in order])
    for row, i in enumerate(order):
        assert torch.equal(torch.stack([first[row], second[row]]), alone[i])
    silent = [ScheduledSequence(prompts[i], 0, tables[i], i == 4) for i in order]
    assert torch.equal(runner.run(silent), alone[4][:1])


def test_a_config_that_does_not_fit_the_weights_is_named(tmp_path: Path):
    import json

    tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def broken(**change: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        return tmp_path

    with pytest.raises(TensorShapeError, match="mlp.gate_proj"):
        open_runner(broken(intermediate_size=100))
    with pytest.raises(UnsupportedModelError, match="mamba9"):
        open_runner(broken(model_type="mamba9"))
    with pytest.raises(UnsupportedModelError, match="gelu"):
        open_runner(broken(hidden_act="gelu"))
    with pytest.raises(UnsupportedModelError, match="spiral"):
        open_runner(broken(rope_parameters={"rope_type": "spiral"}))
    with pytest.raises(InvalidConfigError, match="hidden_size"):
        open_runner(broken(hidden_size=None))
    with pytest.raises(InvalidConfigError, match="key/value heads"):
        open_runner(broken(num_key_value_heads=3))
