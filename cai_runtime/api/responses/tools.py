"""`tools`, `tool_choice`, `reasoning` and `text` of a Responses request: checked, and as the reply repeats them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openai.types.responses import FunctionTool, ResponseTextConfig, ToolChoiceAllowed, ToolChoiceFunction
from openai.types.responses.response import ToolChoice

from cai_runtime.api.errors import as_api_errors, invalid
from cai_runtime.api.responses.params import listed, mapping, refused, text_field
from cai_runtime.api.structured import answer_of, answer_of_format
from cai_runtime.formats.conversation import Answer, Reasoning, Tool
from cai_runtime.formats.probes import EFFORTS
from cai_runtime.formats.tools import parse_function
from cai_runtime.scalars import shown

_MODES = ("none", "auto", "required")
_DECLARED = ("name", "description", "parameters", "strict")
_FUNCTION_KEYS = ("type", "name", "description", "parameters", "strict", "allowed_callers", "async", "async_",
                  "defer_loading", "output_schema")  # fmt: skip


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
    with as_api_errors():
        return parse_function({key: fields[key] for key in _DECLARED if key in fields}, place)


def parse_reasoning(params: Mapping[str, Any]) -> Reasoning:
    """Of `reasoning`, `reasoning_enabled` and `reasoning_max_tokens`.

    Raises BadRequestError for what is not served: summaries above all.
    """
    value = params.get("reasoning", {})
    fields = mapping(value, "reasoning", ("effort", "summary", "generate_summary", "context", "mode"))
    for key in ("summary", "generate_summary"):
        if key in fields:
            raise refused(f"reasoning.{key}", "the reasoning itself is the content of the reply's reasoning items")
    if fields.get("context", "auto") != "auto":
        raise refused("reasoning.context", "the chat template decides which earlier thoughts the model sees")
    if fields.get("mode", "standard") != "standard":
        raise refused("reasoning.mode", "there is 'standard' alone")
    effort = fields.get("effort")
    if effort is not None and effort not in EFFORTS:
        raise invalid("reasoning.effort", f"must be one of {', '.join(EFFORTS)}, got {shown(effort)}")
    return Reasoning(params.get("reasoning_enabled"), effort, params.get("reasoning_max_tokens"))


def parse_text(params: Mapping[str, Any]) -> tuple[Answer | None, ResponseTextConfig]:
    """What the answer must be, by `text.format` or by our own `regex`, `grammar` and `choice`; and `text` as the reply
    repeats it.

    Raises:
        BadRequestError: see `structured.answer_of`.
    """
    fields = mapping(params.get("text", {}), "text", ("format", "verbosity"))
    if fields.get("verbosity", "medium") != "medium":
        raise refused("text.verbosity", "local models have no such setting, 'medium' is how they answer")
    given = mapping(fields.get("format", {"type": "text"}), "text.format")
    if "schema_" in given:  # the `openai` package's own object has it under this name
        given["schema"] = given.pop("schema_")
    answer = answer_of_format(given, "text.format", flat=True)
    own = answer_of({name: params[name] for name in ("regex", "grammar", "choice", "ignore_eos") if name in params})
    if answer is not None and own is not None:
        raise invalid("text.format", "says what the answer must be, and so does one of 'regex', 'grammar' and 'choice'")
    if answer is not None and params.get("ignore_eos"):
        raise invalid("ignore_eos", "can't be used with 'text.format': the text ends where that ends")
    if given["type"] == "json_schema":
        given.setdefault("strict", False)
    echo = ResponseTextConfig.model_validate({"format": given, "verbosity": "medium"})
    return own if answer is None else answer, echo
