"""The conversation format of models whose whole output is the answer: no reasoning, no tool calls."""

from __future__ import annotations

from cai_runtime.engine.request import Delta
from cai_runtime.formats.events import ChatEvent, EndEvent, TextEvent


class PlainParser:
    """Turns one sequence's deltas into events.

    The text of all events together does not depend on where the deltas were cut: feeding the whole text as one delta
    gives the same answer as feeding it token by token. Every parser must keep this, for the whole reply is parsed at
    once and the stream piece by piece.
    """

    def feed(self, delta: Delta) -> list[ChatEvent]:
        events: list[ChatEvent] = [TextEvent(delta.text)] if delta.text else []
        if delta.finish_reason is not None:
            events.append(EndEvent(delta.finish_reason))
        return events
