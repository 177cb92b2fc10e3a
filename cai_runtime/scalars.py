"""One check for numbers and truth values that came from outside, NumPy's and torch's included. Light to import."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

_HOSTILE = (TypeError, ValueError, OverflowError, RuntimeError)  # what `__index__` and `__float__` of odd objects raise


def as_bool(value: Any) -> bool | None:
    """`value` as a bool if it is one, Python's or NumPy's; None of anything else, 0 and 1 too."""
    if isinstance(value, bool):
        return value
    return bool(value) if _is_scalar_of(value, "bool") else None


def as_integer(value: Any) -> int | None:
    """`value` as an int if it is an integer (whatever has `__index__`); None of anything else, a bool too."""
    if as_bool(value) is not None or isinstance(value, (str, bytes)):
        return None
    try:
        return operator.index(value)
    except _HOSTILE:
        return None


def as_number(value: Any) -> int | float | None:
    """`value` as a finite int or float; None of anything else, a bool, a text, NaN and infinity too."""
    integer = as_integer(value)
    if integer is not None:
        return integer if abs(integer) < 10**308 else None
    if not (isinstance(value, numbers.Real) or _is_scalar_of(value, "float", "bfloat")) or as_bool(value) is not None:
        return None
    try:
        number = float(value)
    except _HOSTILE:
        return None
    return number if math.isfinite(number) else None


def shown(value: Any, limit: int = 80) -> str:
    """`repr(value)` for a message: cut to `limit` characters, and printable whatever the value is."""
    try:
        if isinstance(value, (str, bytes)):
            value = value[: limit + 1]  # no repr of megabytes
        text = repr(value)
    except Exception:  # noqa: BLE001 - a `__repr__` of the caller's; integers of over 4,300 digits raise ValueError
        text = f"<{type(value).__name__}>"
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str) -> str:
    """`text` with lone surrogates escaped, so that it can be printed and sent as JSON."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_scalar_of(value: Any, *kinds: str) -> bool:
    """Whether it is a NumPy or torch scalar, or an array without dimensions, of a dtype of these kinds."""
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return dtype.startswith(kinds) and getattr(value, "shape", None) == ()
