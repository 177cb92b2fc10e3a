"""What an answer consists of, piece by piece: parsers emit these, the API folds them or yields them as chunks."""

from __future__ import annotations

from dataclasses import dataclass

from cai_runtime.engine.request import FinishReason


@dataclass(frozen=True, slots=True)
class TextEvent:
    """A piece of the visible answer; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class EndEvent:
    """The answer is over; always the last event, once."""

    finish_reason: FinishReason


ChatEvent = TextEvent | EndEvent
