"""Mistral (Jiang et al. 2023) and Ministral (Mistral AI 2024): Llama's blocks without biases, with sliding windows.

All layers have the window, or none, or those that config.json's `layer_types` names. The two families differ in what they
publish alone: transformers' AutoModel reads a `mistral` with `layer_types` as a `ministral`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cai_runtime.errors import InvalidConfigError, UnsupportedModelError
from cai_runtime.models.config import whole
from cai_runtime.models.llama import Llama, LlamaConfig

LAYER_TYPES = ("full_attention", "sliding_attention")
# transformers' defaults, where config.json lacks the key. A `sliding_window` of null means none.
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}


class Mistral(Llama):
    """See above."""

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> LlamaConfig:
        known = {**DEFAULTS, **config, "attention_bias": False, "mlp_bias": False}
        blocks = LlamaConfig.from_config(known)
        window = None if known["sliding_window"] is None else whole(known, "sliding_window")
        kinds = config.get("layer_types")
        if kinds is None:
            return replace(blocks, windows=(window,) * blocks.layers)
        if not isinstance(kinds, list) or len(kinds) != blocks.layers:
            raise InvalidConfigError(
                f"layer_types must list the kind of each of {blocks.layers} layers, not {kinds!r}", file="config.json"
            )
        unknown = next((kind for kind in kinds if kind not in LAYER_TYPES), None)
        if unknown is not None:
            raise UnsupportedModelError(f"layer_types has {unknown!r}; only {' and '.join(LAYER_TYPES)} are supported")
        if window is None and LAYER_TYPES[1] in kinds:
            raise InvalidConfigError(
                "layer_types has sliding_attention, but sliding_window is null", file="config.json"
            )
        return replace(blocks, windows=tuple(None if kind == LAYER_TYPES[0] else window for kind in kinds))
