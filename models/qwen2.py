"""Qwen 2 (Yang et al. 2024) and Qwen 2.5: Llama's blocks with biases on queries, keys and values alone.

Layers may have a sliding window: with `use_sliding_window`, those from `max_window_layers` on, or those that config.json's
`layer_types` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cai_runtime.errors import InvalidConfigError
from cai_runtime.models.config import flag, layer_windows, whole
from cai_runtime.models.llama import Llama, LlamaConfig

# transformers' defaults, where config.json lacks the key.
DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


class Qwen2(Llama):
    """See above."""

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> LlamaConfig:
        blocks = LlamaConfig.from_config({**DEFAULTS, **config, "mlp_bias": False})
        return replace(blocks, qkv_bias=True, output_bias=False, windows=windows(config, blocks.layers))


def windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Of each layer. Without `use_sliding_window`, config.json's `sliding_window` means nothing."""
    known = {**DEFAULTS, **config}
    used = flag(known, "use_sliding_window") and known["sliding_window"] is not None
    window = whole(known, "sliding_window") if used else None
    first = known["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise InvalidConfigError(f"max_window_layers must be a whole number, not {first!r}", file="config.json")
    return layer_windows(known, layers, window) or tuple(window if i >= first else None for i in range(layers))
