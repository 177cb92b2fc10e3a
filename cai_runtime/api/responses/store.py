"""Responses that a client keeps: in memory, bounded, the least recently used go first."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cai_runtime.api.errors import BadRequestError, NotFoundError
from cai_runtime.api.responses.events import ResponseMachine
from cai_runtime.api.responses.items import Item, remembered
from cai_runtime.scalars import shown

MAX_RESPONSES = 1000
MAX_BYTES = 64 * 1024 * 1024  # of JSON


def _nothing() -> None: ...


@dataclass
class Stored:
    """A response and what it answered.

    items: the whole input, those of earlier responses first; shared by the responses of a conversation. abort: ends it
    while it runs; it leads to all that the engine has of the response.
    """

    machine: ResponseMachine
    items: tuple[Item, ...]
    abort: Callable[[], None] = _nothing
    _output: list[Item] | None = None

    def output(self) -> list[Item]:
        """The response's output as items: the same objects each time, once it is done."""
        if self._output is not None:
            return self._output
        done = self.machine.status != "in_progress"
        items: list[Item] = [item.model_dump(exclude_unset=True) for item in self.machine.snapshot().output]
        if done:
            self._output = items
        return items


class ResponseStore:
    """Of one client; shared by those made of it with `with_options`. Thread-safe.

    Args:
        max_responses: that are kept.
        max_bytes: of their items and outputs as JSON; an item that several responses have in common counts once.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES):
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._stored: OrderedDict[str, Stored] = OrderedDict()  # the least recently used first
        self._outputs: dict[str, int] = {}  # response id -> bytes of the response itself
        self._shares: dict[int, list[int]] = {}  # id() of an item that is kept -> [responses that have it, bytes]
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def bytes(self) -> int:
        """Of JSON that is kept."""
        return self._bytes

    def add(self, stored: Stored) -> None:
        """Keep a response that begins to run."""
        with self._lock:
            response_id = stored.machine.response.id
            self._stored[response_id] = stored
            for item in stored.items:
                share = self._shares.setdefault(id(item), [0, 0])
                if not share[0]:
                    share[1] = _size(item)
                    self._bytes += share[1]
                share[0] += 1
            self._outputs[response_id] = 0
            self.measure(response_id)

    def check_room(self, items: Sequence[Item]) -> None:
        """Refuse what could not be kept even alone.

        Raises:
            BadRequestError: naming `store`.
        """
        if sum(map(_size, items)) > self._max_bytes:
            raise BadRequestError(
                f"'store': the conversation has more than the {self._max_bytes} bytes that this client keeps.",
                param="store",
                code="too_large_to_store",
            )

    def measure(self, response_id: str) -> None:
        """Count the response's bytes again, now that it has changed; the least recently used make room. One that is done
        lets go of what ran it: its tokens take much more memory than its text."""
        with self._lock:
            stored = self._stored.get(response_id)
            if stored is None:
                return
            if stored.machine.status != "in_progress":
                stored.abort = _nothing
            size = len(stored.machine.snapshot().model_dump_json().encode())
            self._bytes += size - self._outputs[response_id]
            self._outputs[response_id] = size
            while self._stored and (len(self._stored) > self._max_responses or self._bytes > self._max_bytes):
                self._drop(next(iter(self._stored)))

    def get(self, response_id: Any, param: str = "response_id") -> Stored:
        """Raises NotFoundError: there is none of this id, or no more."""
        if not isinstance(response_id, str) or not response_id:
            raise BadRequestError(
                f"Invalid '{param}': must be a response's id, got {shown(response_id)}.",
                param=param,
                code="invalid_type",
            )
        with self._lock:
            stored = self._stored.get(response_id)
            if stored is None:
                raise NotFoundError(
                    f"'{param}': no response {shown(response_id)} is stored in this client: it was made without store=True, "
                    f"deleted, or dropped for later ones ({self._max_responses} are kept, of {self._max_bytes} bytes).",
                    param=param,
                    code="response_not_found",
                )
            self._stored.move_to_end(response_id)
            return stored

    def history(self, response_id: str) -> tuple[Item, ...]:
        """The items before the input of a response that goes on from `response_id`: its input and its output.

        Raises:
            BadRequestError: there is no such response, or it did not end by itself; naming `previous_response_id`.
        """
        try:
            stored = self.get(response_id, "previous_response_id")
        except NotFoundError as error:
            raise BadRequestError(
                error.message, param="previous_response_id", code="previous_response_not_found"
            ) from None
        if (status := stored.machine.status) not in ("completed", "incomplete"):
            raise BadRequestError(
                f"'previous_response_id': that response is {status}: go on from one that is completed or incomplete.",
                param="previous_response_id",
                code="invalid_value",
            )
        return (*stored.items, *remembered(stored.output()))

    def find_item(self, item_id: str) -> Item | None:
        """An item of a stored response's input or output."""
        with self._lock:
            for stored in reversed(self._stored.values()):
                for item in (*stored.items, *stored.output()):
                    if item["id"] == item_id:
                        return item
        return None

    def delete(self, response_id: Any) -> None:
        """Raises NotFoundError as `get`. A running response is aborted."""
        with self._lock:
            stored = self.get(response_id)
            self._drop(response_id)
        stored.abort()

    def discard(self, response_id: str) -> None:
        """Forget a response, if it is there."""
        with self._lock:
            if response_id in self._stored:
                self._drop(response_id)

    def clear(self) -> None:
        with self._lock:
            while self._stored:
                self._drop(next(iter(self._stored)))

    def _drop(self, response_id: str) -> None:
        stored = self._stored.pop(response_id)
        self._bytes -= self._outputs.pop(response_id)
        for item in stored.items:
            share = self._shares[id(item)]
            share[0] -= 1
            if not share[0]:
                self._bytes -= share[1]
                del self._shares[id(item)]


def _size(item: Item) -> int:
    return len(json.dumps(item, ensure_ascii=False, default=str).encode())
