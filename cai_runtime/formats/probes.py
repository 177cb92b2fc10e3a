"""Asks a chat template what it takes: it is run on small conversations, and their words are looked for in its text.

A template is probed once. What concerns tools and thoughts is asked when a request first needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from cai_runtime.formats.history import CallForm, ContentForm, TurnForm, declared, turns_of
from cai_runtime.formats.messages import ROLES, Call, Message
from cai_runtime.formats.program import TemplateProgram

if TYPE_CHECKING:
    from cai_runtime.formats.conversation import Tool

EFFORTS = ("none", "low", "medium", "high", "xhigh", "max")
# Of templates that write whatever level they are given: those of the models known to have such a template.
PLAIN_EFFORTS = ("low", "medium", "high")
SWITCHES = ("enable_thinking", "thinking")  # variables that turn the thought on and off
EFFORT_VARIABLES = ("reasoning_effort", "reasoning_strength")
THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
_WORDS = ("cabbage", "lettuce")  # of contents and declarations; arguments and thoughts have words of their own
_THOUGHT = "parsnip"
_NUMBER = "beets"  # an argument
_HELLO = Message("user", "Hello")
_SPOKEN = Message("assistant", "Yes")


@dataclass(frozen=True)
class ReasoningForm:
    """How a template is told to reason.

    switch: the variable that turns the thought on or off. by_default: whether it is on without. effort: the variable of
    the level. levels: those of EFFORTS that the template takes. always: whether the model thinks, and can't be told not to.
    """

    switch: str | None = None
    by_default: bool = False
    effort: str | None = None
    levels: tuple[str, ...] = ()
    always: bool = False


@dataclass(frozen=True)
class CallSample:
    """A call as a template writes it. tool, arguments: the function and what it is called with. prompt: the text before
    the answer. answer: the text of the answer, and what follows it up to the call's result."""

    tool: Tool
    arguments: Mapping[str, Any]
    prompt: str
    answer: str


class TemplateForms:
    """What one template takes. Not for several threads at once."""

    def __init__(self, program: TemplateProgram):
        self._program = program
        hello = turns_of([_HELLO], TurnForm({}))
        # What it is given for tools where there are none: some templates loop over them unasked.
        fails = program.attempt(hello) is None and program.attempt(hello, []) is not None
        self.no_tools: list[Any] | None = [] if fails else None
        self._content: dict[str, ContentForm] = dict.fromkeys(ROLES, "text")
        for role in ("user", "system", "assistant"):  # user turns first: they surround the others
            self._content[role] = self._content_form(role, TurnForm(self._content))
        self._content["developer"] = self._content["system"]

    @cached_property
    def turns(self) -> TurnForm:
        """How it takes turns; of a template that takes no calls, those of plain text."""
        calls = self._calls or CallForm()
        form = TurnForm(self._content, calls, self._takes_role("developer") and "developer" in self._program.literals)
        if self._calls:
            form = replace(form, content={**self._content, "tool": self._content_form("tool", form)})
        form = replace(form, reasoning=next((f for f in THOUGHT_FIELDS if self._shows_thought(f, form)), None))
        if form.reasoning and self._calls:
            thoughtful = Message("assistant", "Wait", calls=(_call("find"),), reasoning="Hm")
            form = replace(form, both=self._text([_HELLO, thoughtful, _result("find")], form) is not None)
        return form

    @cached_property
    def system(self) -> bool:
        """Whether it takes a message of the system."""
        return self._takes_role("system")

    @cached_property
    def tools(self) -> Literal["native", "generic"]:
        """native: it shows tools, calls and their results. generic: it does not show all of them, so that they have to be
        put to it as text."""
        return "native" if self._calls and self._declares else "generic"

    @property
    def tools_need_system(self) -> bool:
        """Whether it shows tools only in a system message, so that one without text has to be there."""
        return self._declares == "system"

    @cached_property
    def whole_tools(self) -> bool:
        """Whether a tool needs a description and parameters."""
        system = "" if self.tools_need_system else None
        return self._declaration(described=False, whole=False, system=system) is None

    @cached_property
    def call_sample(self) -> CallSample | None:
        """A call as it writes it; None if it takes no calls."""
        if self.tools == "generic":
            return None
        from cai_runtime.formats.conversation import Tool

        properties = {
            key: {"type": "string" if isinstance(value, str) else "integer", "description": key}
            for key, value in _arguments("find").items()
        }
        tool = Tool("find", "Finds it.", {"type": "object", "properties": properties})
        start = [Message("system", "")] if self.tools_need_system else []
        prompt, whole = (
            self._text([*start, *messages], self.turns, declared([tool], whole=True)) or ""
            for messages in ([_HELLO], [_HELLO, _calling("find"), _result("find")])
        )
        pairs = enumerate(zip(prompt, whole, strict=False))
        at = next((i for i, (one, other) in pairs if one != other), min(len(prompt), len(whole)))
        opened = max(prompt.rfind(char, 0, at) for char in "<[")
        if opened > max(prompt.rfind(char, 0, at) for char in ">]"):
            at = opened  # both begin a marker here, and not the same
        return CallSample(tool, _arguments("find"), prompt[:at], whole[at:].partition(_result("find").text)[0])

    @cached_property
    def reasoning(self) -> ReasoningForm:
        """What variables it has for the thought."""
        turns = turns_of([_HELLO], self.turns)
        plain = self._attempt(turns)
        switch = next((name for name in SWITCHES if self._switches(name)), None)
        effort = next((name for name in EFFORT_VARIABLES if name in self._program.reads), None)
        levels = self._levels(effort) if effort else ()
        by_default = switch is not None and plain == self._attempt(turns, **{switch: True})
        opened = any(marker in (plain or "")[-40:] for marker in ("<think>", "[THINK]"))
        always = switch is None and bool(levels or self.turns.reasoning or opened)
        if switch is not None:
            levels = ("none", *levels)
        return ReasoningForm(switch, by_default, effort, levels, always)

    def _text(self, messages: Sequence[Message], form: TurnForm, tools: Any = None) -> str | None:
        return self._attempt(turns_of(messages, form), tools)

    def _attempt(self, turns: Sequence[Mapping[str, Any]], tools: Any = None, **variables: Any) -> str | None:
        return self._program.attempt(turns, self.no_tools if tools is None else tools, **variables)

    def _content_form(self, role: str, form: TurnForm) -> ContentForm:
        """Which kind of content it takes for a role."""
        taken: list[ContentForm] = []
        given: Mapping[ContentForm, Any] = {"text": " ".join(_WORDS), "parts": _WORDS, "part": " ".join(_WORDS)}
        for kind, words in given.items():
            asked = Message(role, words, call_id=_id("find") if role == "tool" else None)
            conversation = {
                "system": [asked, _HELLO],
                "user": [asked],
                "assistant": [_HELLO, asked, _HELLO],
                "tool": [_HELLO, _calling("find"), asked],
            }[role]
            text = self._text(conversation, replace(form, content={**form.content, role: kind}))
            # A template that prints the list holds the texts too, inside Python's or JSON's spelling of it.
            if text and all(word in text for word in _WORDS) and not ("'type'" in text or '"type"' in text):
                taken.append(kind)
        if "text" in taken and "parts" in taken:
            return "both"
        return taken[0] if taken else "text"

    def _takes_role(self, role: str) -> bool:
        text = self._text([Message(role, _WORDS[0]), _HELLO], TurnForm(self._content, developer=True))
        return text is not None and _WORDS[0] in text

    @cached_property
    def _calls(self) -> CallForm | None:
        """How it takes calls and their results; None if it does not show them."""
        for ids, arguments, absent in product(("any", "short"), ("mapping", "text"), (False, True)):
            form = CallForm(arguments, ids, parallel=True, absent=absent)  # type: ignore[arg-type]
            if self._shows_calls(("find",), form) and (ids == "short" or self._shows_calls(("f",), form)):
                # Of one call alone: a template may take the first of several, in silence.
                parallel = self._shows_calls(("find", "look"), form)
                form = replace(form, parallel=parallel)
                if not absent and self._shows_calls(("find",), none := replace(form, absent=True)):
                    form = none
                return form
        return None

    def _shows_calls(self, names: Sequence[str], form: CallForm) -> bool:
        messages = [_HELLO, _calling(*names), *map(_result, names), _SPOKEN, _HELLO]
        text = self._text(messages, TurnForm(self._content, form))
        if text is None or "'turnip" in text:  # a mapping as Python prints it
            return False
        if form.absent and "None" in text and "None" not in self._program.literals:
            return False
        if form.arguments == "text" and '{"turnip' not in text:  # JSON in JSON
            return False
        words = [word for name in names for word in (name, f"turnip_{name}", f"radish_{name}", _result(name).text)]
        return all(word in text for word in (*words, _NUMBER))

    @cached_property
    def _declares(self) -> Literal["alone", "system"] | None:
        """Where it shows tools: "alone", in every conversation; "system", in those with a system message, be it without
        text. None: it does not, or loses them where there is one."""
        if self.system and not self._shows_tools("Be kind."):
            return None
        if self._shows_tools(None):
            return "alone"
        return "system" if self.system and self._shows_tools("") else None

    def _shows_tools(self, system: str | None) -> bool:
        return any(self._declaration(described=True, whole=whole, system=system) is not None for whole in (False, True))

    def _declaration(self, *, described: bool, whole: bool, system: str | None = None) -> str | None:
        """The text of a conversation with a tool; None if the template fails or does not show it. system: a message of
        the system that is there."""
        from cai_runtime.formats.conversation import Tool

        parameters = {"type": "object", "properties": {_WORDS[1]: {"type": "string", "description": "of a garden"}}}
        tool = Tool("find_it", _WORDS[0], parameters) if described else Tool("find_it")
        messages = [_HELLO] if system is None else [Message("system", system), _HELLO]
        text = self._text(messages, TurnForm(self._content), declared([tool], whole=whole))
        words = ("find_it", *_WORDS) if described else ("find_it",)
        return text if text is not None and all(word in text for word in words) else None

    def _shows_thought(self, field: str, form: TurnForm) -> bool:
        form = replace(form, reasoning=field)
        return any(_THOUGHT in (self._text(messages, form) or "") for messages in self._thoughtful())

    def _thoughtful(self) -> Iterator[list[Message]]:
        """Conversations with a thought: templates leave those out that a user's message follows, or no call does."""
        yield [_HELLO, Message("assistant", "Yes", reasoning=_THOUGHT)]
        yield [_HELLO, Message("assistant", "Yes", reasoning=_THOUGHT), _HELLO]
        if self._calls:
            yield [_HELLO, Message("assistant", None, calls=(_call("find"),), reasoning=_THOUGHT), _result("find")]

    def _switches(self, name: str) -> bool:
        if name not in self._program.reads:
            return False
        turns = turns_of([_HELLO], self.turns)
        on, off = (self._attempt(turns, **{name: value}) for value in (True, False))
        return on is not None and off is not None and on != off

    def _levels(self, name: str) -> tuple[str, ...]:
        turns = turns_of([_HELLO], self.turns)
        unknown = self._attempt(turns, **{name: _WORDS[0]})
        if unknown is not None and _WORDS[0] in unknown:
            return PLAIN_EFFORTS
        found = {level: self._attempt(turns, **{name: level}) for level in EFFORTS}
        return tuple(level for level, text in found.items() if text is not None and text != unknown)


def _id(name: str) -> str:
    """As long as OpenAI's are; of a name of one letter, short."""
    return f"call_{name:_<24}" if len(name) > 1 else name


def _arguments(name: str) -> dict[str, Any]:
    return {f"turnip_{name}": f"radish_{name}", _NUMBER: 7}


def _call(name: str) -> Call:
    return Call(_id(name), name, json.dumps(_arguments(name)))


def _calling(*names: str) -> Message:
    return Message("assistant", None, calls=tuple(map(_call, names)))


def _result(name: str) -> Message:
    return Message("tool", f"{name} did", call_id=_id(name))
