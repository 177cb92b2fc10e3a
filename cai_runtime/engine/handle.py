"""The consumer's end of a request: from any thread, from any event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

from cai_runtime.engine.lifetime import check_same_process
from cai_runtime.engine.request import Completion, Delta
from cai_runtime.engine.stats import RequestTimes
from cai_runtime.errors import CaiError


class Stream:
    """Everything that a request has put out, in order. The owner thread appends and never waits for a reader; readers
    keep their own place, so the deltas are a record rather than a queue."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.error: CaiError | None = None
        self.done = False  # nothing will be added any more
        self.cached_tokens = 0  # prompt tokens found in the prefix cache
        self.times = RequestTimes()
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._async_waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None], bool]] = []

    def put(self, delta: Delta) -> None:
        """Append a delta; one with a finish reason is the last."""
        with self._changed:
            self.deltas.append(delta)
            self.done = delta.finish_reason is not None
            self._notify()

    def fail(self, error: CaiError) -> None:
        """End with an error, which every reader gets after the deltas so far."""
        with self._changed:
            self.error = error
            self.done = True
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._async_waiters:
            keep: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None], bool]] = []
            for loop, future, until_done in self._async_waiters:
                if until_done and not self.done:
                    keep.append((loop, future, until_done))
                    continue
                with contextlib.suppress(RuntimeError):  # the loop was closed under its task
                    loop.call_soon_threadsafe(_set_done, future)
            self._async_waiters = keep

    def _has(self, index: int | None) -> bool:
        return self.done or (index is not None and index < len(self.deltas))

    def wait(self, index: int | None, timeout: float | None = None) -> bool:
        """Block until delta number `index` is there or the stream is done (None: is done). False on timeout.

        Raises EngineClosedError in a forked child, where nobody would wake the caller."""
        check_same_process(self._process)
        with self._changed:
            return self._changed.wait_for(lambda: self._has(index), timeout)

    async def wait_async(self, index: int | None) -> None:
        """The same without blocking the running event loop."""
        check_same_process(self._process)
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if self._has(index):
                    return
                future = loop.create_future()
                self._async_waiters.append((loop, future, index is None))
            await future


def _set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Handle:
    """A submitted request. Iterate it for its `Delta`s with `for` or `async for`, or wait for the whole with `result()`
    or `await aresult()`. Its error is raised in whoever consumes it.

    Thread-safe. Every iteration and every result begins at the first delta, whatever was consumed before. Leaving an
    iteration before its end (break, an exception, Ctrl-C, a cancelled task) aborts the request and frees its pages, and
    so does forgetting the handle.
    """

    def __init__(
        self, stream: Stream, *, request_id: str, prompt_tokens: int, abort: Callable[[], None], keep_alive: Any = None
    ):
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self._stream = stream
        self._abort = abort
        self._keep_alive = keep_alive  # the engine lives as long as somebody waits for it

    @property
    def done(self) -> bool:
        """Whether the request has finished, failed or been aborted."""
        return self._stream.done

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV came from the prefix cache; 0 until the request has started."""
        return self._stream.cached_tokens

    def abort(self) -> None:
        """Stop the request before the next step and free its pages. Its consumers get RequestAbortedError. Idempotent;
        does nothing to a request that is done."""
        if not self._stream.done:
            self._abort()

    def __iter__(self) -> DeltaIterator:
        return DeltaIterator(self)

    def __aiter__(self) -> DeltaIterator:
        return DeltaIterator(self)

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end and return the fold of all deltas.

        Raises the request's error, or TimeoutError after `timeout` seconds; the request goes on then. An interrupt
        (Ctrl-C) while waiting aborts it.
        """
        with self._abort_on_exit():
            finished = self._stream.wait(None, timeout)
        if not finished:
            raise TimeoutError(f"request {self.request_id} is not done after {timeout} s")
        return self._fold()

    async def aresult(self) -> Completion:
        """Like `result`; cancelling the task that awaits it aborts the request."""
        with self._abort_on_exit():
            await self._stream.wait_async(None)
        return self._fold()

    @contextlib.contextmanager
    def _abort_on_exit(self):
        try:
            yield
        except BaseException:  # KeyboardInterrupt and CancelledError above all
            self.abort()
            raise

    def _fold(self) -> Completion:
        self._keep_alive = None
        if self._stream.error is not None:
            raise self._stream.error
        deltas = self._stream.deltas
        finish_reason = deltas[-1].finish_reason
        assert finish_reason is not None
        token_ids = tuple(token_id for delta in deltas for token_id in delta.token_ids)
        return Completion(
            text="".join(delta.text for delta in deltas),
            token_ids=token_ids,
            finish_reason=finish_reason,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=len(token_ids),
            stop_string=deltas[-1].stop_string,
            times=self._stream.times,
        )

    def __del__(self) -> None:
        if hasattr(self, "_abort"):
            self.abort()


class DeltaIterator:
    """One pass over a request's deltas, synchronous or asynchronous. Dropped or closed early, it aborts the request."""

    def __init__(self, handle: Handle):
        self._handle = handle
        self._stream = handle._stream
        self._index = 0

    def __iter__(self) -> DeltaIterator:
        return self

    def __next__(self) -> Delta:
        with self._handle._abort_on_exit():
            self._stream.wait(self._index)
        delta = self._take()
        if delta is None:
            raise StopIteration
        return delta

    def __aiter__(self) -> DeltaIterator:
        return self

    async def __anext__(self) -> Delta:
        with self._handle._abort_on_exit():
            await self._stream.wait_async(self._index)
        delta = self._take()
        if delta is None:
            raise StopAsyncIteration
        return delta

    def _take(self) -> Delta | None:
        """The delta that was waited for; None at the end, the request's error after the last one before it."""
        if self._index < len(self._stream.deltas):
            self._index += 1
            return self._stream.deltas[self._index - 1]
        self._handle._keep_alive = None
        if self._stream.error is not None:
            raise self._stream.error
        return None

    def close(self) -> None:
        """End the iteration; abort the request unless it is done."""
        self._handle.abort()

    async def aclose(self) -> None:
        """`close`, for `contextlib.aclosing`."""
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.close()
