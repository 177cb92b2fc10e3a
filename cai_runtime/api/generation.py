"""Runs the sequences of one request and makes a whole reply or a stream of chunks of their events.

Both go one way: the format's output makes events of tokens, in the engine; a ReplyFormat makes chunks of the events, or
folds all of them into the reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from cai_runtime.api.errors import APIError, as_api_errors
from cai_runtime.api.logprobs import Aligners, EventLogprobs
from cai_runtime.api.timeouts import timed_out, timing_out
from cai_runtime.engine.handle import HandleGroup
from cai_runtime.engine.request import Delta, Finished, Request
from cai_runtime.errors import CaiError
from cai_runtime.formats.events import ChatEvent

Chunk = TypeVar("Chunk")
Whole = TypeVar("Whole")
Chunk_co = TypeVar("Chunk_co", covariant=True)
Whole_co = TypeVar("Whole_co", covariant=True)


class Consumed(Protocol[Chunk_co, Whole_co]):
    """A request while it runs. To be consumed once, by one of these; what is not consumed any more is to be aborted."""

    timeout: float | None  # seconds that a stream waits for its next chunk

    def abort(self) -> None: ...
    def whole(self, timeout: float | None = None) -> Whole_co: ...
    async def awhole(self) -> Whole_co: ...
    def chunks(self) -> Generator[Chunk_co]: ...
    def achunks(self) -> AsyncGenerator[Chunk_co]: ...


class Submitted(Protocol[Chunk_co, Whole_co]):
    """A request that is ready to run."""

    def submit(self, engine: Any) -> Consumed[Chunk_co, Whole_co]:
        """Hand it to the engine. Raises RateLimitError if that takes no more."""
        ...


class ReplyFormat(Protocol[Chunk, Whole_co]):
    """An endpoint's reply type. One for each request: it holds the id and the time."""

    def opening(self) -> list[Chunk]:
        """Chunks before the first event."""
        ...

    def chunks(self, index: int, event: ChatEvent, logprobs: EventLogprobs | None = None) -> Sequence[Chunk]:
        """The chunks for one event of choice `index`; none for what no caller sees. logprobs: where the request wants
        them."""
        ...

    def closing(self, choices: Sequence[Finished]) -> list[Chunk]:
        """Chunks after the last event of the last choice, such as the usage."""
        ...

    def fold(self, choices: Sequence[Finished]) -> Whole_co:
        """The whole reply from every choice's events."""
        ...


@dataclass
class Generation(Generic[Chunk, Whole]):
    """A request ready to run: one engine request for each choice, in the order of their index."""

    requests: list[Request]
    format: ReplyFormat[Chunk, Whole]

    def submit(self, engine: Any) -> Running[Chunk, Whole]:
        """Hand all choices to the engine; none runs if one is refused."""
        with as_api_errors():
            handles = engine.submit_all(self.requests)
        return Running(HandleGroup(handles), self.format)


class Running(Generic[Chunk, Whole]):
    """The choices of a request while they run. Consume it once: `whole`, `chunks` or their asynchronous twins.

    What is raised while waiting comes out as itself, such as the exception of a signal handler; what the engine reports
    comes out as an APIError.
    """

    def __init__(self, group: HandleGroup, format: ReplyFormat[Chunk, Whole]):
        self._group = group
        self._format = format
        self.timeout: float | None = None  # seconds that a stream waits for its next delta
        self._aligners = Aligners()

    def abort(self) -> None:
        """Stop every choice that still runs and free its memory. Idempotent, thread-safe."""
        self._group.abort()

    def whole(self, timeout: float | None = None) -> Whole:
        """Wait for the end, at most `timeout` seconds, and fold. Aborts the request on any exception, Ctrl-C
        included."""
        with as_api_errors(CaiError), self._aborting():
            choices = self._group.results(timeout)
            if choices is None:
                raise timed_out(timeout if self.timeout is None else self.timeout)
            return self._format.fold(choices)

    async def awhole(self) -> Whole:
        with as_api_errors(CaiError), self._aborting():
            return self._format.fold(await self._group.aresults())

    def chunks(self) -> Generator[Chunk]:
        """Chunks as they come, of whichever choice has some."""
        with as_api_errors(CaiError), self._aborting():
            yield from self._format.opening()
            while (deltas := self._group.next(self.timeout)) != []:
                if deltas is None:
                    raise timed_out(self.timeout)
                for index, delta in deltas:
                    yield from self._chunks_of(index, delta)
            yield from self._format.closing(self._group.results() or [])

    async def achunks(self) -> AsyncGenerator[Chunk]:
        with as_api_errors(CaiError), self._aborting():
            for chunk in self._format.opening():
                yield chunk
            while True:
                with timing_out(self.timeout):
                    async with asyncio.timeout(self.timeout):
                        deltas = await self._group.anext()
                if not deltas:
                    break
                for index, delta in deltas:
                    for chunk in self._chunks_of(index, delta):
                        yield chunk
            for chunk in self._format.closing(await self._group.aresults()):
                yield chunk

    def _chunks_of(self, index: int, delta: Delta) -> Iterator[Chunk]:
        prompt = self._group.handles[index].prompt_logprobs
        for event, logprobs in self._aligners.events(index, delta, prompt):
            yield from self._format.chunks(index, event, logprobs)

    @contextlib.contextmanager
    def _aborting(self) -> Iterator[None]:
        """Abort the request if the block does not reach its end: an error, Ctrl-C, a cancelled task, a closed
        generator."""
        try:
            yield
        except BaseException:
            self._group.abort()
            raise


class Stream(Generic[Chunk]):
    """Chunks of a running request; a context manager. Closing it, or dropping it before its end, aborts the request.
    Several threads may iterate it: each chunk goes to one of them."""

    def __init__(self, running: Consumed[Chunk, Any]):
        self._running = running
        self._chunks = running.chunks()
        self._turn = threading.RLock()  # of the thread that waits for the next chunk
        self._closed = False

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._closed:
            raise StopIteration
        try:
            with self._turn:
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
    """The same for `async for` and `async with`. Several tasks of one event loop may iterate it."""

    def __init__(self, running: Consumed[Chunk, Any]):
        self._running = running
        self._chunks = running.achunks()
        self._turn = asyncio.Lock()
        self._closed = False

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._closed:
            raise StopAsyncIteration
        try:
            async with self._turn:
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
