"""GLM's calls: the function's name, then keys and values in elements (GLM 4.5 on).

    <tool_call>get_weather
    <arg_key>city</arg_key>
    <arg_value>Oslo</arg_value>
    </tool_call>

A string is written as it is, everything else as JSON: its type is that of the function's schema.
"""

from __future__ import annotations

import re
from typing import ClassVar

from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.marked import MarkedFormat, Turn
from cai_runtime.formats.parsing.grammar import Rules, literal
from cai_runtime.formats.parsing.json_call import json_calls
from cai_runtime.formats.parsing.malformed import Malformed
from cai_runtime.formats.parsing.member_rules import NEWLINE, tagged_arguments
from cai_runtime.formats.parsing.stream import Parsing, Stream
from cai_runtime.formats.parsing.typed import Members

KEY, END_KEY, VALUE, END_VALUE = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
END = "</tool_call>"
_NAME = re.compile(r"[\w.-]{1,256}")


class GlmFormat(MarkedFormat):
    name = "glm"
    openers: tuple[str, ...] = ("<tool_call>",)
    closers: ClassVar[tuple[str, ...]] = (END,)
    inner = (KEY, END_KEY, VALUE, END_VALUE)

    def call(self, turn: Turn, stream: Stream, opener: str) -> Parsing[None]:
        if (yield from stream.peek()) == "{":
            yield from json_calls(stream)  # its siblings'
            return
        name, marker = yield from stream.captured(KEY, END)
        name = name.strip()
        if not _NAME.fullmatch(name):
            raise Malformed("no name of a function")
        members = Members(stream, name, turn.tools.get(name))
        while marker == KEY:
            key, _ = yield from stream.captured(END_KEY)
            if (yield from stream.begins((VALUE,))) is None:
                raise Malformed("a key without a value")
            value, _ = yield from stream.captured(END_VALUE)
            members.add(key.strip(), value)
            marker = (yield from stream.begins((KEY, END))) or "?"
        if marker != END:
            raise Malformed("no end of the call")
        members.close()

    def arguments_rule(self, rules: Rules, tool: Tool, place: str) -> str:
        return tagged_arguments(rules, tool, place, lambda name: self._key(rules, literal(name)), END_VALUE)

    def any_arguments_rule(self, rules: Rules, tool: Tool) -> str:
        argument = f"{self._key(rules, '/[^<>]+/')} {rules.until(END_VALUE)} {NEWLINE}"
        return rules.add("any_arguments", f"({argument})*")

    def call_rule(self, rules: Rules, tool: Tool, arguments: str) -> str:
        return f"{literal(tool.name)} {NEWLINE} {arguments} {rules.marker(END)}"

    def _key(self, rules: Rules, name: str) -> str:
        return f"{rules.marker(KEY)} {name} {rules.marker(END_KEY)} {NEWLINE} {rules.marker(VALUE)}"
