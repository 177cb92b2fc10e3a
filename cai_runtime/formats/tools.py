"""Checks the tools of a request, and what is asked of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict

from cai_runtime.errors import ConversationError
from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.messages import check_json, given_fields
from cai_runtime.formats.traced_text import plain
from cai_runtime.scalars import as_bool, printable, shown

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MODES = ("auto", "none", "required")
_FIELDS = ("name", "description", "parameters", "strict")


ToolChoice = Literal["auto", "none", "required"] | Tool


class ToolFields(TypedDict):
    """The fields of a Conversation that say which functions may be called, and how."""

    tools: tuple[Tool, ...]
    tool_choice: ToolChoice
    parallel_tool_calls: bool


def parse_tools(tools: Any = None, tool_choice: Any = None, parallel_tool_calls: Any = None) -> ToolFields:
    """What a request asks of tools, as the fields of a Conversation.

    Args:
        tools: a list of `{"type": "function", "function": {"name", "description", "parameters", "strict"}}`, dicts or the
            `openai` package's objects. Names have 1 to 64 letters, digits, underscores and dashes; `parameters` is the
            JSON schema of an object; `strict` (default false) holds the arguments to it.
        tool_choice: "auto", "none", "required", `{"type": "function", "function": {"name": ...}}`, or
            `{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}`, which leaves the
            others out. Default: "auto" with tools, else "none".
        parallel_tool_calls: whether an answer may hold several calls. Default true.

    Raises:
        ConversationError: `.param` names the place, such as `tools[0].function.name`.
    """
    found = parse_list(tools)
    parallel = True if parallel_tool_calls is None else as_bool(parallel_tool_calls)
    if parallel is None:
        raise ConversationError("'parallel_tool_calls' must be true or false.", param="parallel_tool_calls")
    choice, found = parse_choice(tool_choice, found)
    return {"tools": found, "tool_choice": choice, "parallel_tool_calls": parallel}


def parse_list(tools: Any, *, flat: bool = False) -> tuple[Tool, ...]:
    """The functions of `tools`. flat: their fields lie beside `type`, as in the Responses API.

    Raises:
        ConversationError: naming the place.
    """
    if tools is None:
        return ()
    if not isinstance(tools, Iterable) or isinstance(tools, (str, bytes, Mapping)):
        raise ConversationError(f"'tools' must be a list of tools, got {shown(tools)}.", param="tools")
    found: dict[str, Tool] = {}
    for i, given in enumerate(tools):
        fields, place = _function_of(given, f"tools[{i}]", flat)
        tool = parse_function(fields, place)
        if tool.name in found:
            raise ConversationError(f"'{place}.name' is that of another tool: {tool.name!r}.", param=f"{place}.name")
        found[tool.name] = tool
    return tuple(found.values())


def _function_of(given: Any, place: str, flat: bool) -> tuple[dict[str, Any], str]:
    """A function's fields, or those of a reference to one, and their place."""
    fields = given_fields(given, place)
    kind = fields.pop("type", None)
    if kind is None:
        raise ConversationError.missing(f"{place}.type")
    if kind != "function":
        raise _not_a_function(kind, place)
    return _inner(fields, "function", place, flat)


def _not_a_function(kind: Any, place: str, others: str = "") -> ConversationError:
    return ConversationError(
        f"'{place}.type' must be 'function'{others}, got {shown(kind)}: this library calls no other tools.",
        param=f"{place}.type",
        capability=f"{kind}_tools" if isinstance(kind, str) and _NAME.fullmatch(kind) else None,
    )


def _inner(fields: dict[str, Any], key: str, place: str, flat: bool) -> tuple[dict[str, Any], str]:
    """The fields of the object under `key`, which is the only one; flat: the fields themselves. And their place."""
    if flat:
        return fields, place
    if key not in fields:
        raise ConversationError.missing(f"{place}.{key}")
    inner = given_fields(fields.pop(key), f"{place}.{key}")
    _refuse_unknown(fields, (), place)
    return inner, f"{place}.{key}"


def parse_function(function: Mapping[str, Any], place: str) -> Tool:
    """A function's declaration: name, description, parameters, strict.

    Raises:
        ConversationError: naming the place.
    """
    _refuse_unknown(function, _FIELDS, place)
    name, description = function.get("name"), function.get("description")
    if name is None:
        raise ConversationError.missing(f"{place}.name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConversationError(
            f"'{place}.name' must have 1 to 64 letters of a-z and A-Z, digits, underscores and dashes, got {shown(name)}.",
            param=f"{place}.name",
        )
    if description is not None:
        if not isinstance(description, str):
            raise ConversationError(f"'{place}.description' must be a string.", param=f"{place}.description")
        check_json(description, f"{place}.description")
        description = plain(description)
    strict = as_bool(function.get("strict") or False)
    if strict is None:
        raise ConversationError(f"'{place}.strict' must be true or false.", param=f"{place}.strict")
    return Tool(plain(name), description, _parse_parameters(function.get("parameters"), f"{place}.parameters"), strict)


def _parse_parameters(parameters: Any, place: str) -> dict[str, Any] | None:
    if parameters is None:
        return None
    if not isinstance(parameters, Mapping):
        raise ConversationError(f"'{place}' must be a JSON schema, an object, got {shown(parameters)}.", param=place)
    check_json(parameters, place)
    kind = parameters.get("type")
    if parameters and kind != "object" and not (kind is None and _may_be_object(parameters)):
        raise ConversationError(
            f"'{place}.type' must be 'object', for arguments are an object, got {shown(kind)}.", param=f"{place}.type"
        )
    properties = parameters.get("properties")
    if properties is not None and not isinstance(properties, Mapping):
        raise ConversationError(f"'{place}.properties' must be an object.", param=f"{place}.properties")
    return dict(parameters)


def _may_be_object(schema: Mapping[str, Any]) -> bool:
    """Whether a schema without a type says in another way that it is an object's."""
    return any(
        key in schema for key in ("properties", "$ref", "anyOf", "oneOf", "allOf", "additionalProperties", "required")
    )


def parse_choice(choice: Any, tools: tuple[Tool, ...], *, flat: bool = False) -> tuple[ToolChoice, tuple[Tool, ...]]:
    """`tool_choice`, and the tools that it leaves, in their order. flat: as in `parse_list`.

    Raises:
        ConversationError: naming the place.
    """
    if choice is None:
        return ("auto" if tools else "none"), tools
    if isinstance(choice, str):
        if choice not in _MODES:
            raise ConversationError(
                f"'tool_choice' must be one of {', '.join(_MODES)}, or an object that names a function, got "
                f"{shown(choice)}.",
                param="tool_choice",
            )
        if choice == "required" and not tools:
            raise ConversationError("'tool_choice' is 'required', but there are no 'tools'.", param="tool_choice")
        return choice, tools  # type: ignore[return-value]
    fields = given_fields(choice, "tool_choice")
    kind = fields.get("type")
    if kind is None:
        raise ConversationError.missing("tool_choice.type")
    if kind == "allowed_tools":
        return _parse_allowed(fields, tools, flat)
    if kind != "function":
        raise _not_a_function(kind, "tool_choice", " or 'allowed_tools'")
    return _parse_named(fields, "tool_choice", tools, flat), tools


def _parse_named(given: Any, place: str, tools: tuple[Tool, ...], flat: bool) -> Tool:
    """The tool that a reference names."""
    function, place = _function_of(given, place, flat)
    _refuse_unknown(function, ("name",), place)
    name = function.get("name")
    if name is None:
        raise ConversationError.missing(f"{place}.name")
    for tool in tools:
        if tool.name == name:
            return tool
    raise ConversationError(f"'{place}.name' is {shown(name)}, which is none of the 'tools'.", param=f"{place}.name")


def _parse_allowed(fields: dict[str, Any], tools: tuple[Tool, ...], flat: bool) -> tuple[ToolChoice, tuple[Tool, ...]]:
    del fields["type"]
    allowed, place = _inner(fields, "allowed_tools", "tool_choice", flat)
    mode, given = allowed.pop("mode", None), allowed.pop("tools", None)
    _refuse_unknown(allowed, (), place)
    if mode not in ("auto", "required"):
        raise ConversationError(
            f"'{place}.mode' must be 'auto' or 'required', got {shown(mode)}.", param=f"{place}.mode"
        )
    if not isinstance(given, (list, tuple)) or not given:
        raise ConversationError(f"'{place}.tools' must be a list of at least one tool.", param=f"{place}.tools")
    named = {_parse_named(one, f"{place}.tools[{i}]", tools, flat).name for i, one in enumerate(given)}
    return mode, tuple(tool for tool in tools if tool.name in named)


def _refuse_unknown(fields: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    for key in fields:
        if key not in known:
            raise ConversationError.unknown(f"{place}.{printable(str(key)[:80])}")
