"""One answer as its parser sees it: text and markers come in, content, thoughts and calls go out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator
from typing import TypeVar

from cai_runtime.formats.parsing.malformed import Malformed
from cai_runtime.formats.parsing.markers import Marker, Markers, first_marker, held_length
from cai_runtime.formats.parsing.writer import BLANK, Writer

T = TypeVar("T")
Item = str | Marker | None  # None: the text is over
Parsing = Generator[None, None, T]  # a parser: it yields where it needs more of the text, and returns what it read


class Stream:
    """Parsers are generators, which yield where they need more of the text. What they read is the same however the text
    was cut into pieces.

    writer: takes what was read. unfinished: the text ended inside a thought, or inside a call.
    """

    def __init__(self, markers: Markers, writer: Writer):
        self.writer = writer
        self.unfinished = False
        self._markers = markers
        self._items: deque[Item] = deque()
        self._raw: str | None = None  # the call's text so far, while it may turn out to be content
        self._in_call = False  # a call was told, and its arguments are not complete
        self._opener = ""  # of the call
        self._content_before = ""  # that was read with the call's text
        self._rest: Callable[[str], None] = self.arguments  # takes the rest of arguments that went wrong

    @property
    def ended(self) -> bool:
        """Whether all of the text was read."""
        return bool(self._items) and self._items[0] is None

    @property
    def _only_blanks_left(self) -> bool:
        *pieces, last = self._items or ("",)
        return last is None and all(isinstance(piece, str) and not piece.strip(BLANK) for piece in pieces)

    def push(self, item: Item) -> None:
        self._items.append(item)

    def next(self) -> Parsing[Item]:
        """The next piece of text, or marker that is a token, or None for the end, again and again."""
        while not self._items:
            yield
        item = self._items[0]
        if item is not None:
            self._items.popleft()
            if self._raw is not None:
                self._raw += item if isinstance(item, str) else item.text
        return item

    def unread(self, item: Item) -> None:
        """Put back what `next` gave, or the end of it."""
        if not item:
            return
        self._items.appendleft(item)
        if self._raw is not None:
            length = len(item if isinstance(item, str) else item.text)
            self._raw = self._raw[: len(self._raw) - length]

    def text(self) -> Parsing[str]:
        """The next piece of text. Raises Malformed where there is none before a marker or the end."""
        item = yield from self.next()
        if not isinstance(item, str):
            self.unread(item)
            raise Malformed("the text ends here" if item is None else f"{item.text} inside a call")
        return item

    def visible(self) -> Parsing[str]:
        """The next character that is no blank. Raises as `text`."""
        while True:
            text = (yield from self.text()).lstrip(BLANK)
            if text:
                self.unread(text[1:])
                return text[0]

    def expect(self, text: str) -> Parsing[None]:
        """Read this text. Raises Malformed for another one."""
        while text:
            piece = yield from self.text()
            length = min(len(piece), len(text))
            if piece[:length] != text[:length]:
                self.unread(piece)
                raise Malformed(f"{piece[:length]!r} for {text!r}")
            self.unread(piece[length:])
            text = text[length:]

    def expect_visible(self, text: str) -> Parsing[None]:
        """The same after blanks."""
        self.unread((yield from self.visible()))
        yield from self.expect(text)

    def char(self) -> Parsing[str]:
        """The next character. Raises as `text`."""
        text = yield from self.text()
        self.unread(text[1:])
        return text[0]

    def peek(self) -> Parsing[str]:
        """The next character that is no blank; "" at a marker or the end. Nothing is read."""
        blanks = ""
        while isinstance((item := (yield from self.next())), str) and not item.lstrip(BLANK):
            blanks += item
        found = item.lstrip(BLANK)[0] if isinstance(item, str) else ""
        self.unread(item)
        self.unread(blanks)
        return found

    def until(self, markers: Collection[str], write: Callable[[str], None]) -> Parsing[str | None]:
        """Write text up to one of the markers, and return its spelling; None at the end. Other markers are text."""
        in_text = [marker for marker in markers if not self._markers.is_token(marker)]
        held = ""
        while True:
            item = yield from self.next()
            if isinstance(item, str):
                text = held + item
                if found := first_marker(text, in_text):
                    at, marker = found
                    self.unread(text[at + len(marker) :])
                    if at:
                        write(text[:at])
                    return marker
                shown = text[: len(text) - held_length(text, in_text)] if in_text else text
                held = text[len(shown) :]
            else:
                shown, held = held, ""
            if shown:
                write(shown)
            if item is None:
                return None
            if isinstance(item, Marker):
                if item.text in markers:
                    return item.text
                write(item.text)

    def content(self, *markers: str) -> Parsing[str | None]:
        """See `until`: the text is content."""
        return self.until(markers, self.writer.content)

    def thought(self, *markers: str) -> Parsing[str | None]:
        """See `until`: the text is a thought, which ends with the marker."""
        marker = yield from self.until(markers, self.writer.reasoning)
        if marker is None:
            self.unfinished = True
        else:
            self.writer.end_reasoning()
        return marker

    def begins(self, markers: Collection[str]) -> Parsing[str | None]:
        """The marker that comes next, blanks apart, and is read; else None, and nothing is read."""
        blanks = ""
        in_text = [marker for marker in markers if not self._markers.is_token(marker)]
        while True:
            item = yield from self.next()
            if isinstance(item, Marker) and item.text in markers:
                return item.text
            if not isinstance(item, str):
                self.unread(item)
                self.unread(blanks)
                return None
            blanks += item
            text = blanks.lstrip(BLANK)
            for marker in in_text:
                if text.startswith(marker):
                    self.unread(text[len(marker) :])
                    return marker
            if text and not any(marker.startswith(text) for marker in in_text):
                self.unread(blanks)
                return None

    # -- calls ---------------------------------------------------------------------------------------------------------

    def call(self, name: str, call_id: str | None = None, *, as_json: bool = True) -> None:
        """Tell that a call begins: from here on its text can't become content. as_json: the text of its arguments is what
        is told of them."""
        if self._content_before:
            self.writer.content(self._content_before)
            self._content_before = ""
        self.writer.call(name, call_id)
        self._rest = self.arguments if as_json else _ignore
        self._raw, self._in_call = None, True

    def content_before(self, text: str) -> None:
        """What was read is content, if a call follows."""
        self._content_before = text

    def arguments(self, text: str) -> None:
        self.writer.arguments(text)

    def end_arguments(self) -> None:
        """They are complete: whatever else the call's text holds, the call stands."""
        self._in_call = False

    def end_call(self) -> None:
        """What comes now may be another call, or content."""
        self._raw = ""

    def captured(self, *markers: str) -> Parsing[tuple[str, str]]:
        """(text, the marker that it ends with). Raises Malformed at the end, and where another call's opener comes."""
        pieces: list[str] = []
        ends = (*markers, self._opener) if self._markers.is_token(self._opener) else markers
        marker = yield from self.until(ends, pieces.append)
        if marker is None or marker not in markers:
            if marker is not None:
                self.unread(self._markers.token(marker))
            raise Malformed("the call was not finished")
        return "".join(pieces), marker

    def calls(self, opener: str, body: Parsing[None], closers: Collection[str] = ()) -> Parsing[None]:
        """Read one or more calls, whose opener was read, and one of the closers, if it is there.

        Text that turns out to be no call is content: what came after the opener is read again. But once a call was told,
        all text up to a closer is its own. Arguments that go wrong are told as they are where they were to be JSON, else
        as far as they were right.
        """
        self._raw, self._opener, self._content_before = "", opener, ""
        told = self.writer.num_calls
        is_call = True
        try:
            yield from body
        except Malformed:
            is_call = False
        raw, self._raw = self._raw or "", None
        if self.writer.num_calls == told:
            self.unfinished = self.unfinished or self._only_blanks_left
            self.unread(raw)
            if opener:
                self.writer.content(opener)
            return
        if self._in_call:
            closer = yield from self.until(closers, self._rest)
            self.unfinished = self.unfinished or closer is None
            self._in_call = False
        else:
            if not is_call:
                self.unread(raw)
            yield from self.begins(closers)
        self.writer.marker()


def _ignore(text: str) -> None:
    """For what is told of no call."""
