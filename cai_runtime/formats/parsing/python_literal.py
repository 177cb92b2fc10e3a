"""Python's literals as JSON: strings, numbers, constants, lists, tuples and dicts."""

from __future__ import annotations

import json
import re
from typing import Any

from cai_runtime.formats.parsing.json_reader import MAX_DEPTH
from cai_runtime.formats.parsing.malformed import Malformed

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |(?P<number>[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?(?![\w.]))
    |(?P<name>[A-Za-z]+)|(?P<mark>[\[\](){},:]))\s*""",
    re.DOTALL | re.VERBOSE,
)
_PAIR = r"u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # JSON's two escapes for one character
_ESCAPE = re.compile(rf"\\({_PAIR}|x[0-9a-fA-F]{{2}}|u[0-9a-fA-F]{{4}}|U[0-9a-fA-F]{{8}}|[0-7]{{1,3}}|.)", re.DOTALL)
_ESCAPES = {
    "\n": "", "\\": "\\", "'": "'", '"': '"', "/": "/", "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r",
    "t": "\t", "v": "\v",
}  # fmt: skip
_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_CLOSING = {"[": "]", "(": ")", "{": "}"}


def python_value(text: str) -> str:
    """The JSON of a literal; `true`, `false` and `null` are read too. Raises Malformed."""
    value, at = _value(text, 0, 0)
    if at < len(text):
        raise Malformed(f"{text[at : at + 20]!r} after a value")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:  # a number too large for a float
        raise Malformed(str(error)) from error


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """(the value that begins at a place, where it ends)"""
    token = _TOKEN.match(text, at)
    if token is None or depth > MAX_DEPTH:
        raise Malformed(f"{text[at : at + 20]!r} for a value")
    at = token.end()
    if token["string"]:
        return _ESCAPE.sub(_unescaped, token["string"][1:-1]), at
    if (number := token["number"]) is not None:
        digits = number.lstrip("+-")
        if digits.isdecimal():
            if len(digits) > 4000 or (digits[0] == "0" and digits.strip("0")):
                raise Malformed(f"{number[:20]} for a number")
            return int(number), at
        return float(number), at
    if (name := token["name"]) is not None:
        if name not in _CONSTANTS:
            raise Malformed(f"{name} for a value")
        return _CONSTANTS[name], at
    if token["mark"] not in _CLOSING:
        raise Malformed(f"{token['mark']!r} for a value")
    return _items(text, at, token["mark"], depth)


def _items(text: str, at: int, opening: str, depth: int) -> tuple[Any, int]:
    """What is between brackets, of which the first was read."""
    closing = _CLOSING[opening]
    items: list[Any] = []
    separator = ","
    while True:
        mark = _TOKEN.match(text, at)
        if mark is not None and mark["mark"] == closing:
            break
        if separator != ",":
            raise Malformed(f"{text[at : at + 20]!r} between items")
        item, at = _value(text, at, depth + 1)
        if opening == "{":
            at = _mark(text, at, ":")
            value, at = _value(text, at, depth + 1)
            if not isinstance(item, str):
                raise Malformed("a key that is no string")
            item = (item, value)
        items.append(item)
        separator = ""
        following = _TOKEN.match(text, at)
        if following is not None and following["mark"] == ",":
            separator, at = ",", following.end()
    at = mark.end()
    if opening == "(" and len(items) == 1 and separator != ",":
        return items[0], at
    return dict(items) if opening == "{" else items, at


def _mark(text: str, at: int, mark: str) -> int:
    found = _TOKEN.match(text, at)
    if found is None or found["mark"] != mark:
        raise Malformed(f"no {mark!r}")
    return found.end()


def _unescaped(match: re.Match[str]) -> str:
    body = match[1]
    if body in _ESCAPES:
        return _ESCAPES[body]
    if len(body) == 11 and body[5] == "\\":
        code = 0x10000 + ((int(body[1:5], 16) - 0xD800) << 10) + int(body[7:], 16) - 0xDC00
    elif body[0] in "xuU" and len(body) > 1:
        code = int(body[1:], 16)
    elif body[0] in "01234567":
        code = int(body, 8)
    else:
        return match[0]  # Python keeps what is no escape
    return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else "\ufffd"
