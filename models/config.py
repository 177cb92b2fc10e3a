"""Reading numbers out of a config.json, with errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cai_runtime.errors import InvalidConfigError

MOST_LAYERS = 100_000  # of any model; a larger number is damage, and would fill the memory before a tensor is missed


def whole(config: Mapping[str, Any], key: str, default: int | None = None, *, most: int | None = None) -> int:
    """config[key] as an int above 0, and at most `most`. Raises InvalidConfigError."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidConfigError(f"{key} must be a whole number above 0, not {value!r}", file="config.json")
    if most is not None and value > most:
        raise InvalidConfigError(f"{key} must be at most {most}, not {value}", file="config.json")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None, *, least: float = -math.inf) -> float:
    """config[key] as a finite float, at least `least`. Raises InvalidConfigError."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidConfigError(f"{key} must be a number, not {value!r}", file="config.json")
    if value < least:
        raise InvalidConfigError(f"{key} must be at least {least:g}, not {value!r}", file="config.json")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """config[key] as true or false. Raises InvalidConfigError."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise InvalidConfigError(f"{key} must be true or false, not {value!r}", file="config.json")
    return value
