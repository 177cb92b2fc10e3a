"""Makes the events of one answer, and keeps count of which tokens each came with."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from typing import Any

from cai_runtime.engine.detokenizer import StopStrings
from cai_runtime.formats.events import ArgumentsEvent, MarkerEvent, ReasoningEvent, TextEvent, ToolCallEvent

BLANK = " \t\r\n"
_LETTERS = string.ascii_letters + string.digits


class Stopped(Exception):
    """A stop string is complete: the text is over. `stop_string` is it."""

    def __init__(self, stop_string: str):
        self.stop_string = stop_string


class Writer:
    """Content, thought and calls in, events out.

    Blanks between content and a marker are the template's layout: they are dropped beside a marker, and kept where
    content comes on both sides of a call. Stop strings are looked for in content alone.

    Args:
        stops: of the request.
        may_stop: whether a stop string may end the text now.
        calls: whether calls may come, for which trailing blanks wait.
    """

    def __init__(self, stops: StopStrings, may_stop: Callable[[], bool], *, calls: bool):
        self.events: list[Any] = []
        self.tokens: list[int] = []  # since the last event
        self.num_calls = 0
        self._call_ids = set[str]()
        self._stops = stops
        self._may_stop = may_stop
        self._holds_blanks = calls
        self._blanks = ""  # at the end of the content so far
        self._has_content = False
        self._after_marker = False
        self._thought_blanks = ""
        self._has_thought = False

    def content(self, text: str) -> None:
        """Raises Stopped where a stop string is complete."""
        if self._after_marker:
            text = text.lstrip(BLANK)
            if not text:
                self.marker()
                return
            self._after_marker = False
        shown, stop_string = self._stops.feed(text, may_stop=self._may_stop())
        self._show(shown)
        if stop_string is not None:
            self._show("", final=True)
            raise Stopped(stop_string)

    def reasoning(self, text: str) -> None:
        text = self._thought_blanks + text
        if not self._has_thought:
            text = text.lstrip(BLANK)
        body = text.rstrip(BLANK)
        self._thought_blanks = text[len(body) :]
        if body:
            self._has_thought = True
            self.events.append(ReasoningEvent(body, self._taken()))

    def end_reasoning(self) -> None:
        """Its marker came. Another thought may follow."""
        if self._has_thought:
            self._thought_blanks = "\n\n"  # between two thoughts of one answer
        self.boundary()
        self.marker()

    def call(self, name: str, call_id: str | None) -> None:
        self.boundary()
        if not call_id or call_id in self._call_ids:  # models repeat themselves; results are told apart by the ids
            call_id = new_call_id()
        self._call_ids.add(call_id)
        self.events.append(ToolCallEvent(self.num_calls, call_id, name, self._taken()))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Of the last call."""
        if text:
            self.events.append(ArgumentsEvent(self.num_calls - 1, text, self._taken()))

    def marker(self) -> None:
        """The tokens since the last event are no part of what follows."""
        if self.tokens:
            self.events.append(MarkerEvent(self._taken()))

    def boundary(self) -> None:
        """The content before is complete, or goes on after a marker."""
        self._show(self._stops.finish())
        if not self._has_content:
            self._blanks = ""
        self._after_marker = True

    def separate(self) -> None:
        """What content comes now is a paragraph of its own."""
        if self._has_content:
            self._blanks = "\n\n"

    def finish(self) -> None:
        """The text is over."""
        if not self._after_marker:
            self._show(self._stops.finish(), final=True)

    def _show(self, text: str, final: bool = False) -> None:
        text = self._blanks + text
        body = text if final or not self._holds_blanks else text.rstrip(BLANK)
        self._blanks = text[len(body) :]
        if body:
            self._has_content = True
            self.events.append(TextEvent(body, self._taken()))

    def _taken(self) -> tuple[int, ...]:
        taken = tuple(self.tokens)
        self.tokens.clear()
        return taken


def new_call_id(prefix: str = "call_", length: int = 24) -> str:
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))
