"""Runs the sequences of one request and turns their deltas into a whole reply or a stream of chunks.

Both go one way: engine deltas -> parser -> events -> ReplyFormat, which makes chunks of the events or folds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from cai_runtime.api.errors import APIError, as_api_errors
from cai_runtime.api.timeouts import timing_out
from cai_runtime.engine.request import Completion, Delta, Request
from cai_runtime.formats.events import ChatEvent
from cai_runtime.formats.plain import PlainParser

Chunk = TypeVar("Chunk")
Whole = TypeVar("Whole")
Whole_co = TypeVar("Whole_co", covariant=True)


class ReplyFormat(Protocol[Chunk, Whole_co]):
    """An endpoint's reply type. One for each request: it holds the id and the time."""

    def opening(self) -> list[Chunk]:
        """Chunks before the first event."""
        ...

    def chunk(self, index: int, event: ChatEvent) -> Chunk:
        """The chunk for one event of choice `index`."""
        ...

    def closing(self, completions: Sequence[Completion]) -> list[Chunk]:
        """Chunks after the last event of the last choice, such as the usage."""
        ...

    def fold(self, events: Sequence[Sequence[ChatEvent]], completions: Sequence[Completion]) -> Whole_co:
        """The whole reply from every choice's events."""
        ...


@dataclass
class Generation(Generic[Chunk, Whole]):
    """A request ready to run: one engine request for each choice, in the order of their index."""

    requests: list[Request]
    format: ReplyFormat[Chunk, Whole]

    def submit(self, engine: Any) -> Running[Chunk, Whole]:
        """Hand all choices to the engine; none runs if one is refused."""
        handles: list[Any] = []
        with as_api_errors():
            try:
                for request in self.requests:
                    handles.append(engine.submit(request))  # noqa: PERF401 - on error, what runs counts
            except BaseException:
                _abort(handles)
                raise
        return Running(handles, self.format)


class Running(Generic[Chunk, Whole]):
    """The choices of a request while they run. Consume it once: `whole`, `chunks` or their asynchronous twins."""

    def __init__(self, handles: list[Any], format: ReplyFormat[Chunk, Whole]):
        self._handles = handles
        self._format = format
        self._parsers = [PlainParser() for _ in handles]
        self.timeout: float | None = None  # seconds that a stream waits for its next delta

    def abort(self) -> None:
        """Stop every choice that still runs and free its memory. Idempotent, thread-safe."""
        _abort(self._handles)

    def whole(self, timeout: float | None = None) -> Whole:
        """Wait for the end, at most `timeout` seconds, and fold. Aborts the request on any exception, Ctrl-C
        included."""
        end = None if timeout is None else time.monotonic() + timeout
        with as_api_errors(), self._aborting(), timing_out(self.timeout):
            return self._fold(
                [handle.result(None if end is None else max(0.0, end - time.monotonic())) for handle in self._handles]
            )

    async def awhole(self) -> Whole:
        with as_api_errors(), self._aborting():
            return self._fold([await handle.aresult() for handle in self._handles])

    def _fold(self, completions: list[Completion]) -> Whole:
        # The whole text as one delta: the engine's result is the fold of its deltas, and a parser's events do not depend
        # on where those were cut. This spares waking the caller for every token.
        events = [
            parser.feed(Delta(done.text, done.token_ids, done.finish_reason, done.stop_string))
            for parser, done in zip(self._parsers, completions, strict=True)
        ]
        return self._format.fold(events, completions)

    def chunks(self) -> Generator[Chunk]:
        """Chunks as they come. With several choices, one delta of each in turn: they run in one batch, a token each per
        step."""
        with as_api_errors(), self._aborting():
            yield from self._format.opening()
            live = {index: iter(handle) for index, handle in enumerate(self._handles)}
            while live:
                for index, deltas in [*live.items()]:
                    with timing_out(self.timeout):
                        delta = deltas.next(self.timeout)
                    if delta is None:
                        del live[index]
                        continue
                    for event in self._parsers[index].feed(delta):
                        yield self._format.chunk(index, event)
            yield from self._format.closing([handle.result() for handle in self._handles])

    async def achunks(self) -> AsyncGenerator[Chunk]:
        with as_api_errors(), self._aborting():
            for chunk in self._format.opening():
                yield chunk
            live = {index: aiter(handle) for index, handle in enumerate(self._handles)}
            while live:
                for index, deltas in [*live.items()]:
                    with timing_out(self.timeout):
                        async with asyncio.timeout(self.timeout):
                            delta = await anext(deltas, None)
                    if delta is None:
                        del live[index]
                        continue
                    for event in self._parsers[index].feed(delta):
                        yield self._format.chunk(index, event)
            for chunk in self._format.closing([await handle.aresult() for handle in self._handles]):
                yield chunk

    @contextlib.contextmanager
    def _aborting(self) -> Iterator[None]:
        """Abort the request if the block does not reach its end: an error, Ctrl-C, a cancelled task, a closed
        generator."""
        try:
            yield
        except BaseException:
            self.abort()
            raise


class Stream(Generic[Chunk]):
    """Chunks of a running request; a context manager. Closing it, or dropping it before its end, aborts the request."""

    def __init__(self, running: Running[Chunk, Any]):
        self._running = running
        self._chunks = running.chunks()
        self._closed = False

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._closed:
            raise StopIteration
        try:
            chunk = next(self._chunks)
        except APIError as error:
            raise (StopIteration if self._closed else error) from error.__cause__
        if self._closed:  # by another thread, while this one waited
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Stop the request if it still runs. Idempotent; iteration ends."""
        self._closed = True
        self._running.abort()
        # A generator that another thread is inside of can't be closed: the abort ends that thread's wait.
        with contextlib.suppress(ValueError):
            self._chunks.close()

    def __enter__(self) -> Stream[Chunk]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_running"):
            self._running.abort()


class AsyncStream(Generic[Chunk]):
    """The same for `async for` and `async with`."""

    def __init__(self, running: Running[Chunk, Any]):
        self._running = running
        self._chunks = running.achunks()
        self._closed = False

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._closed:
            raise StopAsyncIteration
        try:
            chunk = await anext(self._chunks)
        except APIError as error:
            raise (StopAsyncIteration if self._closed else error) from error.__cause__
        if self._closed:  # by another task, while this one waited
            raise StopAsyncIteration
        return chunk

    async def close(self) -> None:
        """Stop the request if it still runs. Idempotent; iteration ends."""
        self._closed = True
        self._running.abort()
        with contextlib.suppress(RuntimeError):  # another task is inside: the abort ends its wait
            await self._chunks.aclose()

    async def __aenter__(self) -> AsyncStream[Chunk]:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if hasattr(self, "_running"):
            self._running.abort()


def _abort(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.abort()
