"""Llama 3.1's, 3.2's and 3.3's calls: a JSON object that is the whole answer, or comes after `<|python_tag|>`.

    {"name": "get_weather", "parameters": {"city": "Oslo"}}
    <|python_tag|>{"name": "get_weather", "parameters": {"city": "Oslo"}}
    <|python_tag|>brave_search.call(query="weather in Oslo")

Several are separated by semicolons. An object without the tag is a call only where it names a function of the request.
Where the request also says what content must be, it is one only in this very form, and may have been meant as content.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.marked import MarkedFormat, Turn
from cai_runtime.formats.parsing.grammar import Rules, json_call_rule, literal
from cai_runtime.formats.parsing.json_call import json_calls, sole_calls
from cai_runtime.formats.parsing.python_call import python_call
from cai_runtime.formats.parsing.stream import Parsing, Stream

KEY = "parameters"


class Llama3Format(MarkedFormat):
    name = "llama3"
    openers: tuple[str, ...] = ("<|python_tag|>",)
    opened_by_tokens: ClassVar[bool] = True  # as in all published tokenizers; as text they would be a user's

    def bare_calls(self, turn: Turn, stream: Stream) -> Parsing[None]:
        if (yield from stream.peek()) == "{":
            bound = turn.content_is_bound
            yield from stream.calls(
                "", sole_calls(stream, turn.tools, KEY) if bound else json_calls(stream, turn.tools)
            )

    def call(self, turn: Turn, stream: Stream, opener: str) -> Parsing[None]:
        if (yield from stream.peek()) in ("{", "["):
            yield from json_calls(stream)
        else:
            yield from python_call(stream, suffix=".call")

    def call_rule(self, rules: Rules, tool: Tool, arguments: str) -> str:
        return json_call_rule(tool, arguments, key=KEY)

    def calls_rule(self, rules: Rules, call: str, several: bool) -> str:
        return f"{call} ({literal('; ')} {call})*" if several else call

    def free_rule(self, rules: Rules, call: str, arguments: Mapping[str, str], several: bool) -> str:
        """A text that begins with a bracket is calls."""
        calls = rules.add("calls", self.calls_rule(rules, call, several))
        text = rules.add("text", r"/\s*[^\s{\[](?s:.*)/")
        tagged = "".join(f" | {text}? {rules.marker(opener)} {calls}" for opener in self.openers)
        return f"{text}? | {calls}{tagged}"
