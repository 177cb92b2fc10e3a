"""What an answer consists of, piece by piece: outputs make these events, the API folds them or yields them as chunks.

Events of one answer come in the order of its text. `token_ids` are the tokens that came since the last event, so every
generated token is in exactly one event, and log probabilities find their piece.
"""

from __future__ import annotations

from dataclasses import dataclass

from cai_runtime.engine.request import EndEvent, TextEvent

__all__ = ["ArgumentsEvent", "ChatEvent", "EndEvent", "MarkerEvent", "ReasoningEvent", "TextEvent", "ToolCallEvent"]


@dataclass(slots=True, unsafe_hash=True)
class ReasoningEvent:
    """A piece of the thought, which is no content; never empty."""

    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(slots=True, unsafe_hash=True)
class ToolCallEvent:
    """A call of a function begins. index: 0 for the answer's first call, and so on. call_id: "call_" and random letters,
    or what the model wrote."""

    index: int
    call_id: str
    name: str
    token_ids: tuple[int, ...] = ()


@dataclass(slots=True, unsafe_hash=True)
class ArgumentsEvent:
    """A piece of a call's arguments, JSON as text, which can't change any more; never empty. The pieces of a call that
    ended make one JSON object."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(slots=True, unsafe_hash=True)
class MarkerEvent:
    """Tokens that no caller sees, such as the end of a thought or of a call."""

    token_ids: tuple[int, ...]


ChatEvent = TextEvent | ReasoningEvent | MarkerEvent | ToolCallEvent | ArgumentsEvent | EndEvent
