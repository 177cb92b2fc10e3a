"""Qwen 3 (Yang et al. 2025): Llama's blocks with a norm of every head of queries and keys before the rotation.

Sliding windows are as in Qwen 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cai_runtime.models import qwen2
from cai_runtime.models.llama import Llama, LlamaConfig

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}  # see there


class Qwen3(Llama):
    """See above."""

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> LlamaConfig:
        blocks = LlamaConfig.from_config({**DEFAULTS, **config, "mlp_bias": False})
        return replace(blocks, head_norms=True, windows=qwen2.windows(config, blocks.layers))
