"""Follows a JSON value while it is written, so that its text can be passed on as soon as it is certain."""

from __future__ import annotations

import re

_BODY = re.compile(r'[^"\\\x00-\x1f]+')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SCALAR = re.compile(r"[-+.0-9A-Za-z]+")
_BLANK = " \t\n\r"
MAX_DEPTH = 200  # as deep as Python's own reader goes without trouble


class JsonReader:
    """One JSON value (RFC 8259), in pieces of any size. A value outside containers ends at the first character that can't
    belong to it. Line breaks and other control characters in strings, which JSON wants escaped and models write, are
    escaped.

    done: whether the value is complete. error: what is no JSON at the place where `feed` stopped; None: nothing yet.
    """

    def __init__(self) -> None:
        self.done = False
        self.error: str | None = None
        self._open: list[str] = []  # the brackets around the place
        self._expects = "value"
        self._scalar = ""  # a number or a literal that may go on
        self._hex = 0  # digits of a \u that are missing

    def feed(self, text: str) -> tuple[str, int]:
        """(the value's JSON in `text`, how many characters that took): all of them, unless the value is done or wrong."""
        written: list[str] = []
        at = 0
        while at < len(text) and not self.done and self.error is None:
            if self._expects == "string" and (body := _BODY.match(text, at)):
                written.append(body[0])
                at = body.end()
                continue
            if self._expects == "scalar":
                rest = _SCALAR.match(text, at)
                if rest:
                    self._scalar += rest[0]
                    written.append(rest[0])
                    at = rest.end()
                else:
                    self._end_scalar()
                continue
            piece = self._step(text[at])
            if self.error is None:
                written.append(piece)
                at += 1
        return "".join(written), at

    def _step(self, char: str) -> str:
        """Take a character; what it is in the JSON."""
        expects = self._expects
        if expects == "string":
            if char == '"':
                self._end_value()
            elif char == "\\":
                self._expects = "escape"
            else:
                return f"\\u{ord(char):04x}"
        elif expects == "escape":
            if char not in '"\\/bfnrtu':
                self.error = f"\\{char} in a JSON string"
            self._hex = 4 if char == "u" else 0
            self._expects = "hex" if self._hex else "string"
        elif expects == "hex":
            if char not in "0123456789abcdefABCDEF":
                self.error = f"{char!r} in a \\u escape"
            self._hex -= 1
            self._expects = "hex" if self._hex else "string"
        elif char in _BLANK:
            pass
        elif char in "]}" and self._may_close(char):
            self._open.pop()
            self._end_value()
        elif expects in ("key", "first key"):
            if char != '"':
                self.error = f"{char!r} for a key"
            self._open.append("key")
            self._expects = "string"
        elif expects == "colon" and char == ":":
            self._expects = "value"
        elif expects == "comma" and char == ",":
            self._expects = "key" if self._open[-1] == "{" else "value"
        elif expects in ("value", "first item"):
            self._begin(char)
        else:
            self.error = f"{char!r} for a {expects}"
        return char

    def _begin(self, char: str) -> None:
        if char in "{[":
            if len(self._open) >= MAX_DEPTH:
                self.error = f"JSON deeper than {MAX_DEPTH}"
            self._open.append(char)
            self._expects = "first key" if char == "{" else "first item"
        elif char == '"':
            self._expects = "string"
        elif _SCALAR.match(char):
            self._scalar, self._expects = char, "scalar"
        else:
            self.error = f"{char!r} for a value"

    def _may_close(self, char: str) -> bool:
        inside = self._open[-1] if self._open else ""
        first = "first key" if char == "}" else "first item"
        return inside == {"}": "{", "]": "["}[char] and self._expects in (first, "comma")

    def _end_scalar(self) -> None:
        if self._scalar not in ("true", "false", "null") and not _NUMBER.fullmatch(self._scalar):
            self.error = f"{self._scalar} for a value"
        self._end_value()

    def _end_value(self) -> None:
        if self._open and self._open[-1] == "key":
            self._open.pop()
            self._expects = "colon"
        elif self._open:
            self._expects = "comma"
        else:
            self.done = True
