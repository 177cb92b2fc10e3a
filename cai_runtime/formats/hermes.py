"""Hermes' and Qwen's calls: JSON objects in tags.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

Written by Qwen 2.5, Qwen 3, Hermes 2 Pro and many others. Small models leave the tags out, or write a code fence in their
place: such an object is a call where content would begin and where it names a function of the request.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import ClassVar

from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.marked import MarkedFormat, Turn
from cai_runtime.formats.parsing.grammar import Rules, json_call_rule
from cai_runtime.formats.parsing.json_call import json_call, json_calls
from cai_runtime.formats.parsing.stream import Parsing, Stream


def fenced_call(stream: Stream, names: Container[str]) -> Parsing[None]:
    """A bare call in a code fence."""
    yield from stream.expect_visible("```")
    if (yield from stream.peek()) == "j":
        yield from stream.expect("json")
    yield from json_call(stream, names, name_first=True)
    yield from stream.expect_visible("```")


class HermesFormat(MarkedFormat):
    name = "hermes"
    openers: tuple[str, ...] = ("<tool_call>",)
    closers: ClassVar[tuple[str, ...]] = ("</tool_call>",)

    def call(self, turn: Turn, stream: Stream, opener: str) -> Parsing[None]:
        yield from json_calls(stream)

    def bare_calls(self, turn: Turn, stream: Stream) -> Parsing[None]:
        if turn.conversation.answer is not None:
            return
        told = None
        while told != stream.writer.num_calls:
            told = stream.writer.num_calls
            start = yield from stream.peek()
            if start == "{":
                yield from stream.calls("", json_call(stream, turn.tools, name_first=True))
            elif start == "`":
                yield from stream.calls("", fenced_call(stream, turn.tools))

    def call_rule(self, rules: Rules, tool: Tool, arguments: str) -> str:
        call = json_call_rule(tool, arguments, layout="\n")
        return f"{call} {rules.marker(self.closers[0])}"

    def free_rule(self, rules: Rules, call: str, arguments: Mapping[str, str], several: bool) -> str:
        """Content does not begin like a bare call, so that these are held to the grammar, too."""
        opener, blank = self.openers[0], r"[ \n]{0,8}"
        objects, fenced = [], []
        for name, rule in arguments.items():
            start = rf'\{{{blank}"name"{blank}:{blank}"{name}"{blank},{blank}"arguments"{blank}:{blank}'
            rest = rf"{rule} /{blank}\}}"
            objects.append(f"/{blank}{start}/ {rest}/")
            fenced.append(f"/{blank}```(json)?{blank}{start}/ {rest}{blank}```/")
        bare = rules.add("bare", " | ".join(objects + fenced))
        others = rf'\s*(```(json)?\s*)?\{{\s*"name"\s*:\s*"({"|".join(arguments)})"(?s:.*)'
        opened, text = f"{rules.until(opener, others)} {call}", rules.text_without(others)
        return f"({opened} | {bare})* {text}?" if several else f"{opened} | {bare} | {text}?"


class GenericFormat(HermesFormat):
    """For templates that take no tools: the system message describes them, and asks for calls of this form."""

    name = "generic"
    native_tools = False


MarkedFormat.generic_kind = GenericFormat
