"""A thread that runs passes and sampling in order, so that the engine's own work goes on beside them."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar, cast

from cai_runtime.engine.runner import Pass, PendingSampled, Runner, SimpleRunner, sampler_of
from cai_runtime.engine.step import ScheduledSequence, Step
from cai_runtime.errors import RunnerError
from cai_runtime.kernels.sampling import Sampled, SamplingBatch

T = TypeVar("T")

SMALL = 2  # sequences of a step beside which the engine has little to do


class Promise(Generic[T]):
    """What a call returns or raises, once it is done. Waited for by the thread that submitted it."""

    def __init__(self, call: Callable[[], T]):
        self._call: Callable[[], T] | None = call
        self._pending: threading.Lock | None = None  # held until the call is done: cheaper than an event
        self._value: T
        self._error: BaseException | None = None
        self.first: Callable[[], None] | None = None  # carries the call out, if nobody has by the time it is waited for

    def for_thread(self) -> Promise[T]:
        """Itself, to be settled by another thread than the one that waits."""
        self._pending = threading.Lock()
        self._pending.acquire()
        self.first = None
        return self

    def settle(self) -> None:
        call, self._call = self._call, None  # what it holds would live as long as the result
        assert call is not None
        try:
            self._value = call()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error
        if self._pending is not None:
            self._pending.release()

    def done(self) -> None:
        """Until the call is done."""
        if self._pending is not None:
            with self._pending:
                pass

    def wait(self) -> T:
        if self.first is not None:
            self.first()
        self.done()
        if self._error is not None:
            raise self._error
        return self._value


class Done(Generic[T]):
    """What is there already, or on its way on a device."""

    seats: list[int]  # of its rows

    def __init__(self, value: T):
        self._value = value

    def wait(self) -> T:
        return self._value


class CallThread:
    """Carries out calls in order. The thread begins with the first call that is not small, and ends with `close`."""

    def __init__(self, name: str):
        self._name = name
        self._calls: queue.SimpleQueue[Promise[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._small: list[Promise[Any]] = []  # not begun
        self._last: Promise[Any] | None = None  # of those in the thread
        self._closed = False

    def submit(self, call: Callable[[], T], *, small: bool = False) -> Promise[T]:
        """Queue a call. From one thread only. small: there is so little to do beside it that the change of threads would
        cost more: it is carried out when it is waited for, or when a larger call follows."""
        if self._closed:
            raise RuntimeError("the runner is closed")
        promise = Promise(call)
        if small:
            promise.first = self._settle_small
            self._small.append(promise)
            return promise
        if self._thread is None:
            # Not a daemon: those are killed inside native code at exit. It ends with the engine, which closes its runner.
            self._thread = threading.Thread(target=_carry_out, args=(self._calls,), name=self._name, daemon=False)
            self._thread.start()
        for earlier in self._small:
            self._calls.put(earlier.for_thread())
        self._small.clear()
        self._calls.put(promise.for_thread())
        self._last = promise
        return promise

    def _settle_small(self) -> None:
        small, self._small = self._small, []
        if self._last is not None:
            self._last.done()
            self._last = None
        for promise in small:
            promise.first = None
            promise.settle()

    def close(self) -> None:
        """Return when all calls are done. Idempotent."""
        self._closed = True
        self._settle_small()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._calls.put(None)
            thread.join()


def _carry_out(calls: queue.SimpleQueue[Promise[Any] | None]) -> None:
    while (promise := calls.get()) is not None:
        promise.settle()
        del promise  # and with it a step's tensors, which would live until the next one


class RunnerThread:
    """A `Runner` over a `SimpleRunner`, whose passes and sampling run in a thread of their own."""

    def __init__(self, simple: SimpleRunner):
        self._simple = simple
        self.page_size, self.num_pages = simple.page_size, simple.num_pages
        self.vocab_size, self.max_context = simple.vocab_size, simple.max_context
        self._thread = CallThread(f"cai-runner-{id(self):x}")
        self._pages: defaultdict[int, list[int]] = defaultdict(list)  # by seat
        sampler_of(simple)  # loads what it needs, so that no step pays for it

    def launch(self, step: Step) -> Promise[Any]:
        for change in step.pages:
            self._pages[change.seat][change.at : change.at + len(change.pages)] = change.pages
        copies = [(copy.source, copy.target) for copy in step.copies]
        feeds = [ScheduledSequence(f.ids, f.start, self._pages[f.seat], f.wanted) for f in step.feeds]
        return self._thread.submit(partial(self._run, feeds, step.rows, copies), small=len(feeds) <= SMALL)

    def _run(self, feeds: list[ScheduledSequence], rows: int, copies: list[tuple[int, int]]) -> Any:
        if copies:
            cast(Any, self._simple).copy_pages(copies)  # which the engine has found that it can
        logits = self._simple.run(feeds)
        expected = (rows, self._simple.vocab_size)
        found = getattr(logits, "shape", None)
        if found is None or tuple(found) != expected:
            raise RunnerError(f"the runner returned logits of shape {found and tuple(found)} instead of {expected}")
        return logits

    def sample(self, made: Pass, batch: SamplingBatch) -> PendingSampled:
        return self._thread.submit(partial(self._sample, made, batch), small=len(batch) <= SMALL)

    def _sample(self, made: Pass, batch: SamplingBatch) -> Sampled:
        return sampler_of(self._simple)(made.wait(), batch).wait()

    def close(self) -> None:
        self._thread.close()
        self._simple.close()


def launching(runner: Runner | SimpleRunner) -> Runner:
    """The runner itself, or a simple one with a thread of its own."""
    return cast(Runner, runner) if hasattr(runner, "launch") else RunnerThread(cast(SimpleRunner, runner))
