"""Calls that are JSON objects: `{"name": "f", "arguments": {"city": "Oslo"}}`."""

from __future__ import annotations

import json
from collections.abc import Callable, Container

from cai_runtime.formats.parsing.json_reader import JsonReader
from cai_runtime.formats.parsing.malformed import Malformed
from cai_runtime.formats.parsing.stream import Parsing, Stream
from cai_runtime.formats.parsing.writer import BLANK

ARGUMENTS = ("arguments", "parameters")


def json_calls(stream: Stream, names: Container[str] | None = None) -> Parsing[None]:
    """One call, or several after one another, or a list of them.

    Args:
        names: the functions that may be called; None: any. A call of another one is Malformed.
    """
    if (yield from stream.peek()) == "[":
        yield from stream.visible()
    while (yield from stream.peek()) == "{":
        yield from json_call(stream, names)
        if (yield from stream.peek()) in (",", ";"):
            yield from stream.visible()
    while (yield from stream.peek()) in ("]", "}"):  # small models write too many
        yield from stream.visible()


def json_call(stream: Stream, names: Container[str] | None = None, *, name_first: bool = False) -> Parsing[None]:
    """One call. Its arguments are told while they are written, once its name is known.

    Args:
        names: as in `json_calls`. name_first: a call whose first key is not its name is Malformed.
    """
    name: str | None = None
    call_id: str | None = None
    arguments: str | None = None  # written before the name
    yield from _read(stream, "{")
    told = False
    separator = "{"
    while separator != "}":
        if (yield from stream.peek()) == "}":
            yield from stream.visible()
            break
        key = yield from _string(stream, plain=names is not None)
        if name_first and name is None and key != "name":
            raise Malformed(f"{key} before a call's name")
        yield from _read(stream, ":")
        if names is not None and key not in ("name", "id", "type", *ARGUMENTS):
            raise Malformed(f"{key} in a call")
        if key == "name":
            name = yield from _string(stream, plain=names is not None)
            if names is not None and name not in names:
                raise Malformed(f"a call of {name}, which is no function of this request")
        elif key in ARGUMENTS and name is not None and not told:
            told = True
            yield from json_arguments(stream, name, call_id)
        elif key in ARGUMENTS and arguments is None:
            arguments = yield from json_text(stream)
        elif key == "id" and (yield from stream.peek()) == '"':
            call_id = yield from _string(stream)
        else:
            yield from json_text(stream)
        separator = yield from _read(stream, ",}")
    if name is None:
        raise Malformed("an object without a name")
    if not told:
        tell(stream, name, call_id, "{}" if arguments is None else arguments)
    stream.end_call()


def sole_calls(stream: Stream, names: Container[str], key: str) -> Parsing[None]:
    """Calls as their grammar has them: objects of a name and of arguments under `key`, in this order, and nothing else. Each
    is told once it is complete, for until then it may turn out to be content. Anything else is Malformed."""
    while (yield from stream.peek()) == "{":
        yield from _read(stream, "{")
        yield from _key(stream, "name")
        name = yield from _string(stream, plain=True)
        if name not in names:
            raise Malformed(f"a call of {name}, which is no function of this request")
        yield from _read(stream, ",")
        yield from _key(stream, key)
        if (yield from stream.peek()) != "{":
            raise Malformed("arguments that are no object")
        arguments = yield from json_text(stream)
        yield from _read(stream, "}")
        tell(stream, name, None, arguments)
        stream.end_call()
        if (yield from stream.peek()) == ";":
            yield from stream.visible()


def json_arguments(stream: Stream, name: str, call_id: str | None = None) -> Parsing[None]:
    """The arguments of a call, told as they come. Raises Malformed for what is no object."""
    if (yield from stream.peek()) != "{":  # null, or an object inside a string
        tell(stream, name, call_id, (yield from json_text(stream)))
        return
    held = ""  # until a quote or a bracket after the first one shows that it is an object
    told = False

    def write(text: str) -> None:
        nonlocal held, told
        if told:
            stream.arguments(text)
            return
        held += text
        if held.strip(BLANK) not in ("", "{"):
            told = True
            stream.call(name, call_id)
            stream.arguments(held.lstrip(BLANK))

    yield from json_text(stream, write)
    stream.end_arguments()


def tell(stream: Stream, name: str, call_id: str | None, arguments: str) -> None:
    """Tell a call whose arguments are complete. Raises Malformed unless they are an object, or a string that is one."""
    written, kind = json_value(arguments)
    if kind == "string":
        written, kind = json_value(json.loads(written))
    if kind not in ("object", "null"):
        raise Malformed("arguments that are no object")
    stream.call(name, call_id)
    stream.arguments("{}" if kind == "null" else written)
    stream.end_arguments()


def json_value(text: str) -> tuple[str, str]:
    """(a JSON value (RFC 8259) as it is written, JSON's name of its type). Raises Malformed."""
    reader = JsonReader()
    text = text.strip(BLANK)
    written, used = reader.feed(text + " ")
    if not reader.done or used < len(text):
        raise Malformed(reader.error or "no JSON value")
    kinds = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
    return written, kinds.get(written[0], "number")


def json_text(stream: Stream, write: Callable[[str], None] | None = None) -> Parsing[str]:
    """The text of one JSON value; `write` gets it piece by piece."""
    reader = JsonReader()
    pieces: list[str] = []
    while not reader.done:
        text = yield from stream.text()
        written, used = reader.feed(text)
        stream.unread(text[used:])
        pieces.append(written)
        if write is not None and written:
            write(written)
        if reader.error is not None:
            raise Malformed(reader.error)
    return "".join(pieces)


def _string(stream: Stream, *, plain: bool = False) -> Parsing[str]:
    """plain: no escapes, which a grammar's expression could not see through."""
    if (yield from stream.peek()) != '"':
        raise Malformed("no string")
    text = yield from json_text(stream)
    if plain and "\\" in text:
        raise Malformed("an escape in a name")
    return json.loads(text)


def _key(stream: Stream, expected: str) -> Parsing[None]:
    if (found := (yield from _string(stream, plain=True))) != expected:
        raise Malformed(f"{found} for {expected}")
    yield from _read(stream, ":")


def _read(stream: Stream, chars: str) -> Parsing[str]:
    char = yield from stream.visible()
    if char not in chars:
        stream.unread(char)
        raise Malformed(f"{char!r} for one of {chars}")
    return char
