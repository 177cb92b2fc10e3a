"""Structured output: what `response_format`, `regex`, `grammar` and `choice` ask of the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cai_runtime.api.errors import invalid, missing, unknown
from cai_runtime.errors import GrammarError
from cai_runtime.formats.conversation import Answer
from cai_runtime.grammars import expressions
from cai_runtime.grammars.schema import SchemaError
from cai_runtime.scalars import shown

PARAMS = ("response_format", "regex", "grammar", "choice")


def param_of(params: Mapping[str, Any]) -> str:
    """The parameter that says what the answer must be, for errors; "response_format" if none is given."""
    return next((name for name in PARAMS if params.get(name) is not None), "response_format")


def answer_of(params: Mapping[str, Any]) -> Answer | None:
    """What the answer must be, by a chat's or a text completion's validated parameters. None: any text.

    Raises:
        BadRequestError: more than one parameter says it, one is malformed, or a schema can't be enforced (the message has
            the JSON pointer of the node and the reason).
    """
    given = [name for name in PARAMS if params.get(name) is not None]
    if len(given) > 1:
        raise invalid(given[1], f"'{given[0]}' and '{given[1]}' both say what the answer must be: give one of them")
    answer = None
    if given == ["response_format"]:
        answer = answer_of_format(params["response_format"], "response_format")
    elif given:
        (name,) = given
        made: Callable[[Any], str] = {"regex": expressions.regex, "grammar": expressions.lark, "choice": _choice}[name]
        value = params[name]
        if name != "choice" and not isinstance(value, str):
            raise invalid(name, f"must be a string, got {shown(value)}", "invalid_type")
        answer = _made(lambda: made(value), name)
    if answer is not None and params.get("ignore_eos"):
        raise invalid("ignore_eos", f"can't be used with '{given[0]}': the text ends where that ends")
    return answer


def answer_of_format(value: Any, param: str, *, flat: bool = False) -> Answer | None:
    """The answer of a `response_format`, or, flat, of the Responses API's `text.format`, whose schema lies beside `type`.

    Raises:
        BadRequestError: as `answer_of`.
    """
    value = _object(value, param)
    kind = value.get("type")
    if kind == "text":
        _check_keys(value, ("type",), param)
        return None
    if kind == "json_object":
        _check_keys(value, ("type",), param)
        return _made(expressions.json_object, param)
    if kind != "json_schema":
        raise invalid(f"{param}.type", f"must be 'text', 'json_object' or 'json_schema', got {shown(kind)}")
    if not flat:
        _check_keys(value, ("type", "json_schema"), param)
        param += ".json_schema"
        value = _object(value.get("json_schema"), param)
    known = ("name", "schema", "strict", "description")
    _check_keys(value, ("type", *known) if flat else known, param)
    for key, types, what in (
        ("name", str, "a string"),
        ("description", str, "a string"),
        ("strict", bool, "a boolean"),
    ):
        if value.get(key) is not None and not isinstance(value[key], types):
            raise invalid(f"{param}.{key}", f"must be {what}, got {shown(value[key])}", "invalid_type")
    for key in ("name", "schema"):
        if value.get(key) is None:
            raise missing(f"{param}.{key}")
    schema = value["schema"]
    return _made(lambda: expressions.json_schema(schema), f"{param}.schema")


def _choice(value: Any) -> str:
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise invalid("choice", f"must be a list of strings, got {shown(value)}", "invalid_type")
    return expressions.choice(value)


def _made(make: Callable[[], str], param: str) -> Answer:
    try:
        return Answer(make())
    except SchemaError as error:
        raise invalid(param, str(error), "invalid_schema") from error
    except GrammarError as error:
        raise invalid(param, str(error), "invalid_grammar") from error


def _object(value: Any, param: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise invalid(param, f"must be an object, got {shown(value)}", "invalid_type")
    return value


def _check_keys(value: Mapping[str, Any], known: Sequence[str], param: str) -> None:
    for key in value:
        if key not in known:
            raise unknown(f"{param}.{key}")
