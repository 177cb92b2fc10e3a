"""Brings a conversation into the shape that a chat template takes: the turns and tools that it is given.

A template that takes no tools gets them as text (`in_words`): their declarations in the system's message, calls and
their results between `<tool_call>` and `<tool_response>` tags.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from cai_runtime.formats.messages import Call, Message
from cai_runtime.formats.traced_text import TracedText, content, joined, own, traced

if TYPE_CHECKING:
    from cai_runtime.formats.conversation import Tool

ContentForm = Literal["text", "parts", "part", "both"]
_NO_PARAMETERS = {"type": "object", "properties": {}}
_SHORT_ID = 9  # letters and digits of the call ids that Mistral's templates take
_PROMPT = (
    "You can call functions. To call one, write its name and its arguments, a JSON object, like this:\n"
    "<tool_call>\n"
    '{"name": "function name", "arguments": {"parameter": "value"}}\n'
    "</tool_call>\n"
    "Then stop: the result comes back between <tool_response> and </tool_response>. Call a function only if the answer "
    "needs it. These are the functions, each with the JSON schema of its arguments:"
)


@dataclass(frozen=True)
class CallForm:
    """How a template takes calls and results.

    arguments: as a mapping, or as JSON text. ids: as they are, or of 9 letters and digits. parallel: whether a message may
    hold several calls. absent: whether a message that is only calls may have the content None.
    """

    arguments: Literal["mapping", "text"] = "mapping"
    ids: Literal["any", "short"] = "any"
    parallel: bool = True
    absent: bool = True


@dataclass(frozen=True)
class TurnForm:
    """How a template takes turns.

    content: by role; "text": parts are joined with a line break, "parts": a list of `{"type": "text", "text": ...}`,
    "part": such a list of one, "both": text or parts, as the caller gave. developer: whether it knows that role; else such
    a message is the system's. reasoning: the field of an assistant's thought, if it takes one. both: whether it takes
    content beside thought and calls.
    """

    content: dict[str, ContentForm]
    calls: CallForm = CallForm()
    developer: bool = False
    reasoning: str | None = None
    both: bool = True


def turns_of(messages: Sequence[Message], form: TurnForm) -> list[dict[str, Any]]:
    """The turns that a template sees. Roles are the template's own text, all else is a caller's.

    Results come in the order of their calls. Where a message may hold one call alone, each call is a message, which its
    result follows.
    """
    turns: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        if not message.calls:
            turns.append(_turn(message, form))
            continue
        results = {}
        while at < len(messages) and messages[at].role == "tool":
            results[messages[at].call_id] = messages[at]
            at += 1
        groups = [message.calls] if form.calls.parallel else [(call,) for call in message.calls]
        for i, group in enumerate(groups):
            first = message if i == 0 else replace(message, content=None, reasoning=None)
            turns.append(_turn(replace(first, calls=group), form))
            turns += [_turn(results[call.id], form, call) for call in group if call.id in results]
    return turns


def _turn(message: Message, form: TurnForm, answers: Call | None = None) -> dict[str, Any]:
    """answers: the call that the message is the result of."""
    role = message.role if message.role != "developer" or form.developer else "system"
    turn: dict[str, Any] = {"role": own(role)}
    reasoning = message.reasoning if form.reasoning else None
    if message.calls and reasoning and message.text and not form.both:
        reasoning, message = f"{reasoning}\n\n{message.text}", replace(message, content="")
    turn["content"] = _content(message, form)
    if name := message.name or (answers.name if answers else None):
        turn["name"] = content(name)
    if message.calls:
        turn["tool_calls"] = [_call(call, form.calls) for call in message.calls]
    if message.call_id is not None:
        turn["tool_call_id"] = content(_id(message.call_id, form.calls))
    if reasoning and form.reasoning:
        turn[form.reasoning] = content(reasoning)
    return turn


def _content(message: Message, form: TurnForm) -> Any:
    takes = form.content.get(message.role, "text")
    if message.content is None:
        return None if form.calls.absent and message.calls else content("")
    if takes == "part":
        return [{"type": own("text"), "text": traced(message.text)}]
    if takes == "parts" or (takes == "both" and isinstance(message.content, tuple)):
        parts = message.content if isinstance(message.content, tuple) else (message.content,)
        return [{"type": own("text"), "text": traced(part)} for part in parts]
    return traced(message.text)


def _call(call: Call, form: CallForm) -> dict[str, Any]:
    arguments = content(call.arguments) if form.arguments == "text" else traced(json.loads(call.arguments))
    return {
        "id": content(_id(call.id, form)),
        "type": own("function"),
        "function": {"name": content(call.name), "arguments": arguments},
    }


def _id(call_id: str, form: CallForm) -> str:
    if form.ids == "any" or (len(call_id) == _SHORT_ID and call_id.isascii() and call_id.isalnum()):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:_SHORT_ID]


def uses_tools(messages: Iterable[Message], tools: Collection[Tool]) -> bool:
    """Whether a conversation has tools, calls or results of calls."""
    return bool(tools) or any(message.calls or message.role == "tool" for message in messages)


def declared(tools: Iterable[Tool], *, whole: bool = False) -> list[dict[str, Any]]:
    """The tools as templates take them. whole: with an empty description and no parameters where there are none."""
    return [{"type": content("function"), "function": _function(tool, whole)} for tool in tools]


def _function(tool: Tool, whole: bool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None or whole:
        function["description"] = tool.description or ""
    if tool.parameters is not None or whole:
        function["parameters"] = _NO_PARAMETERS if tool.parameters is None else tool.parameters
    found: dict[str, Any] = traced(function)
    return found


def in_words(messages: Sequence[Message], tools: Sequence[Tool], *, system: bool) -> list[Message]:
    """The same conversation without tools, calls and results: all of them are text.

    system: whether the template takes a system message; else the declarations are in the first user's message.
    """
    found: list[Message] = []
    for message in messages:
        after_results = bool(found) and found[-1].call_id is not None
        if message.role == "tool":
            block = joined((own("<tool_response>\n"), content(message.text), own("\n</tool_response>")))
            message = Message("user", block, call_id=message.call_id)
        elif message.calls:
            blocks = [_written(call) for call in message.calls]
            text = own("\n").join([content(message.text), *blocks] if message.text else blocks)
            message = replace(message, content=text, calls=())
        if after_results and message.role == "user":  # templates want the roles to take turns
            merged = joined((found[-1].text, own("\n"), traced(message.text)))
            found[-1] = replace(found[-1], content=merged, call_id=message.call_id)
        else:
            found.append(message)
    found = [replace(message, call_id=None) for message in found]
    return _with_prompt(found, tools, system) if tools else found


def _written(call: Call) -> TracedText:
    value = {"name": call.name, "arguments": json.loads(call.arguments)}
    return joined((own("<tool_call>\n"), content(json.dumps(value, ensure_ascii=False)), own("\n</tool_call>")))


def _with_prompt(messages: list[Message], tools: Sequence[Tool], system: bool) -> list[Message]:
    lines = [content(json.dumps(_function(tool, True), ensure_ascii=False)) for tool in tools]
    prompt = own("\n").join([own(_PROMPT), *lines])
    roles = ("system", "developer") if system else ("user",)
    at = next((i for i, message in enumerate(messages) if message.role in roles), None)
    if at is None:
        return [Message("system" if system else "user", prompt), *messages]
    given = traced(messages[at].text)
    pieces = (given, own("\n\n"), prompt) if system else (prompt, own("\n\n"), given)
    return [*messages[:at], replace(messages[at], content=joined(pieces)), *messages[at + 1 :]]
