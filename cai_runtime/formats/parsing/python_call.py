"""Calls in Python's syntax with keyword arguments: `[get_weather(city="Oslo", days=3), get_time()]`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.parsing.malformed import Malformed
from cai_runtime.formats.parsing.python_literal import python_value
from cai_runtime.formats.parsing.stream import Parsing, Stream
from cai_runtime.formats.parsing.typed import Members

_NAME = re.compile(r"[^\W\d][\w.-]*")
# Models write the names of a schema as they are, such as user-id, whether Python takes them or not.
ARGUMENT_NAME = re.compile(r"""[^\s"'()\[\]{},=](?:[^"'()\[\]{},=\n]*[^\s"'()\[\]{},=])?""")


def python_calls(stream: Stream, tools: Mapping[str, Tool], *, or_json: bool = True) -> Parsing[None]:
    """A list of calls. A call of another function than these is Malformed. or_json: a JSON list of calls is read, too."""
    from cai_runtime.formats.parsing.json_call import json_calls

    yield from stream.expect_visible("[")
    if or_json and (yield from stream.peek()) == "{":
        yield from json_calls(stream, tools)
        return
    separator = ","
    while separator == ",":
        yield from python_call(stream, tools)
        separator = yield from stream.visible()
    if separator != "]":
        raise Malformed(f"{separator!r} after a call")


def python_call(stream: Stream, tools: Mapping[str, Tool] | None = None, suffix: str = "") -> Parsing[None]:
    """One call. suffix: what is between the function's name and the bracket."""
    name = yield from _up_to(stream, "(")
    if not name.endswith(suffix):
        raise Malformed(f"{name} for a call")
    name = name.removesuffix(suffix)
    if not (_NAME.fullmatch(name) if tools is None else name in tools):
        raise Malformed(f"a call of {name}, which is no function of this request")
    members = Members(stream, name, None)
    separator = ","
    while separator == ",":
        if (yield from stream.peek()) != ")":
            members.add_json(*(yield from _argument(stream)))
        separator = yield from stream.visible()
    members.close()


def _argument(stream: Stream) -> Parsing[tuple[str, str]]:
    """(name, value as JSON). Stays before the comma or bracket that ends it."""
    name = yield from _up_to(stream, "=")
    if not ARGUMENT_NAME.fullmatch(name):
        raise Malformed(f"{name!r} for an argument's name")
    text, quote, depth = "", "", 0
    while True:
        char = yield from stream.char()
        if not quote and not depth and char in ",)":
            stream.unread(char)
            return name, python_value(text)
        text += char
        if quote:
            if char == "\\":
                text += yield from stream.char()
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
            if depth < 0:
                raise Malformed("a bracket too many")


def _up_to(stream: Stream, end: str) -> Parsing[str]:
    text = ""
    while (char := (yield from stream.char())) != end:
        text += char
        if len(text) > 256:
            raise Malformed("no name")
    return text.strip()
