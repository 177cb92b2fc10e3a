"""`tools`, `tool_choice`, `reasoning` and `text` of a Responses request: checked, and as the reply repeats them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from openai.types.responses import FunctionTool, ResponseTextConfig, ToolChoiceAllowed, ToolChoiceFunction
from openai.types.responses.response import ToolChoice

from cai_runtime.api.errors import BadRequestError
from cai_runtime.api.responses.params import invalid, listed, mapping, refused, schema_of, text_field
from cai_runtime.formats.conversation import Reasoning, Tool
from cai_runtime.scalars import shown

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_MODES = ("none", "auto", "required")
_EFFORTS = ("none", "low", "medium", "high", "xhigh", "max")
_FUNCTION_KEYS = ("type", "name", "description", "parameters", "strict", "allowed_callers", "async", "async_",
                  "defer_loading", "output_schema")  # fmt: skip
_FORMAT_KEYS = {"text": (), "json_object": (), "json_schema": ("name", "schema", "schema_", "description", "strict")}


@dataclass(frozen=True)
class ToolUse:
    """tools: those that the model sees. choice: as `Conversation.tool_choice`. The echoes are of the reply."""

    tools: tuple[Tool, ...]
    choice: Any
    tools_echo: tuple[FunctionTool, ...]
    choice_echo: ToolChoice


def parse_tool_use(tools: Any, choice: Any) -> ToolUse:
    """Raises BadRequestError, naming the place, such as `tools[1].parameters`."""
    known: dict[str, Tool] = {}
    for i, given in enumerate(listed(tools, "tools")):
        tool = _function(given, f"tools[{i}]")
        if tool.name in known:
            raise invalid(f"tools[{i}].name", f"is {tool.name!r} a second time")
        known[tool.name] = tool
    echo = tuple(
        FunctionTool(
            type="function",
            name=tool.name,
            description=tool.description,
            parameters=None if tool.parameters is None else dict(tool.parameters),
            strict=tool.strict,
        )
        for tool in known.values()
    )
    every = tuple(known.values())
    if isinstance(choice, str):
        if choice not in _MODES:
            raise invalid("tool_choice", f"must be one of {', '.join(_MODES)} or an object, got {shown(choice)}")
        if choice == "required" and not known:
            raise invalid("tool_choice", "is 'required', but there are no tools")
        return ToolUse(every, choice, echo, choice)  # type: ignore[arg-type]
    fields = mapping(choice, "tool_choice")
    kind = text_field(fields, "type", "tool_choice")
    if kind == "function":
        mapping(fields, "tool_choice", ("type", "name"))
        named = _among(known, fields, "tool_choice")
        return ToolUse(every, named, echo, ToolChoiceFunction(type="function", name=named.name))
    if kind != "allowed_tools":
        raise refused("tool_choice", f"of type {shown(kind)}: only functions can be called")
    mapping(fields, "tool_choice", ("type", "mode", "tools"))
    mode = text_field(fields, "mode", "tool_choice")
    if mode not in ("auto", "required"):
        raise invalid("tool_choice.mode", f"must be auto or required, got {shown(mode)}")
    allowed: dict[str, Tool] = {}
    for i, given in enumerate(listed(fields.get("tools", ()), "tool_choice.tools")):
        place = f"tool_choice.tools[{i}]"
        reference = mapping(given, place)
        if text_field(reference, "type", place) != "function":
            raise refused(place, "only functions can be called")
        tool = _among(known, reference, place)
        allowed[tool.name] = tool
    if not allowed:
        raise invalid("tool_choice.tools", "must name at least one tool")
    references: list[dict[str, object]] = [{"type": "function", "name": name} for name in allowed]
    return ToolUse(
        tuple(allowed.values()),
        mode,
        echo,
        ToolChoiceAllowed(type="allowed_tools", mode=mode, tools=references),  # type: ignore[arg-type]
    )


def _among(known: dict[str, Tool], fields: dict[str, Any], place: str) -> Tool:
    name = text_field(fields, "name", place)
    if name not in known:
        raise invalid(f"{place}.name", f"is {shown(name)}, which is none of the tools")
    return known[name]


def _function(given: Any, place: str) -> Tool:
    fields = mapping(given, place)
    kind = text_field(fields, "type", place)
    if kind != "function":
        raise refused(f"{place}.type", f"{shown(kind)} tools are not supported: only functions are")
    if "function" in fields:
        raise invalid(place, "nests its fields under 'function' as chat does: here they lie beside 'type'")
    fields = mapping(given, place, _FUNCTION_KEYS)
    for key, neutral in (
        ("defer_loading", False),
        ("async", False),
        ("async_", False),
        ("allowed_callers", ["direct"]),
    ):
        if key in fields and fields[key] != neutral:
            raise refused(f"{place}.{key}", "the model sees every tool, and its calls are the program's to make")
    if "output_schema" in fields:
        raise refused(f"{place}.output_schema", "outputs are given to the model as they are")
    name = text_field(fields, "name", place)
    if not _NAME.fullmatch(name):
        raise invalid(f"{place}.name", f"must have 1 to 128 letters, digits, '_' or '-', got {shown(name)}")
    parameters = fields.get("parameters")
    if parameters is not None:
        parameters = schema_of(parameters, f"{place}.parameters")
        if parameters.get("type", "object") != "object":
            raise invalid(f"{place}.parameters.type", "must be 'object'")
    strict = fields.get("strict", False)
    if not isinstance(strict, bool):
        raise invalid(f"{place}.strict", f"must be true or false, got {shown(strict)}", "invalid_type")
    description = text_field(fields, "description", place) if "description" in fields else None
    return Tool(name, description, parameters, strict)


def parse_reasoning(value: Any) -> Reasoning:
    """`reasoning`. Raises BadRequestError for what is not served: summaries above all."""
    fields = mapping(value, "reasoning", ("effort", "summary", "generate_summary", "context", "mode"))
    for key in ("summary", "generate_summary"):
        if key in fields:
            raise refused(f"reasoning.{key}", "the reasoning itself is the content of the reply's reasoning items")
    if fields.get("context", "auto") != "auto":
        raise refused("reasoning.context", "the chat template decides which earlier thoughts the model sees")
    if fields.get("mode", "standard") != "standard":
        raise refused("reasoning.mode", "there is 'standard' alone")
    effort = fields.get("effort")
    if effort is not None and effort not in _EFFORTS:
        raise invalid("reasoning.effort", f"must be one of {', '.join(_EFFORTS)}, got {shown(effort)}")
    return Reasoning(effort=effort)


def parse_text(value: Any) -> tuple[dict[str, Any], ResponseTextConfig]:
    """`text`: its format in Chat's shape of `response_format`, and as the reply repeats it."""
    fields = mapping(value, "text", ("format", "verbosity"))
    if fields.get("verbosity", "medium") != "medium":
        raise refused("text.verbosity", "local models have no such setting, 'medium' is how they answer")
    given = mapping(fields.get("format", {"type": "text"}), "text.format")
    kind = text_field(given, "type", "text.format")
    if kind not in _FORMAT_KEYS:
        raise invalid("text.format.type", f"must be one of {', '.join(_FORMAT_KEYS)}, got {shown(kind)}")
    mapping(given, "text.format", ("type", *_FORMAT_KEYS[kind]))
    if "schema_" in given:  # the `openai` package's own object has it under this name
        given["schema"] = given.pop("schema_")
    echo = {"format": given, "verbosity": "medium"}
    if kind != "json_schema":
        return {"type": kind}, ResponseTextConfig.model_validate(echo)
    text_field(given, "name", "text.format")
    if "schema" not in given:
        raise BadRequestError(
            "Missing required parameter: 'text.format.schema'.",
            param="text.format.schema",
            code="missing_required_parameter",
        )
    given["schema"] = schema_of(given["schema"], "text.format.schema")
    if not isinstance(given.setdefault("strict", False), bool):
        raise invalid("text.format.strict", "must be true or false", "invalid_type")
    nested = {key: given[key] for key in ("name", "schema", "description", "strict") if key in given}
    return {"type": "json_schema", "json_schema": nested}, ResponseTextConfig.model_validate(echo)
