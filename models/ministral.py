"""Ministral (Mistral AI 2024): Mistral's blocks, of which config.json's `layer_types` says which have the sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cai_runtime.errors import InvalidConfigError, UnsupportedModelError
from cai_runtime.models.llama import Llama, LlamaConfig
from cai_runtime.models.mistral import read_blocks, read_window

LAYER_TYPES = ("full_attention", "sliding_attention")


class Ministral(Llama):
    """Without `layer_types`, all layers have the window, if there is one."""

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> LlamaConfig:
        blocks, window = read_blocks(config), read_window(config)
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
        if window is None and "sliding_attention" in kinds:
            raise InvalidConfigError(
                "layer_types has sliding_attention, but sliding_window is null", file="config.json"
            )
        return replace(blocks, windows=tuple(None if kind == LAYER_TYPES[0] else window for kind in kinds))
