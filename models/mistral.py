"""Mistral (Jiang et al. 2023) and Ministral (Mistral AI 2024): Llama's blocks without biases, with sliding windows.

All layers have the window, or none, or those that config.json's `layer_types` names. The two families differ in what they
publish alone: transformers' AutoModel reads a `mistral` with `layer_types` as a `ministral`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cai_runtime.models.config import layer_windows, whole
from cai_runtime.models.llama import Llama, LlamaConfig

# transformers' defaults, where config.json lacks the key. A `sliding_window` of null means none.
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}


class Mistral(Llama):
    """See above."""

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> LlamaConfig:
        known = {**DEFAULTS, **config, "attention_bias": False, "mlp_bias": False}
        blocks = LlamaConfig.from_config(known)
        window = None if known["sliding_window"] is None else whole(known, "sliding_window")
        return replace(blocks, windows=layer_windows(config, blocks.layers, window) or (window,) * blocks.layers)
