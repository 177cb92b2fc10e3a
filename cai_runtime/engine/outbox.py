"""From the engine's thread to whoever waits: the deltas of a step are handed over together, and each waiter wakes once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from cai_runtime.engine.lifetime import check_same_process
from cai_runtime.engine.request import Delta, TokenLogprobs
from cai_runtime.engine.stats import RequestTimes
from cai_runtime.errors import CaiError

# Seconds after which a sleeping thread looks up. A signal does not end a sleep that begins just after it came, and on
# Windows none: this bounds how long Ctrl-C can go unnoticed.
_SLICE = 0.5


class TokenLog:
    """Everything that a request has put out, in order. Readers keep their own place, so the log is a record rather than
    a queue. `deliver` writes it.

    outbox: shared by the requests of one reply; None: one of its own. index: which of them this is.
    """

    def __init__(self, outbox: Outbox | None = None, index: int = 0) -> None:
        self.deltas: list[Delta] = []
        self.error: CaiError | None = None  # every reader gets it after the deltas
        self.done = False  # nothing will be added any more
        self.cached_tokens = 0  # prompt tokens found in the prefix cache
        # Of the prompt's tokens, where the request wants them; there before the first delta.
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.embedding: Any = None  # of the prompt, where the request wants it; there before the last delta
        self.attention: Any = None  # likewise
        self.times = RequestTimes()
        self.outbox = outbox or Outbox()
        self.index = index
        self.outbox.unfinished += 1


@dataclass(eq=False)
class _Waiter:
    """A thread or a task that waits until `ready()`. `ready` must stay true once it is."""

    ready: Callable[[], bool]
    loop: asyncio.AbstractEventLoop | None = None  # of a task
    future: asyncio.Future[None] | None = None
    gate: threading.Lock = field(default_factory=threading.Lock)  # of a thread, which waits until it is released


class Outbox:
    """What the requests of one reply have put out, in the order in which it came, and who waits for it."""

    def __init__(self) -> None:
        self.items: list[Delta | CaiError] = []
        self.owners: list[int] = []  # of each item, the index of the request; at least as many as there are items
        self.unfinished = 0  # requests that are not done
        self.error: CaiError | None = None  # the first that a request failed with
        self._waiters: list[_Waiter] = []
        self._process = os.getpid()
        # Reentrant: a signal handler may use the reply that it interrupts the wait for.
        self._lock = threading.RLock()

    def add(self, log: TokenLog, item: Delta | CaiError) -> None:
        """Append to a log. By the engine's thread alone, without the lock: a reader sees each list grow, and `done` last."""
        self.owners.append(log.index)
        if type(item) is Delta:
            log.deltas.append(item)
            self.items.append(item)
            if item.finish_reason is None:
                return
        else:
            assert isinstance(item, CaiError)
            log.error = item
            self.error = self.error or item
            self.items.append(item)
        log.done = True
        self.unfinished -= 1

    def ready_waiters(self) -> list[_Waiter]:
        """The waiters that are ready now, which are waiters no longer."""
        if not self._waiters:  # whoever comes now looks at the logs after it became a waiter
            return []
        with self._lock:
            ready = [waiter for waiter in self._waiters if waiter.ready()]
            if ready:
                self._waiters = [waiter for waiter in self._waiters if waiter not in ready]
            return ready

    def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Block until `ready()`, which may depend on this outbox and its logs. False after `timeout` seconds.

        Raises EngineClosedError in a forked child, where nobody would wake the caller."""
        check_same_process(self._process)
        if ready():
            return True
        waiter = _Waiter(ready)
        waiter.gate.acquire()
        with self._lock:
            self._waiters.append(waiter)
        end = None if timeout is None else time.monotonic() + timeout
        try:
            while not ready() and (end is None or time.monotonic() < end):
                left = _SLICE if end is None else min(_SLICE, end - time.monotonic())
                waiter.gate.acquire(timeout=max(left, 0))
        finally:
            self._remove(waiter)
        return ready()

    async def wait_async(self, ready: Callable[[], bool]) -> None:
        """The same without blocking the running event loop."""
        check_same_process(self._process)
        if ready():
            return
        loop = asyncio.get_running_loop()
        waiter = _Waiter(ready, loop, loop.create_future())
        with self._lock:
            self._waiters.append(waiter)
        try:
            assert waiter.future is not None
            if not ready():
                await waiter.future
        finally:
            self._remove(waiter)

    def _remove(self, waiter: _Waiter) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._waiters.remove(waiter)


def deliver(outputs: Iterable[tuple[TokenLog, Delta | CaiError]]) -> None:
    """Hand over what a step has put out: a delta, of which one with a finish reason is a log's last, or the error that
    ends it. Wakes each waiting thread once, each event loop once for all its tasks, and nobody for whom it changes
    nothing. Never waits for a reader."""
    outboxes: dict[Outbox, None] = {}
    for log, item in outputs:
        outbox = log.outbox
        outbox.add(log, item)
        outboxes[outbox] = None
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for outbox in outboxes:
        for waiter in outbox.ready_waiters():
            if waiter.loop is None or waiter.future is None:
                waiter.gate.release()
            else:
                by_loop.setdefault(waiter.loop, []).append(waiter.future)
    for loop, futures in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed under its tasks
            loop.call_soon_threadsafe(_set_done, futures)


def _set_done(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
