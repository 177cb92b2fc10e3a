"""From the engine's thread to whoever waits: the deltas of a step are handed over together, and each waiter wakes once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cai_runtime.engine.lifetime import check_same_process
from cai_runtime.engine.request import Delta
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
        self.entries: list[tuple[int, Delta | CaiError]] = []  # (index of the request, what it put out)
        self.unfinished = 0  # requests that are not done
        self.error: CaiError | None = None  # the first that a request failed with
        self._waiters: list[_Waiter] = []
        self._process = os.getpid()
        # Reentrant: a signal handler may use the reply that it interrupts the wait for.
        self._lock = threading.RLock()

    def add(self, outputs: Iterable[tuple[TokenLog, Delta | CaiError]]) -> list[_Waiter]:
        """Append to the logs; return the waiters that are ready now, which are waiters no longer."""
        with self._lock:
            for log, item in outputs:
                if isinstance(item, Delta):
                    log.deltas.append(item)
                    log.done = item.finish_reason is not None
                else:
                    log.error, log.done = item, True
                    self.error = self.error or item
                self.entries.append((log.index, item))
                self.unfinished -= log.done
            ready = [waiter for waiter in self._waiters if waiter.ready()]
            if ready:
                self._waiters = [waiter for waiter in self._waiters if waiter not in ready]
            return ready

    def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Block until `ready()`, which may depend on this outbox and its logs. False after `timeout` seconds.

        Raises EngineClosedError in a forked child, where nobody would wake the caller."""
        check_same_process(self._process)
        with self._lock:
            if ready():
                return True
            waiter = _Waiter(ready)
            waiter.gate.acquire()
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
        loop = asyncio.get_running_loop()
        with self._lock:
            if ready():
                return
            waiter = _Waiter(ready, loop, loop.create_future())
            self._waiters.append(waiter)
        try:
            assert waiter.future is not None
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
    by_outbox: dict[Outbox, list[tuple[TokenLog, Delta | CaiError]]] = {}
    for log, item in outputs:
        by_outbox.setdefault(log.outbox, []).append((log, item))
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for outbox, items in by_outbox.items():
        for waiter in outbox.add(items):
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
