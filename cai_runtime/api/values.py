"""The kinds of values that parameters have: one check for each, which pydantic calls and whose messages it raises."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from openai import Timeout
from pydantic import BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from cai_runtime.scalars import as_bool, as_integer, as_number, shown

MAX_STOPS = 16  # OpenAI's is 4; agents send more
TOKEN_LIMIT = 2**31  # token ids are below this
_DEPTH = 8  # of containers in a parameter; content parts are at the third


def _model_name(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _plain(value: Any) -> Any:
    """NumPy's and torch's scalars as Python's; anything else as it is."""
    for check in (as_bool, as_integer, as_number):
        if (found := check(value)) is not None:
            return found
    return value


def timeout_seconds(value: Any) -> float | None:
    """Seconds of a `timeout`: a number, the `openai` client's Timeout (its `read`), or None for no limit.

    Raises TypeError or ValueError; the message follows the parameter's name.
    """
    if isinstance(value, Timeout):
        value = value.read
    if value is None:
        return None
    number = as_number(value)
    if number is None and not isinstance(value, float):
        raise TypeError(f"must be a number of seconds, got {shown(value)}")
    if number is None or not 0 < number <= threading.TIMEOUT_MAX:
        raise ValueError(f"must be above 0 and at most {threading.TIMEOUT_MAX:.0f} seconds, got {shown(value)}")
    return float(number)


def _timeout(value: Any) -> float | None:
    try:
        return timeout_seconds(value)
    except TypeError as error:
        raise PydanticCustomError("timeout_type", "{message}", {"message": _without_value(error)}) from None
    except ValueError as error:
        raise PydanticCustomError("timeout", "{message}", {"message": _without_value(error)}) from None


def _without_value(error: Exception) -> str:
    return str(error).split(", got ")[0]


def _stop_list(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("too_long", "may hold at most {limit} strings", {"limit": MAX_STOPS})
    if "" in stops:
        raise PydanticCustomError("string_too_short", "must not hold an empty string")
    return [str(stop) for stop in stops]


def without_arrays(value: Any) -> Any:
    """A NumPy or torch array, of any number of dimensions, as Python's lists and numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "shape") else value


def _token_ids(value: Any) -> list[int]:
    value = without_arrays(value)
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Collection):
        raise PydanticCustomError("list_type", "must be a list of token ids")
    ids = [as_integer(item) for item in value]
    if any(token is None or token < 0 for token in ids):
        raise PydanticCustomError("token_type", "must hold token ids alone, integers of at least 0")
    return [token for token in ids if token is not None]


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise PydanticCustomError("dict_type", "must map token ids to numbers from -100 to 100")
    biases: dict[int, float] = {}
    for key, given in value.items():
        # JSON has string keys only; Python callers have integers at hand.
        if isinstance(key, str):
            token = int(key) if key.isascii() and key.isdigit() and len(key) <= 20 else None
        else:
            token = as_integer(key)
        if token is None or not 0 <= token < TOKEN_LIMIT:
            raise PydanticCustomError("key_type", "has a key that is not a token id")
        bias = as_number(given)
        if bias is None and not isinstance(given, float):
            raise PydanticCustomError("value_type", "must map token ids to numbers from -100 to 100")
        if bias is None or not -100 <= bias <= 100:
            raise PydanticCustomError("out_of_range", "has a bias outside -100 to 100")
        biases[token] = float(bias)
    return biases


def _ignored_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise PydanticCustomError("dict_type", "must map names to values")
    return {}


def surrogate_place(value: Any, place: str, depth: int = _DEPTH) -> str | None:
    """Where in a parameter a text with a lone surrogate is, such as `messages[0].content`; None if there is none. Such a
    text has no UTF-8, so that no tokenizer takes it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return place
    elif depth and hasattr(value, "model_dump") and not isinstance(value, type):
        return surrogate_place(vars(value), place, depth - 1)
    elif depth and isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{place}.{key[:40]}" if isinstance(key, str) else place
            if found := surrogate_place(key, place, depth) or surrogate_place(item, inner, depth - 1):
                return found
    elif depth and isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            if found := surrogate_place(item, f"{place}[{i}]", depth - 1):
                return found
    return None


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """One prompt or several, each a text or token ids, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    value = _listed(value)
    if value:
        if all(isinstance(item, str) for item in value):
            return list(value)
        if None not in (ids := _ids_or_none(value)):
            return [ids]
        several = [_ids_or_none(_listed(item)) for item in value]
        if all(ids and None not in ids for ids in several):
            return several
    raise PydanticCustomError("prompt_type", "must be a string, a list of strings, token ids, or a list of token ids")


def _listed(value: Any) -> Sequence[Any]:
    """A list or tuple as it is, NumPy's and torch's arrays as lists, nothing else."""
    value = without_arrays(value)
    return value if isinstance(value, (list, tuple)) else ()


def _ids_or_none(items: Sequence[Any]) -> list[Any]:
    """Token ids as ints; None for what is none."""
    found = (as_integer(item) for item in items)
    return [token if token is not None and 0 <= token < TOKEN_LIMIT else None for token in found]


Plain = BeforeValidator(_plain)
Ignored = Annotated[Mapping[str, Any], PlainValidator(_ignored_mapping)]
Whole = Annotated[int, Plain]
Number = Annotated[float, Plain, Field(allow_inf_nan=False)]
Flag = Annotated[bool, Plain]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
ModelName = Annotated[str | Path, BeforeValidator(_model_name)]
Stop = Annotated[str | list[str], PlainValidator(_stop_list)]
TokenIds = Annotated[list[int], PlainValidator(_token_ids)]
LogitBias = Annotated[
    dict[str, float] | dict[int, float] | dict[str, int] | dict[int, int], PlainValidator(_logit_bias)
]
Prompts = Annotated[str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], PlainValidator(_prompts)]
Seconds = Annotated[float | Timeout, PlainValidator(_timeout)]
