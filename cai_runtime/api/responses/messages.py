"""From items to the messages of a chat, and which of them are left out where they don't fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from cai_runtime.api.responses.items import Item
from cai_runtime.errors import ConversationError
from cai_runtime.formats.messages import Message, parse_messages

T = TypeVar("T")


class Turns:
    """The messages of a request.

    messages: what `parse_messages` takes. places: of each, where it comes from, such as "instructions" or "input[2]".
    """

    def __init__(self, instructions: str | None, items: Sequence[Item], new: int):
        """new: how many of the items, at the end, are the request's `input`; the others are of earlier responses."""
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []
        self._before = len(items) - new
        if instructions is not None:
            self._add({"role": "system", "content": instructions}, "instructions")
        for i, item in enumerate(items):
            self._put(item, f"input[{i - self._before}]" if i >= self._before else "previous_response_id")
        for message in self.messages:
            if message["content"] is None and "tool_calls" not in message:  # a thought and nothing more
                message["content"] = ""

    def parsed(self) -> list[Message]:
        """Raises ConversationError, whose `.param` is in the request's own terms, as are the places of images and audio."""
        with self._own_places():
            return [self._placed(message) if message.media else message for message in parse_messages(self.messages)]

    def _placed(self, message: Message) -> Message:
        assert isinstance(message.content, tuple)
        parts = (
            part if isinstance(part, str) else replace(part, place=self._in_own_terms(part.place))
            for part in message.content
        )
        return replace(message, content=tuple(parts))

    def _put(self, item: Item, place: str) -> None:
        match item["type"]:
            case "message" if item["role"] == "assistant":
                self._say(_joined(item["content"]), place)
            case "message":
                parts = [_chat_part(part) for part in item["content"]]
                only_text = len(parts) == 1 and parts[0]["type"] == "text"
                self._add({"role": item["role"], "content": parts[0]["text"] if only_text else parts}, place)
            case "reasoning":
                self._think(_joined(item["content"] or item["summary"]), place)
            case "function_call":
                function = {"name": item["name"], "arguments": item["arguments"]}
                turn = self._turn(place, after_text=True)
                turn.setdefault("tool_calls", []).append(
                    {"id": item["call_id"], "type": "function", "function": function}
                )
                turn.setdefault("content", None)
            case "function_call_output":
                output = item["output"]
                if not isinstance(output, str):
                    output = [{"type": "text", "text": part["text"]} for part in output]
                self._add({"role": "tool", "tool_call_id": item["call_id"], "content": output}, place)

    def _say(self, text: str, place: str) -> None:
        turn = self._turn(place, after_text=False)
        turn["content"] = (turn.get("content") or "") + text

    def _think(self, text: str, place: str) -> None:
        turn = self._turn(place, after_text=False)
        if text:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + text
        turn.setdefault("content", None)

    def _turn(self, place: str, *, after_text: bool) -> dict[str, Any]:
        """The assistant's message that goes on, or a new one.

        after_text: whether it goes on after its text, as calls do. Texts and thoughts that follow a text are another
        message; after a call they belong to the call's.
        """
        last = self.messages[-1] if self.messages else {"role": None}
        has_text = last.get("content") is not None and "tool_calls" not in last
        if last["role"] != "assistant" or (has_text and not after_text):
            self._add({"role": "assistant"}, place)
        return self.messages[-1]

    def _add(self, message: dict[str, Any], place: str) -> None:
        self.messages.append(message)
        self.places.append(place)

    @contextmanager
    def _own_places(self) -> Iterator[None]:
        try:
            yield
        except ConversationError as error:
            raise ConversationError(
                self._in_own_terms(str(error)), param=self._in_own_terms(error.param), code=error.code
            ) from error

    def _in_own_terms(self, text: str) -> str:
        for i in reversed(range(len(self.places))):
            text = text.replace(f"messages[{i}]", self.places[i])
        # An image's address and detail lie in the part itself here, in chat in an object of their own.
        text = text.replace(".image_url.url", ".image_url").replace(".image_url.detail", ".detail")
        return text.replace("'messages'", "'input'") if text != "messages" else "input"


def droppable(messages: Sequence[Message]) -> list[set[int]]:
    """What can be left out, the oldest first: positions of whole turns, a user's message with all that answers it; of the
    last turn, rounds of calls with their outputs. System and developer messages stay, and so do the last user's message and
    the last round after it."""
    starts = [i for i, message in enumerate(messages) if message.role == "user"]
    rest = [i for i, message in enumerate(messages) if message.role not in ("system", "developer")]
    bounds = [0, *starts, len(messages)]
    units = [{i for i in rest if first <= i < end} for first, end in itertools.pairwise(bounds[:-1])]
    last = [i for i in rest if i >= bounds[-2]]
    rounds: list[set[int]] = []
    for i in last:
        if messages[i].role == "assistant":
            rounds.append({i})
        elif messages[i].role != "user" and rounds:
            rounds[-1].add(i)
    return [unit for unit in [*units, *rounds[:-1]] if unit]


def longest(messages: Sequence[Message], attempt: Callable[[Sequence[Message]], T | None]) -> T | None:
    """What `attempt` makes of the messages without the fewest of the oldest turns that have to go. None: it takes not even
    the least.

    attempt: None where the messages don't fit. It is called for a few of the possible beginnings, found by halves.
    """
    units = droppable(messages)

    def without(count: int) -> T | None:
        gone = set().union(*units[:count])
        return attempt([message for i, message in enumerate(messages) if i not in gone])

    found = without(0)
    if found is not None or not units:
        return found
    found = without(len(units))
    low, high = 0, len(units)  # of units left out: `low` are too few, and `found` is of `high`
    while found is not None and high - low > 1:
        middle = (low + high) // 2
        fits = without(middle)
        if fits is None:
            low = middle
        else:
            high, found = middle, fits
    return found


def _chat_part(part: Item) -> dict[str, Any]:
    """A part of an item as chat has it."""
    match part["type"]:
        case "input_image":
            return {"type": "image_url", "image_url": {"url": part["image_url"], "detail": part["detail"]}}
        case "input_audio":
            return dict(part)
    return {"type": "text", "text": part["text"]}


def _joined(parts: Sequence[Item]) -> str:
    return "".join(part["text"] for part in parts)
