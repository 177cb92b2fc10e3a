"""Strings that know which of their characters the chat template wrote.

A conversation's content must never become a control token, whatever it holds. So the rendered prompt has to say, for
every character, whether the template or a caller wrote it. `TracedText` carries that through the string operations that
templates use. It fails closed: a plain `str`, and every result whose origin is unknown, counts as a caller's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

from markupsafe import Markup, escape

_OWN = b"\x01"
_SIMPLE_FIELD = re.compile(r"%(?:\(([^()]*)\))?([sd%])")


class TracedText(str):
    """A string with a mask: one byte a character, 1 where the template wrote it, 0 where a caller did.

    Equality, hash, search and tests are those of `str`. Methods that return text return TracedText, except where the
    origin of its characters can't be told: those return a plain `str`, which counts as a caller's.

    Args:
        text: the characters.
        mask: `len(text)` bytes; default: all 0.
    """

    __slots__ = ("_mask",)
    _mask: bytes

    def __new__(cls, text: str, mask: bytes | None = None) -> TracedText:
        traced = super().__new__(cls, text)
        traced._mask = bytes(len(traced)) if mask is None else mask
        return traced

    def __str__(self) -> str:
        return self  # str(x) inside Jinja and its filters must not lose the mask

    def __getitem__(self, key: Any) -> TracedText:
        found = str.__getitem__(self, key)
        return TracedText(found, self._mask[key] if isinstance(key, slice) else bytes((self._mask[key],)))

    def __iter__(self) -> Iterator[str]:
        return (self[i : i + 1] for i in range(len(self)))

    # Other kinds of string, such as Jinja's Markup, which escapes what it is joined with, have their own say.
    def __add__(self, other: Any) -> Any:
        return joined((self, other)) if type(other) in (str, TracedText) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return joined((other, self)) if type(other) is str else NotImplemented

    def __mul__(self, times: Any) -> TracedText:
        return TracedText(str.__mul__(self, times), self._mask * max(0, int(times)))

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        whole = str.__mod__(plain(self), values)
        pieces: list[Any] = []
        start = 0
        arguments = iter(values if isinstance(values, tuple) else (values,))
        for field in _SIMPLE_FIELD.finditer(self):
            pieces.append(self[start : field.start()])
            start = field.end()
            if field[2] == "%":
                pieces.append(self[start - 1 : start])
            else:
                value = values[field[1]] if field[1] is not None else next(arguments)
                pieces.append(value if field[2] == "s" else str.__mod__("%d", (value,)))
        pieces.append(self[start:])
        if any("%" in piece for piece in pieces[::2]):
            return whole  # a field with a width or another type: its place in the result is not known
        traced = joined(pieces)
        return traced if traced == whole else whole

    def join(self, items: Iterable[Any]) -> TracedText:
        pieces: list[str] = []
        for item in items:
            if not isinstance(item, str):
                raise TypeError(f"sequence item {len(pieces) // 2}: expected str instance, {type(item).__name__} found")
            pieces += (item, self)
        return joined(pieces[:-1])

    def strip(self, chars: str | None = None, /) -> TracedText:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> TracedText:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> TracedText:
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> TracedText:
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> TracedText:
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        found: list[str] = []
        start = 0
        for line, whole in zip(str.splitlines(self), str.splitlines(self, keepends=True), strict=True):
            found.append(self[start : start + len(whole if keepends else line)])
            start += len(whole)
        return found

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, _ = str.partition(self, sep)
        middle = len(before) + len(found)
        return self[: len(before)], self[len(before) : middle], self[middle:]

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, _ = str.rpartition(self, sep)
        middle = len(before) + len(found)
        return self[: len(before)], self[len(before) : middle], self[middle:]

    def replace(self, old: str, new: str, count: Any = -1, /) -> TracedText:
        if not isinstance(new, str):
            raise TypeError(f"replace() argument 2 must be str, not {type(new).__name__}")
        if old:
            return joined((new,)).join(self.split(old, count))
        # An empty `old` is found before each character and at the end.
        places = len(self) + 1 if count < 0 else min(count, len(self) + 1)
        pieces: list[str] = []
        for i in range(places):
            pieces += (new, self[i : i + 1])
        return joined((*pieces, self[places:]))

    def upper(self) -> str:
        return self._mapped(str.upper(self))

    def lower(self) -> str:
        return self._mapped(str.lower(self))

    def title(self) -> str:
        return self._mapped(str.title(self))

    def capitalize(self) -> str:
        return self._mapped(str.capitalize(self))

    def casefold(self) -> str:
        return self._mapped(str.casefold(self))

    def swapcase(self) -> str:
        return self._mapped(str.swapcase(self))

    def center(self, width: Any, fillchar: str = " ", /) -> str:
        return _uniform(str.center(self, width, fillchar), self, fillchar)

    def ljust(self, width: Any, fillchar: str = " ", /) -> str:
        return _uniform(str.ljust(self, width, fillchar), self, fillchar)

    def rjust(self, width: Any, fillchar: str = " ", /) -> str:
        return _uniform(str.rjust(self, width, fillchar), self, fillchar)

    def zfill(self, width: Any, /) -> str:
        return _uniform(str.zfill(self, width), self)

    def expandtabs(self, tabsize: Any = 8) -> str:
        return _uniform(str.expandtabs(self, tabsize), self)

    def _located(self, pieces: list[str], sep: str | None) -> list[str]:
        """Pieces that a split found, in order, as slices of this text."""
        found: list[str] = []
        start = 0
        for piece in pieces:
            if sep is None:  # runs of whitespace of any length lie between
                start = str.find(self, piece, start)
            found.append(self[start : start + len(piece)])
            start += len(piece) + (0 if sep is None else len(sep))
        return found

    def _mapped(self, result: str) -> str:
        """A result of mapping each character. Case maps never shorten text, so equal lengths mean equal places."""
        return TracedText(result, self._mask) if len(result) == len(self) else _uniform(result, self)


class TracedMarkup(Markup):
    """The same of Jinja's Markup, which the filter `safe` makes: + escapes for HTML what it is joined with, as in Jinja.
    Results of other operations count as a caller's."""

    __slots__ = ("_mask",)
    _mask: bytes

    def __new__(cls, text: Any = "", *args: Any) -> TracedMarkup:
        found = super().__new__(cls, text, *args)
        found._mask = mask_of(text) if isinstance(text, str) and not args else bytes(len(found))
        return found

    def __str__(self) -> str:
        return TracedText(plain(self), self._mask)

    def __add__(self, other: Any) -> Any:
        return TracedMarkup(joined((self, _escaped(other)))) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return TracedMarkup(joined((_escaped(other), self))) if isinstance(other, str) else NotImplemented


def _escaped(text: str) -> str:
    """Text as + joins it with Markup."""
    if hasattr(text, "__html__"):
        return text
    mask, pieces = mask_of(text), []
    for found in re.finditer(r"""[&<>"']|[^&<>"']+""", plain(text)):
        shown = plain(escape(found[0]))
        # An entity has the mask of the character that it stands for.
        own_mask = mask[found.start() : found.end()]
        pieces.append(TracedText(shown, own_mask if len(shown) == len(own_mask) else own_mask * len(shown)))
    return joined(pieces)


def own(text: str) -> TracedText:
    """Text that the template, or this library, wrote."""
    return TracedText(text, _OWN * len(text))


def content(text: str) -> TracedText:
    """Text that a caller wrote."""
    return TracedText(plain(text))


def traced(value: Any) -> Any:
    """A JSON value in which every text, keys included, is a caller's; those that are traced already stay as they are."""
    if isinstance(value, str):
        return value if type(value) is TracedText else content(value)
    if isinstance(value, Mapping):
        return {traced(key): traced(item) for key, item in value.items()}
    return [traced(item) for item in value] if isinstance(value, (list, tuple)) else value


def plain(text: str) -> str:
    """The characters alone, as an exact `str`."""
    return str.__str__(text)


def mask_of(text: str) -> bytes:
    """One byte a character: 1 where the template wrote it. A plain `str` is a caller's."""
    return text._mask if isinstance(text, (TracedText, TracedMarkup)) else bytes(len(text))


def is_own(text: Any) -> bool:
    """Whether the template wrote all of it."""
    return type(text) is TracedText and 0 not in text._mask


def joined(pieces: Iterable[Any]) -> TracedText:
    """All pieces after one another; those that are no strings, such as numbers, as str() gives them."""
    texts = [str(piece) for piece in pieces]
    return TracedText("".join(texts), b"".join(map(mask_of, texts)))


def _uniform(result: str, *sources: str) -> str:
    """`result`, the template's own if each of its sources is; else a plain string."""
    return own(result) if all(is_own(source) or source == " " for source in sources) else result
