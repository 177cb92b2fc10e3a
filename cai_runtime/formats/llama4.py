"""Llama 4's calls: a Python list of calls with keyword arguments, as the whole answer or between markers.

    [get_weather(city="Oslo", days=3), get_time()]
    <|python_start|>Let me see.<|python_end|>{"name": "get_time", "parameters": {}}

A list without markers holds calls only where it names functions of the request. JSON objects, as Llama 3 writes them, are
read too: Llama 4's own chat template writes them after the markers, and content between. LFM 2 writes lists between markers
of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.llama3 import Llama3Format
from cai_runtime.formats.marked import Turn
from cai_runtime.formats.parsing.grammar import Rules, enforced, literal
from cai_runtime.formats.parsing.json_call import json_calls
from cai_runtime.formats.parsing.malformed import Malformed
from cai_runtime.formats.parsing.member_rules import keywords, members_of
from cai_runtime.formats.parsing.python_call import ARGUMENT_NAME, python_calls
from cai_runtime.formats.parsing.stream import Parsing, Stream

PYTHON_START = "<|python_start|>"


class Llama4Format(Llama3Format):
    name = "llama4"
    openers: tuple[str, ...] = (PYTHON_START, "<|python_tag|>")
    closers: ClassVar[tuple[str, ...]] = ("<|python_end|>",)

    def bare_calls(self, turn: Turn, stream: Stream) -> Parsing[None]:
        if (yield from stream.peek()) in (("[",) if turn.content_is_bound else ("[", "{")):
            yield from stream.calls("", self._calls(turn, stream), ())

    def call(self, turn: Turn, stream: Stream, opener: str) -> Parsing[None]:
        if opener == PYTHON_START and (yield from stream.peek()) not in ("[", "{"):
            text, _ = yield from stream.captured(*self.closers)
            if (yield from stream.peek()) != "{":
                raise Malformed("code")
            stream.content_before(text)
        yield from self._calls(turn, stream)

    def _calls(self, turn: Turn, stream: Stream) -> Parsing[None]:
        if (yield from stream.peek()) == "{":
            yield from json_calls(stream, turn.tools)
        else:
            yield from python_calls(stream, turn.tools, or_json=not turn.content_is_bound)

    def arguments_rule(self, rules: Rules, tool: Tool, place: str) -> str:
        members = []
        for member in members_of(tool, place, ARGUMENT_NAME):
            value = rules.add("value", enforced(member.schema, place, member.pointer))
            members.append((f"{literal(member.name + '=')} {value}", member.required))
        return keywords(rules, members)

    def any_arguments_rule(self, rules: Rules, tool: Tool) -> str:
        value = f"/[A-Za-z_][A-Za-z0-9_]*/ {literal('=')} {rules.add('any_value', '%json {}')}"
        return f"({value} ({literal(', ')} {value})*)?"

    def call_rule(self, rules: Rules, tool: Tool, arguments: str) -> str:
        return f"{literal(tool.name + '(')} {arguments} {literal(')')}"

    def calls_rule(self, rules: Rules, call: str, several: bool) -> str:
        return f"{literal('[')} {call} ({literal(', ')} {call})* {literal(']')}" if several else f'"[" {call} "]"'


class Lfm2Format(Llama4Format):
    name = "lfm2"
    openers: tuple[str, ...] = ("<|tool_call_start|>",)
    closers: ClassVar[tuple[str, ...]] = ("<|tool_call_end|>",)
    opened_by_tokens: ClassVar[bool] = False

    def bare_calls(self, turn: Turn, stream: Stream) -> Parsing[None]:
        yield from ()

    def calls_rule(self, rules: Rules, call: str, several: bool) -> str:
        return f"{rules.marker(self.openers[0])} {self._list_rule(rules, call, several)}"

    def free_rule(self, rules: Rules, call: str, arguments: Mapping[str, str], several: bool) -> str:
        return self.led_rule(rules, self._list_rule(rules, call, several))

    def _list_rule(self, rules: Rules, call: str, several: bool) -> str:
        return f"{super().calls_rule(rules, call, several)} {rules.marker(self.closers[0])}"
