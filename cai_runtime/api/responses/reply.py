"""A response while it runs: its stream, its whole, and what becomes of it when it fails or nobody wants it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent, ResponseUsage
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails

from cai_runtime.api.errors import APIError, as_api_errors
from cai_runtime.api.generation import Generation, Running
from cai_runtime.api.logprobs import EventLogprobs, aligned, chat_entries
from cai_runtime.api.responses.events import ResponseMachine, merged
from cai_runtime.api.responses.store import ResponseStore, Stored
from cai_runtime.api.usage import reasoning_tokens
from cai_runtime.engine.detokenizer import TokenDecoder
from cai_runtime.engine.handle import HandleGroup
from cai_runtime.engine.request import Finished
from cai_runtime.formats.events import ChatEvent, TextEvent


class ResponseReply:
    """The ReplyFormat of a response. decoder: of the engine. store: where the response is kept."""

    def __init__(self, machine: ResponseMachine, decoder: TokenDecoder, store: ResponseStore | None = None):
        self.machine = machine
        self._decoder = decoder
        self._store = store

    def opening(self) -> list[ResponseStreamEvent]:
        return self.machine.begin()

    def chunks(self, index: int, event: ChatEvent, logprobs: EventLogprobs | None = None) -> list[ResponseStreamEvent]:
        if logprobs is None or not isinstance(event, TextEvent):
            return self.machine.feed(event)
        entries = chat_entries(self._decoder, logprobs.tokens)  # of Chat's shape, which is the same
        return self.machine.feed(event, [entry.model_dump() for entry in entries])

    def closing(self, choices: Sequence[Finished]) -> list[ResponseStreamEvent]:
        events = self.machine.end(usage_of(choices[0]))
        self._settle()
        return events

    def fold(self, choices: Sequence[Finished]) -> Response:
        (done,) = choices
        if done.logprobs is None:
            for event in merged(done.events):
                self.machine.feed(event)
        else:
            for event, logprobs in aligned(done):
                self.chunks(0, event, logprobs)
        self.closing(choices)
        return self.machine.snapshot()

    def failing(self, error: APIError) -> list[ResponseStreamEvent]:
        """The last events of a stream that `error` ends."""
        if error.code == "request_aborted":
            self.leave()
            return self.machine.last_events()
        events = self.machine.fail(error.message)
        self._settle()
        return events

    def leave(self) -> None:
        """Nobody wants it any more."""
        if self.machine.cancel():
            self._settle()

    def forget(self) -> None:
        """Of a whole reply that failed: nobody knows its id."""
        if self._store is not None:
            self._store.discard(self.machine.response.id)

    def _settle(self) -> None:
        if self._store is not None:
            self._store.measure(self.machine.response.id)


class ResponseRunning(Running[ResponseStreamEvent, Response]):
    """A Running that tells the response how it ended."""

    _format: ResponseReply

    def abort(self) -> None:
        """Called by who leaves a stream, and by who cancels the response."""
        super().abort()
        self._format.leave()

    def whole(self, timeout: float | None = None) -> Response:
        try:
            return super().whole(timeout)
        except BaseException:
            self._format.forget()
            raise

    async def awhole(self) -> Response:
        try:
            return await super().awhole()
        except BaseException:
            self._format.forget()
            raise

    def chunks(self) -> Generator[ResponseStreamEvent]:
        try:
            yield from super().chunks()
        except APIError as error:
            yield from self._format.failing(error)
            raise
        except BaseException:  # such as Ctrl-C
            self._format.leave()
            raise

    async def achunks(self) -> AsyncGenerator[ResponseStreamEvent]:
        try:
            async with contextlib.aclosing(super().achunks()) as events:
                async for event in events:
                    yield event
        except APIError as error:
            for event in self._format.failing(error):
                yield event
            raise
        except BaseException:  # such as a cancelled task
            self._format.leave()
            raise


@dataclass
class ResponseGeneration(Generation[ResponseStreamEvent, Response]):
    """store: where the response is kept from its beginning on; None: nowhere."""

    format: ResponseReply
    stored: Stored | None = None
    store: ResponseStore | None = None

    def submit(self, engine: Any) -> ResponseRunning:
        with as_api_errors():
            handles = engine.submit_all(self.requests)
        running = ResponseRunning(HandleGroup(handles), self.format)
        if self.store is not None and self.stored is not None:
            self.stored.abort = running.abort
            self.store.add(self.stored)
        return running


def usage_of(done: Finished) -> ResponseUsage:
    """Token counts. What was not in the cache was written to it."""
    return ResponseUsage(
        input_tokens=done.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=done.cached_tokens, cache_write_tokens=done.prompt_tokens - done.cached_tokens
        ),
        output_tokens=done.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=reasoning_tokens(done)),
        total_tokens=done.prompt_tokens + done.completion_tokens,
    )
