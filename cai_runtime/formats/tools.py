"""Checks the tools of a request, and what is asked of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict

from cai_runtime.errors import ConversationError
from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.messages import check_json
from cai_runtime.formats.traced_text import plain
from cai_runtime.scalars import as_bool, printable, shown

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MODES = ("auto", "none", "required")
_FIELDS = ("name", "description", "parameters", "strict")


class ToolFields(TypedDict):
    """The fields of a Conversation that say which functions may be called, and how."""

    tools: tuple[Tool, ...]
    tool_choice: Literal["auto", "none", "required"] | Tool
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
    found = _parse_list(tools)
    parallel = True if parallel_tool_calls is None else as_bool(parallel_tool_calls)
    if parallel is None:
        raise ConversationError("'parallel_tool_calls' must be true or false.", param="parallel_tool_calls")
    choice, found = _parse_choice(tool_choice, found)
    return {"tools": found, "tool_choice": choice, "parallel_tool_calls": parallel}


def _parse_list(tools: Any) -> tuple[Tool, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, Iterable) or isinstance(tools, (str, bytes, Mapping)):
        raise ConversationError(f"'tools' must be a list of tools, got {shown(tools)}.", param="tools")
    found: dict[str, Tool] = {}
    for i, given in enumerate(tools):
        tool = _parse_tool(given, f"tools[{i}]")
        if tool.name in found:
            raise ConversationError(
                f"'tools[{i}].function.name' is that of another tool: {tool.name!r}.", param=f"tools[{i}].function.name"
            )
        found[tool.name] = tool
    return tuple(found.values())


def _parse_tool(tool: Any, place: str) -> Tool:
    fields = _fields(tool, place)
    kind = fields.pop("type", None)
    if kind is None:
        raise ConversationError(f"Missing required parameter: '{place}.type'.", param=f"{place}.type")
    if kind != "function":
        raise ConversationError(
            f"'{place}.type' must be 'function', got {shown(kind)}: this library calls no other tools.",
            param=f"{place}.type",
            capability=f"{kind}_tools" if isinstance(kind, str) and _NAME.fullmatch(kind) else None,
        )
    if "function" not in fields:
        raise ConversationError(f"Missing required parameter: '{place}.function'.", param=f"{place}.function")
    function = _fields(fields.pop("function"), f"{place}.function")
    _refuse_unknown(fields, (), place)
    return parse_function(function, f"{place}.function")


def parse_function(function: Mapping[str, Any], place: str) -> Tool:
    """A function's declaration: name, description, parameters, strict.

    Raises:
        ConversationError: naming the place.
    """
    _refuse_unknown(function, _FIELDS, place)
    name, description = function.get("name"), function.get("description")
    if name is None:
        raise ConversationError(f"Missing required parameter: '{place}.name'.", param=f"{place}.name")
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


def _parse_choice(choice: Any, tools: tuple[Tool, ...]) -> tuple[Any, tuple[Tool, ...]]:
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
        return choice, tools
    fields = _fields(choice, "tool_choice")
    kind = fields.pop("type", None)
    if kind == "function":
        return _parse_named(fields, "tool_choice", tools), tools
    if kind == "allowed_tools":
        return _parse_allowed(fields, tools)
    raise ConversationError(
        f"'tool_choice.type' must be 'function' or 'allowed_tools', got {shown(kind)}.",
        param="tool_choice.type",
        capability="custom_tools" if kind == "custom" else None,
    )


def _parse_named(fields: dict[str, Any], place: str, tools: tuple[Tool, ...]) -> Tool:
    """The tool that `{"function": {"name": ...}}` names."""
    function = _fields(fields.pop("function", {}), f"{place}.function")
    _refuse_unknown(fields, (), place)
    _refuse_unknown(function, ("name",), f"{place}.function")
    name = function.get("name")
    if name is None:
        raise ConversationError(f"Missing required parameter: '{place}.function.name'.", param=f"{place}.function.name")
    for tool in tools:
        if tool.name == name:
            return tool
    raise ConversationError(
        f"'{place}.function.name' is {shown(name)}, which is none of the 'tools'.", param=f"{place}.function.name"
    )


def _parse_allowed(fields: dict[str, Any], tools: tuple[Tool, ...]) -> tuple[str, tuple[Tool, ...]]:
    place = "tool_choice.allowed_tools"
    allowed = _fields(fields.pop("allowed_tools", None), place)
    _refuse_unknown(fields, (), "tool_choice")
    mode, given = allowed.pop("mode", None), allowed.pop("tools", None)
    _refuse_unknown(allowed, (), place)
    if mode not in ("auto", "required"):
        raise ConversationError(
            f"'{place}.mode' must be 'auto' or 'required', got {shown(mode)}.", param=f"{place}.mode"
        )
    if not isinstance(given, (list, tuple)) or not given:
        raise ConversationError(f"'{place}.tools' must be a list of at least one tool.", param=f"{place}.tools")
    named = set()
    for i, one in enumerate(given):
        inner = _fields(one, f"{place}.tools[{i}]")
        if inner.pop("type", None) != "function":
            raise ConversationError(f"'{place}.tools[{i}].type' must be 'function'.", param=f"{place}.tools[{i}].type")
        named.add(_parse_named(inner, f"{place}.tools[{i}]", tools).name)
    return mode, tuple(tool for tool in tools if tool.name in named)


def _fields(value: Any, place: str) -> dict[str, Any]:
    """The fields that are given of an object, which may be one of the `openai` package's."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(exclude_none=True)
    if not isinstance(value, Mapping):
        raise ConversationError(f"'{place}' must be an object, got {shown(value)}.", param=place)
    return {key: item for key, item in value.items() if item is not None}


def _refuse_unknown(fields: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    for key in fields:
        if key not in known:
            where = f"{place}.{printable(str(key)[:80])}"
            raise ConversationError(f"Unknown parameter: '{where}'.", param=where)
