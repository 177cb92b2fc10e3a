"""Checks the types of the options of `compress`."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from cai_runtime.errors import CompressionError

MOST_SEED = (1 << 63) - 1  # accepted by torch and numpy
_NUMBER, _INTEGER, _TEXT, _FLAG = "a number", "an integer", "a text", "True or False"
_KINDS: dict[str, tuple[str, ...]] = {
    "keep": (_NUMBER, "None"),
    "store": (_TEXT, "None"),
    "kind": (_TEXT, "None"),
    "allocation": (_TEXT,),
    "curvature": (_FLAG,),
    "shift": (_FLAG,),
    "refine_epochs": (_INTEGER, "None"),
    "heal_tokens": (_INTEGER, "None"),
    "samples": (_INTEGER,),
    "sequence_length": (_INTEGER,),
    "embedding_store": (_TEXT, "None"),
    "rank_multiple": (_INTEGER, "None"),
    "floor": (_NUMBER,),
    "elastic": (_FLAG,),
    "smallest_keep": (_NUMBER, "None"),
    "device": (_TEXT,),
    "dtype": (_TEXT, "None"),
    "seed": (_INTEGER,),
    "evaluate": (_FLAG,),
    "overwrite": (_FLAG,),
    "restart": (_FLAG,),
    "progress": (_FLAG, "None"),
}


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with numbers converted to Python's types, which JSON can represent (numpy numbers are accepted, too).
    Options that `_KINDS` does not list are checked where they are used.

    Raises CompressionError, which names the option, for a wrong type.
    """
    return {name: _plain(name, value, _KINDS[name]) if name in _KINDS else value for name, value in options.items()}


def _plain(name: str, value: Any, kinds: tuple[str, ...]) -> Any:
    if value is None and "None" in kinds:
        return None
    if isinstance(value, bool):
        if _FLAG in kinds:
            return value
    elif isinstance(value, str):
        if _TEXT in kinds:
            return value
    elif isinstance(value, Integral) and _INTEGER in kinds:
        return int(value)
    elif isinstance(value, Real) and _NUMBER in kinds:
        return float(value)
    raise CompressionError(f"{name} must be {' or '.join(kinds)}, is {value!r}")
