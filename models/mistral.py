"""Mistral (Jiang et al. 2023): Llama's blocks without biases, in whose layers a sliding window bounds what a query sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cai_runtime.models.config import whole
from cai_runtime.models.llama import Llama, LlamaConfig

WINDOW = 4096  # transformers' default, where config.json has no `sliding_window`; null means none
KV_HEADS = 8  # the same of `num_key_value_heads`; null means as many as query heads


def read_blocks(config: Mapping[str, Any]) -> LlamaConfig:
    """What Mistral's families share. Raises as `LlamaConfig.from_config` does."""
    return LlamaConfig.from_config(
        {"num_key_value_heads": KV_HEADS, **config, "attention_bias": False, "mlp_bias": False}
    )


def read_window(config: Mapping[str, Any]) -> int | None:
    """Positions of the sliding window. Raises InvalidConfigError."""
    wanted = {"sliding_window": WINDOW, **config}
    return None if wanted["sliding_window"] is None else whole(wanted, "sliding_window")


class Mistral(Llama):
    """All layers have the window, or none."""

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> LlamaConfig:
        blocks = read_blocks(config)
        return replace(blocks, windows=(read_window(config),) * blocks.layers)
