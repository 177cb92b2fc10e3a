"""Hermes' and Qwen's calls: JSON objects in tags.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

Written by Qwen 2.5, Qwen 3, Hermes 2 Pro and many others.
"""

from __future__ import annotations

import json

from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.marked import MarkedFormat, Turn
from cai_runtime.formats.parsing.grammar import Rules, literal
from cai_runtime.formats.parsing.json_call import json_calls
from cai_runtime.formats.parsing.stream import Parsing, Stream

TAIL = "}\n"


def head(tool: Tool) -> str:
    """What is before a call's arguments."""
    return f'\n{{"name": {json.dumps(tool.name)}, "arguments": '


class HermesFormat(MarkedFormat):
    name = "hermes"
    openers = ("<tool_call>",)
    closers = ("</tool_call>",)

    def call(self, turn: Turn, stream: Stream, opener: str) -> Parsing[None]:
        yield from json_calls(stream)

    def call_rule(self, rules: Rules, tool: Tool, arguments: str) -> str:
        return f"{literal(head(tool))} {arguments} {literal(TAIL)} {rules.marker(self.closers[0])}"


class GenericFormat(HermesFormat):
    """For templates that take no tools: the system message describes them, and asks for calls of this form."""

    name = "generic"
    native_tools = False
