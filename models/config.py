"""Reading numbers out of a config.json, with errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cai_runtime.errors import InvalidConfigError


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
