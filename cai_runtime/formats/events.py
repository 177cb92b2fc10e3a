"""What an answer consists of, piece by piece: outputs make these events, the API folds them or yields them as chunks."""

from __future__ import annotations

from cai_runtime.engine.request import EndEvent, TextEvent

__all__ = ["ChatEvent", "EndEvent", "TextEvent"]

ChatEvent = TextEvent | EndEvent
