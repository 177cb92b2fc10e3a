"""Qwen3-Coder's, Qwen 3.5's and Nemotron 3's calls: elements for the function and its parameters.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

A value is text: its type is that of the function's schema. One line break at its beginning and end is layout.
"""

from __future__ import annotations

from typing import ClassVar

from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.marked import MarkedFormat, Turn
from cai_runtime.formats.parsing.grammar import Rules, literal
from cai_runtime.formats.parsing.json_call import json_calls
from cai_runtime.formats.parsing.member_rules import NEWLINE, tagged_arguments
from cai_runtime.formats.parsing.stream import Parsing, Stream
from cai_runtime.formats.parsing.typed import Members


class QwenCoderFormat(MarkedFormat):
    name = "qwen_coder"
    openers: tuple[str, ...] = ("<tool_call>",)
    closers: ClassVar[tuple[str, ...]] = ("</tool_call>",)

    def call(self, turn: Turn, stream: Stream, opener: str) -> Parsing[None]:
        if (yield from stream.peek()) != "<":
            yield from json_calls(stream)  # its siblings'
            return
        while (yield from stream.peek()) == "<":
            yield from self._function(turn, stream)

    def _function(self, turn: Turn, stream: Stream) -> Parsing[None]:
        yield from stream.expect_visible("<function=")
        name, _ = yield from stream.captured(">")
        members = Members(stream, name.strip(), turn.tools.get(name.strip()))
        while True:
            yield from stream.expect_visible("<")
            if (yield from stream.peek()) == "/":
                yield from stream.expect("/function>")
                members.close()
                return
            yield from stream.expect("parameter=")
            key, _ = yield from stream.captured(">")
            value, _ = yield from stream.captured("</parameter>")
            members.add(key.strip(), value.removeprefix("\n").removesuffix("\n"))

    def arguments_rule(self, rules: Rules, tool: Tool, place: str) -> str:
        return tagged_arguments(
            rules, tool, place, lambda name: literal(f"<parameter={name}>\n"), "</parameter>", layout="\n"
        )

    def any_arguments_rule(self, rules: Rules, tool: Tool) -> str:
        end = literal(">\n")
        head = rules.add("head", f"{literal('<parameter=')} /[^>\\n]+/ {end}")
        return rules.add("any_arguments", f"({head} {rules.until('</parameter>')} {NEWLINE})*")

    def call_rule(self, rules: Rules, tool: Tool, arguments: str) -> str:
        begin, end = f"\n<function={tool.name}>\n", "</function>\n"
        return f"{literal(begin)} {arguments} {literal(end)} {rules.marker(self.closers[0])}"
