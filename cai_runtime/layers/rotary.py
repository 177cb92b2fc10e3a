"""Rotary position embedding (Su et al. 2021) and its ways of reaching further than the model was trained for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cai_runtime.errors import InvalidConfigError, UnsupportedModelError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """What determines the angles. `parameters` are the scaling's own (factor, low_freq_factor, ...)."""

    rope_type: str
    theta: float
    rotary_dim: int
    max_positions: int
    parameters: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int, *, partial: bool = True) -> RopeConfig:
        """From a config.json: `rope_scaling` and `rope_theta` (before transformers 5), or else `rope_parameters`.

        partial: whether the architecture knows `partial_rotary_factor`; transformers ignores it in those that don't.

        Raises UnsupportedModelError for a rope_type that is not one of ROPE_TYPES, InvalidConfigError for a value that is
        no rotation's.
        """
        parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(parameters, Mapping):
            raise _invalid(f"rope_scaling and rope_parameters must be objects, not {parameters!r}")
        parameters = dict(parameters)
        rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
        if rope_type not in ROPE_TYPES:
            raise UnsupportedModelError(f"rope_type {rope_type!r} is not one of {', '.join(ROPE_TYPES)}")
        positions = _number("max_position_embeddings", config.get("max_position_embeddings"), 2048)
        if rope_type in ("llama3", "yarn"):
            trained = config.get("original_max_position_embeddings")
            if trained is None:
                trained = parameters.get("original_max_position_embeddings")
            trained = _number("original_max_position_embeddings", trained, positions)
            parameters["original_max_position_embeddings"] = trained
        theta = parameters.get("rope_theta")
        theta = _number("rope_theta", config.get("rope_theta") if theta is None else theta, 10000.0)
        rotary_dim = head_dim
        if partial:
            share = parameters.get("partial_rotary_factor")
            share = config.get("partial_rotary_factor") if share is None else share
            rotary_dim = int(head_dim * _number("partial_rotary_factor", share, 1.0))
        if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
            raise _invalid(f"{rotary_dim} rotated dimensions of {head_dim} are not an even number of them")
        return cls(rope_type, theta, rotary_dim, int(positions), parameters)

    def get(self, key: str) -> float:
        value = self.parameters.get(key)
        if value is None:
            raise _invalid(f"rope_type {self.rope_type} needs a number {key!r}, not {value!r}")
        return _number(key, value, 0.0)

    @property
    def original_positions(self) -> int:
        """Positions the model was trained for, where the scaling names them."""
        return int(self.parameters.get("original_max_position_embeddings") or self.max_positions)

    @property
    def context(self) -> int:
        """Positions the model can use: with dynamic scaling, `factor` times those of its configuration."""
        return int(self.max_positions * self.get("factor")) if self.rope_type == "dynamic" else self.max_positions


def _invalid(message: str) -> InvalidConfigError:
    return InvalidConfigError(message, file="config.json")


def _number(key: str, value: object, default: float) -> float:
    """The value of a key, a number above 0. Raises InvalidConfigError."""
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _invalid(f"{key} must be a number above 0, not {value!r}")
    return float(value)


def inverse_frequencies(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    """(angle per position, fp32 [rotary_dim / 2]; factor on cosine and sine) of every type but dynamic."""
    dim = rope.rotary_dim
    plain = _plain(rope.theta, dim)
    match rope.rope_type:
        case "default" | "dynamic":
            return plain, 1.0
        case "linear":  # position interpolation (Chen et al. 2023)
            return plain / rope.get("factor"), 1.0
        case "llama3":
            return _llama3(rope, plain), 1.0
        case "yarn":
            return _yarn(rope, plain)
    raise UnsupportedModelError(f"rope_type {rope.rope_type!r} is not one of {', '.join(ROPE_TYPES)}")


def _plain(theta: float, dim: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = rope.get("factor"), rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if low >= high:
        raise _invalid(f"low_freq_factor {low} must be below high_freq_factor {high}")
    original = rope.get("original_max_position_embeddings")
    turns = original * plain / (2 * math.pi)  # full turns within the trained context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * smooth + plain / factor * (1 - smooth)


def _yarn(rope: RopeConfig, plain: torch.Tensor) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023), with DeepSeek's mscale variants of the attention factor."""
    original = rope.original_positions
    factor = rope.parameters.get("factor")
    factor = rope.max_positions / original if factor is None else rope.get("factor")
    dim = rope.rotary_dim

    def mscale(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = rope.parameters.get("attention_factor")
    if attention is None:
        m, m_all = rope.parameters.get("mscale"), rope.parameters.get("mscale_all_dim")
        attention = mscale(m) / mscale(m_all) if m and m_all else mscale()

    def dimension_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension_of(float(rope.parameters.get("beta_fast") or 32))
    high = dimension_of(float(rope.parameters.get("beta_slow") or 1))
    if rope.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, without dividing by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp), float(attention)


def cos_sin_table(rope: RopeConfig, positions: int) -> torch.Tensor:
    """fp32 [positions, rotary_dim]: cosines of the first half, then sines, as the rope kernels read them.

    dynamic (NTK-aware, bloc97 and emozilla 2023) rotates position p as for a sequence of p + 1 positions. That is what
    transformers does when it decodes; it is a function of the position alone, so that cached keys stay valid however a
    prompt is chunked. (transformers' prefill of a prompt beyond max_position_embeddings uses the prompt's length for all of
    its positions, which a cache shared between prompts can't follow.)
    """
    index = torch.arange(positions, dtype=torch.float32, device="cpu")
    if rope.rope_type == "dynamic":
        dim, factor, limit = rope.rotary_dim, rope.get("factor"), rope.max_positions
        length = (index + 1).clamp_min(limit).double()
        theta = rope.theta * (factor * length / limit - (factor - 1)) ** (dim / (dim - 2))
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
        angles, scale = index[:, None] * (1.0 / theta[:, None] ** exponent).float(), 1.0
    else:
        frequencies, scale = inverse_frequencies(rope)
        angles = index[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1) * scale
