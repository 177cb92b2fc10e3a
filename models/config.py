"""Reading numbers out of a config.json, with errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cai_runtime.errors import InvalidConfigError, UnsupportedModelError

LAYER_TYPES = ("full_attention", "sliding_attention")


def whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """config[key] as an int above 0. Raises InvalidConfigError."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidConfigError(f"{key} must be a whole number above 0, not {value!r}", file="config.json")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """config[key] as a float. Raises InvalidConfigError."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidConfigError(f"{key} must be a number, not {value!r}", file="config.json")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """config[key] as true or false. Raises InvalidConfigError."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise InvalidConfigError(f"{key} must be true or false, not {value!r}", file="config.json")
    return value


def layer_windows(config: Mapping[str, Any], layers: int, window: int | None) -> tuple[int | None, ...] | None:
    """The window of each layer, in positions, as config.json's `layer_types` says; None where it says nothing.

    window: of the layers that have one. Raises InvalidConfigError, UnsupportedModelError for another kind of layer.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise InvalidConfigError(
            f"layer_types must list the kind of each of {layers} layers, not {kinds!r}", file="config.json"
        )
    unknown = next((kind for kind in kinds if kind not in LAYER_TYPES), None)
    if unknown is not None:
        raise UnsupportedModelError(f"layer_types has {unknown!r}; only {' and '.join(LAYER_TYPES)} are supported")
    if window is None and LAYER_TYPES[1] in kinds:
        raise InvalidConfigError("layer_types has sliding_attention, but sliding_window is null", file="config.json")
    return tuple(None if kind == LAYER_TYPES[0] else window for kind in kinds)
