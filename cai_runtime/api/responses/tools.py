"""`tools`, `tool_choice`, `reasoning` and `text` of a Responses request: checked, and as the reply repeats them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openai.types.responses import FunctionTool, ResponseTextConfig, ToolChoiceAllowed, ToolChoiceFunction
from openai.types.responses.response import ToolChoice

from cai_runtime.api.errors import as_api_errors, invalid
from cai_runtime.api.responses.params import listed, mapping, refused
from cai_runtime.api.structured import answer_of, answer_of_format
from cai_runtime.formats.conversation import Answer, Reasoning, Tool
from cai_runtime.formats.probes import EFFORTS
from cai_runtime.formats.tools import parse_choice, parse_list
from cai_runtime.scalars import shown

_NEUTRAL = {"defer_loading": False, "async": False, "async_": False, "allowed_callers": ["direct"]}


@dataclass(frozen=True)
class ToolUse:
    """tools: those that the model sees. choice: as `Conversation.tool_choice`. The echoes are of the reply."""

    tools: tuple[Tool, ...]
    choice: Any
    tools_echo: tuple[FunctionTool, ...]
    choice_echo: ToolChoice


def parse_tool_use(tools: Any, choice: Any) -> ToolUse:
    """Raises BadRequestError, naming the place, such as `tools[1].parameters`."""
    declared = [_declared(given, f"tools[{i}]") for i, given in enumerate(listed(tools, "tools"))]
    with as_api_errors():
        every = parse_list(declared, flat=True)
        chosen, left = parse_choice(choice, every, flat=True)
    echo = tuple(
        FunctionTool(
            type="function",
            name=tool.name,
            description=tool.description,
            parameters=None if tool.parameters is None else dict(tool.parameters),
            strict=tool.strict,
        )
        for tool in every
    )
    choice_echo: ToolChoice
    if isinstance(chosen, Tool):
        choice_echo = ToolChoiceFunction(type="function", name=chosen.name)
    elif isinstance(choice, str):
        choice_echo = chosen
    else:
        references: list[dict[str, object]] = [{"type": "function", "name": tool.name} for tool in left]
        choice_echo = ToolChoiceAllowed(type="allowed_tools", mode=chosen, tools=references)  # type: ignore[arg-type]
    return ToolUse(left, chosen, echo, choice_echo)


def _declared(given: Any, place: str) -> dict[str, Any]:
    """A tool's fields without those that ask for nothing."""
    fields = mapping(given, place)
    if "function" in fields:
        raise invalid(place, "nests its fields under 'function' as chat does: here they lie beside 'type'")
    for key, neutral in _NEUTRAL.items():
        if fields.pop(key, neutral) != neutral:
            raise refused(f"{place}.{key}", "the model sees every tool, and its calls are the program's to make")
    if "output_schema" in fields:
        raise refused(f"{place}.output_schema", "outputs are given to the model as they are")
    return fields


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
