"""What config.json says of sliding windows, in the families that have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import IDS, MISSING, change_config, feed, open_runner, same_as_transformers, tiny_model
from transformers import AutoModelForCausalLM

from cai_runtime.errors import InvalidConfigError, UnsupportedModelError

SLIDING, FULL = "sliding_attention", "full_attention"
CONFIGS: dict[str, tuple[str, dict[str, Any], list[tuple[str, int | None]]]] = {
    "mistral, no window": ("mistral", {"sliding_window": None}, [("full", None)]),
    "mistral, the default window": ("mistral", {"sliding_window": MISSING}, [("window", 4096)]),
    "mistral, keys of others": (
        "mistral", {"attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 0.5},
        [("window", 7)],
    ),
    "mistral with layer_types": ("mistral", {"layer_types": [FULL, SLIDING]}, [("full", None), ("window", 7)]),
    "ministral, all slide": ("ministral", {"layer_types": None}, [("window", 7)]),
    "ministral, none said": ("ministral", {"layer_types": MISSING}, [("window", 7)]),
    "ministral, both": ("ministral", {"layer_types": [SLIDING, FULL]}, [("full", None), ("window", 7)]),
    "ministral, none slides": ("ministral", {"layer_types": [FULL, FULL]}, [("full", None)]),
    "qwen2, windows not used": ("qwen2", {"use_sliding_window": False, "layer_types": MISSING}, [("full", None)]),
    "qwen2, windows not mentioned": (
        "qwen2", {"use_sliding_window": MISSING, "layer_types": MISSING, "max_window_layers": 0}, [("full", None)]
    ),
    "qwen2, windows of the last layers": (
        "qwen2", {"use_sliding_window": True, "layer_types": MISSING, "max_window_layers": 1},
        [("full", None), ("window", 7)],
    ),
    "qwen2, windows of all layers": (
        "qwen2", {"use_sliding_window": True, "layer_types": None, "max_window_layers": 0}, [("window", 7)]
    ),
    "qwen2, windows of layers that are not there": (
        "qwen2", {"use_sliding_window": True, "layer_types": MISSING, "max_window_layers": MISSING}, [("full", None)]
    ),
    "qwen2, layer_types": (
        "qwen2", {"use_sliding_window": True, "layer_types": [SLIDING, FULL], "max_window_layers": 9},
        [("full", None), ("window", 7)],
    ),
    "qwen2, no window": ("qwen2", {"use_sliding_window": True, "sliding_window": None}, [("full", None)]),
    "qwen2, keys of others": ("qwen2", {"attention_bias": False, "mlp_bias": True}, [("full", None)]),
    "qwen3, windows of the last layers": (
        "qwen3", {"use_sliding_window": True, "layer_types": MISSING, "max_window_layers": 1},
        [("full", None), ("window", 7)],
    ),
    "qwen3, keys of others": ("qwen3", {"mlp_bias": True, "partial_rotary_factor": 0.5}, [("full", None)]),
}  # fmt: skip


@pytest.mark.parametrize(("family", "change", "groups"), CONFIGS.values(), ids=CONFIGS)
def test_groups_and_logits(tmp_path: Path, family: str, change: dict[str, Any], groups: list[tuple[str, int | None]]):
    tiny_model(tmp_path, model_type=family, sliding_window=7, head_dim=16)
    # Qwen's own classes save a null where the window is not used.
    change_config(tmp_path, **{"sliding_window": 7, **change})
    assert [(group.name, group.window) for group in open_runner(tmp_path).groups] == groups
    same_as_transformers(tmp_path)


def test_eight_kv_heads_where_none_are_named(tmp_path: Path):
    tiny_model(tmp_path, model_type="mistral", num_attention_heads=8, num_key_value_heads=8)
    change_config(tmp_path, num_key_value_heads=MISSING)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_key_value_heads == 8
    same_as_transformers(tmp_path)


@pytest.mark.parametrize(
    ("family", "change", "error", "message"),
    [
        ("mistral", {"sliding_window": 0}, InvalidConfigError, "sliding_window must be a whole number above 0, not 0"),
        ("mistral", {"sliding_window": "4096"}, InvalidConfigError, "sliding_window must be"),
        ("ministral", {"layer_types": [FULL]}, InvalidConfigError, "each of 2 layers"),
        ("ministral", {"layer_types": FULL}, InvalidConfigError, "each of 2 layers"),
        ("ministral", {"layer_types": [FULL, "chunked"]}, UnsupportedModelError, "'chunked'; only"),
        ("ministral", {"layer_types": [FULL, SLIDING], "sliding_window": None}, InvalidConfigError, "is null"),
        ("qwen2", {"layer_types": [FULL, SLIDING], "use_sliding_window": False}, InvalidConfigError, "is null"),
        ("qwen2", {"use_sliding_window": "yes"}, InvalidConfigError, "use_sliding_window must be true or false"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 0}, InvalidConfigError, "sliding_window must be"),
        ("qwen3", {"max_window_layers": -1}, InvalidConfigError, "max_window_layers must be a whole number, not -1"),
    ],
)
def test_a_value_that_can_not_be_is_named(
    tmp_path: Path, family: str, change: dict[str, Any], error: type[Exception], message: str
):
    tiny_model(tmp_path, model_type=family, sliding_window=7, head_dim=16)
    change_config(tmp_path, **{"sliding_window": 7, **change})
    with pytest.raises(error, match=message):
        open_runner(tmp_path)


def test_window_of_a_model_whose_cache_is_in_half_precision(tmp_path: Path):
    model = tiny_model(tmp_path, model_type="ministral", sliding_window=7, layer_types=[SLIDING, FULL], head_dim=16)
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0, -1]
    runner = open_runner(tmp_path, kv_dtype="fp16")
    ours = feed(runner, IDS, [0, 1, 2], [len(IDS)])[0]
    assert float((ours - expected).norm() / expected.norm()) < 2e-3
