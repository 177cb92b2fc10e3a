"""Mistral's calls, in both of its forms: a list of JSON objects, and a marker for each call's name and arguments.

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "D681PevKs"}]
    [TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}
    [TOOL_CALLS]get_weather[CALL_ID]D681PevKs[ARGS]{"city": "Oslo"}

The first is that of its tokenizers up to version 7, the second is of version 11 on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.marked import MarkedFormat, Turn
from cai_runtime.formats.parsing.grammar import Rules, json_call_rule, literal
from cai_runtime.formats.parsing.json_call import json_arguments, json_calls
from cai_runtime.formats.parsing.malformed import Malformed
from cai_runtime.formats.parsing.stream import Parsing, Stream

CALL_ID, ARGS = "[CALL_ID]", "[ARGS]"
_NAME = re.compile(r"[\w.-]{1,256}")


class MistralFormat(MarkedFormat):
    name = "mistral"
    openers: tuple[str, ...] = ("[TOOL_CALLS]",)
    inner = (CALL_ID, ARGS)

    def call(self, turn: Turn, stream: Stream, opener: str) -> Parsing[None]:
        if (yield from stream.peek()) in ("[", "{"):
            yield from json_calls(stream)
            return
        name, marker = yield from stream.captured(CALL_ID, ARGS, "{")
        call_id = None
        if marker == CALL_ID:
            call_id, marker = yield from stream.captured(ARGS, "{")
        if marker == "{":
            stream.unread("{")
        if not _NAME.fullmatch(name.strip()):
            raise Malformed("no name of a function")
        yield from json_arguments(stream, name.strip(), call_id and call_id.strip())
        stream.end_call()

    def call_rule(self, rules: Rules, tool: Tool, arguments: str) -> str:
        if self.markers.is_token(ARGS):
            return f"{literal(tool.name)} {rules.marker(ARGS)} {arguments}"
        return json_call_rule(tool, arguments)

    def calls_rule(self, rules: Rules, call: str, several: bool) -> str:
        return f"{rules.marker(self.openers[0])} {self._rest_rule(rules, call, several)}"

    def free_rule(self, rules: Rules, call: str, arguments: Mapping[str, str], several: bool) -> str:
        return self.led_rule(rules, self._rest_rule(rules, call, several))

    def _rest_rule(self, rules: Rules, call: str, several: bool) -> str:
        """What follows the first opener."""
        if self.markers.is_token(ARGS):
            return f"{call} ({rules.marker(self.openers[0])} {call})*" if several else call
        more = f"({literal(', ')} {call})*" if several else ""
        return f"{literal('[')} {call} {more} {literal(']')}"
