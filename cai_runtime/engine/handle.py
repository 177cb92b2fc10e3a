"""The consumer's end of a request: from any thread, from any event loop."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cai_runtime.engine.outbox import TokenLog
from cai_runtime.engine.request import Delta, Finished, TokenLogprobs
from cai_runtime.errors import CaiError


class Handle:
    """A submitted request. Iterate it for its `Delta`s with `for` or `async for`, or wait for the whole with `result()`
    or `await aresult()`. Its error is raised in whoever consumes it.

    Thread-safe. Every iteration and every result begins at the first delta, whatever was consumed before. Leaving an
    iteration before its end (break, an exception, Ctrl-C, a cancelled task) aborts the request and frees its pages, and
    so does forgetting the handle.
    """

    def __init__(
        self, log: TokenLog, *, request_id: str, prompt_tokens: int, abort: Callable[[], None], keep_alive: Any = None
    ):
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self._log = log
        self._abort = abort
        self._keep_alive = keep_alive  # the engine lives as long as somebody waits for it

    @property
    def done(self) -> bool:
        """Whether the request has finished, failed or been aborted."""
        return self._log.done

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV came from the prefix cache; 0 until the request has started."""
        return self._log.cached_tokens

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """Of the prompt's tokens, None for the first; there before the first delta. None where they are not wanted."""
        return self._log.prompt_logprobs

    def abort(self) -> None:
        """Stop the request before the next step and free its pages. Its consumers get RequestAbortedError. Idempotent;
        does nothing to a request that is done."""
        if not self._log.done:
            self._abort()

    def __iter__(self) -> DeltaIterator:
        return DeltaIterator(self)

    def __aiter__(self) -> DeltaIterator:
        return DeltaIterator(self)

    def result(self, timeout: float | None = None) -> Finished:
        """Wait for the end and return the fold of all deltas.

        Raises the request's error, or TimeoutError after `timeout` seconds; the request goes on then. An interrupt
        (Ctrl-C) while waiting aborts it.
        """
        with _aborting(self):
            finished = self._log.outbox.wait(self._is_done, timeout)
        if not finished:
            raise TimeoutError(f"request {self.request_id} is not done after {timeout} s")
        return self._fold()

    async def aresult(self) -> Finished:
        """Like `result`; cancelling the task that awaits it aborts the request."""
        with _aborting(self):
            await self._log.outbox.wait_async(self._is_done)
        return self._fold()

    def _is_done(self) -> bool:
        return self._log.done

    def _fold(self) -> Finished:
        self._keep_alive = None
        if self._log.error is not None:
            _raise(self._log.error)
        deltas = self._log.deltas
        finish_reason = deltas[-1].finish_reason
        assert finish_reason is not None
        return Finished(
            events=tuple(event for delta in deltas for event in delta.events),
            token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
            finish_reason=finish_reason,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            stop_string=deltas[-1].stop_string,
            times=self._log.times,
            logprobs=None
            if deltas[-1].logprobs is None
            else tuple(found for delta in deltas for found in delta.logprobs or ()),
            prompt_logprobs=self.prompt_logprobs,
            embedding=self._log.embedding,
            attention=self._log.attention,
        )

    def __del__(self) -> None:
        if hasattr(self, "_abort"):
            self.abort()


class DeltaIterator:
    """One pass over a request's deltas, synchronous or asynchronous. Dropped or closed early, it aborts the request."""

    def __init__(self, handle: Handle):
        self._handle = handle
        self._log = handle._log
        self._index = 0

    def __iter__(self) -> DeltaIterator:
        return self

    def __next__(self) -> Delta:
        with _aborting(self._handle):
            self._log.outbox.wait(self._has_next)
        delta = self._take()
        if delta is None:
            raise StopIteration
        return delta

    def __aiter__(self) -> DeltaIterator:
        return self

    async def __anext__(self) -> Delta:
        with _aborting(self._handle):
            await self._log.outbox.wait_async(self._has_next)
        delta = self._take()
        if delta is None:
            raise StopAsyncIteration
        return delta

    def _has_next(self) -> bool:
        return self._log.done or self._index < len(self._log.deltas)

    def _take(self) -> Delta | None:
        """The delta that was waited for; None at the end, the request's error after the last one before it."""
        if self._index < len(self._log.deltas):
            self._index += 1
            return self._log.deltas[self._index - 1]
        self._handle._keep_alive = None
        if self._log.error is not None:
            _raise(self._log.error)
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


class HandleGroup:
    """The requests of one reply, consumed together: deltas of whichever request has some, in the order in which they
    came. Made of all the handles of one `Engine.submit_all`. To be consumed once, by one thread or task at a time.

    The first error of a request ends the consumption. An exception while waiting aborts every request.
    """

    def __init__(self, handles: Sequence[Handle]):
        self.handles = list(handles)
        self._outbox = self.handles[0]._log.outbox
        self._position = 0

    def abort(self) -> None:
        """Stop every request that still runs and free its memory. Idempotent, thread-safe."""
        for handle in self.handles:
            handle.abort()

    def results(self, timeout: float | None = None) -> list[Finished] | None:
        """Wait for the end of all; None if that takes more than `timeout` seconds. Raises the first error at once."""
        with _aborting(self):
            if not self._outbox.wait(self._is_over, timeout):
                return None
        return self._fold()

    async def aresults(self) -> list[Finished]:
        """Like `results`."""
        with _aborting(self):
            await self._outbox.wait_async(self._is_over)
        return self._fold()

    def next(self, timeout: float | None = None) -> list[tuple[int, Delta]] | None:
        """Wait for deltas that were not returned yet: (index of the request, delta) of each. An empty list when all
        requests are finished, None after `timeout` seconds. Raises the first error after the deltas before it."""
        with _aborting(self):
            if not self._outbox.wait(self._has_more, timeout):
                return None
        return self._take()

    async def anext(self) -> list[tuple[int, Delta]]:
        """Like `next`."""
        with _aborting(self):
            await self._outbox.wait_async(self._has_more)
        return self._take()

    def _is_over(self) -> bool:
        return self._outbox.unfinished == 0 or self._outbox.error is not None

    def _has_more(self) -> bool:
        return self._position < len(self._outbox.items) or self._outbox.unfinished == 0

    def _fold(self) -> list[Finished]:
        if self._outbox.error is not None:
            _raise(self._outbox.error)
        return [handle._fold() for handle in self.handles]

    def _take(self) -> list[tuple[int, Delta]]:
        taken: list[tuple[int, Delta]] = []
        items, owners = self._outbox.items[self._position :], self._outbox.owners[self._position :]
        for index, item in zip(owners, items, strict=False):  # an owner is there before its item
            if isinstance(item, Delta):
                taken.append((index, item))
            elif taken:
                break
            else:
                _raise(item)
        self._position += len(taken)
        return taken


def _raise(error: CaiError) -> None:
    """Raise a copy: the same exception raised in several threads would mix up their tracebacks, and keep their frames."""
    raise copy.copy(error).with_traceback(None) from error.__cause__


@contextlib.contextmanager
def _aborting(requests: Handle | HandleGroup) -> Iterator[None]:
    """Abort if the block raises: KeyboardInterrupt and CancelledError above all."""
    try:
        yield
    except BaseException:
        requests.abort()
        raise
