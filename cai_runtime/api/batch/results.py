"""Results of a batch as they come: an iterator that keeps the engine supplied while its caller goes through them."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from cai_runtime.api.batch.lines import BatchRequest, BatchResult

Line = BatchRequest | BatchResult  # a request, or the result that says why a line is none
Serve = Callable[[BatchRequest], Awaitable[BatchResult]]

KEPT = 8  # times the window: results that may wait, for their turn or to be taken
PULLS = 4  # lines read while a result waits to be taken
PREPARING = 2  # threads that render and tokenize: of more, the engine's own thread would be held up
SLICE = 0.5  # seconds after which a sleeping thread looks up, so that Ctrl-C is noticed


class Window:
    """What is under way, and what is to be handed out.

    Args:
        size: requests under way at once.
        ordered: whether results are handed out in the order of their requests, or as they come.
    """

    def __init__(self, size: int, ordered: bool):
        self._size = size
        self._ordered = ordered
        self._held: dict[int, BatchResult] = {}  # by place: what waits for one before it
        self._admitted = self._next = 0  # places
        self.under_way = 0
        self.ready: deque[BatchResult] = deque()

    @property
    def has_room(self) -> bool:
        return self.under_way < self._size and len(self._held) + len(self.ready) < KEPT * self._size

    def admit(self) -> int:
        """The place of another request."""
        self._admitted += 1
        self.under_way += 1
        return self._admitted - 1

    def arrive(self, place: int, result: BatchResult) -> None:
        """Take the result of the request of this place."""
        self.under_way -= 1
        if not self._ordered:
            self.ready.append(result)
            return
        self._held[place] = result
        while self._next in self._held:
            self.ready.append(self._held.pop(self._next))
            self._next += 1


class BatchResults:
    """Results of a batch: iterate them. A context manager; closing it, or dropping it before its end, aborts what still
    runs. Several threads may iterate it: each result goes to one of them.

    Lines are read in the caller's thread, as far ahead as the window goes. Requests are answered by an event loop in a
    thread of its own, so that it makes no difference whether the caller has one.
    """

    def __init__(self, lines: Generator[Line], serve: Serve, window: Window, bar: Any):
        self._lines = lines
        self._serve = serve
        self._window = window
        self._bar = bar
        self._loop: LoopThread | None = None
        # Of (place, result), or of an error that ends the batch.
        self._arrived: queue.SimpleQueue[tuple[int, BatchResult] | BaseException] = queue.SimpleQueue()
        self._turn = threading.RLock()  # of the thread that waits for the next result
        self._exhausted = self._closed = False

    def __iter__(self) -> BatchResults:
        return self

    def __next__(self) -> BatchResult:
        """The next result.

        Raises APIError if the client was closed meanwhile, and what the caller's own iterable raises."""
        try:
            with self._turn:
                while not self._closed:
                    self._pull()
                    self._collect()
                    if self._window.ready:
                        self._bar.update()
                        return self._window.ready.popleft()
                    if self._exhausted and not self._window.under_way:
                        break
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def _pull(self) -> None:
        """Read lines and have them answered: all that there is room for, but few while a result waits."""
        window, pulled = self._window, 0
        while not self._exhausted and window.has_room:
            if pulled >= PULLS and (window.ready or self._arrived.qsize()):
                return
            pulled += 1
            line = next(self._lines, None)
            if line is None:
                self._exhausted = True
            elif isinstance(line, BatchRequest):
                if self._loop is None:
                    self._loop = LoopThread()
                self._loop.start(partial(_answer, self._serve, window.admit(), line, self._arrived.put))
            else:
                window.arrive(window.admit(), line)

    def _collect(self) -> None:
        """Take the results that have arrived. Wait for one, at most a slice, if there is none to hand out."""
        wait = not self._window.ready
        while self._window.under_way:
            try:
                found = self._arrived.get(block=wait, timeout=SLICE)
            except queue.Empty:
                return
            if isinstance(found, BaseException):
                raise found
            self._window.arrive(*found)
            wait = False

    def close(self) -> None:
        """Abort what still runs. Idempotent; iteration ends."""
        self._closed = True
        if self._loop is not None:
            self._loop.stop()
            self._loop.join()
        with contextlib.suppress(ValueError):  # another thread is inside of the caller's generator
            self._lines.close()
        self._bar.close()

    def __enter__(self) -> BatchResults:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_loop", None) is not None:
            self._loop.stop()  # type: ignore[union-attr]


class AsyncBatchResults:
    """The same for `async for` and `async with`. Lines are read, and requests answered, by tasks of the running loop."""

    def __init__(self, lines: AsyncGenerator[Line], serve: Serve, window: Window, bar: Any):
        self._feed = _Feed(lines, serve, window)
        self._bar = bar

    def __aiter__(self) -> AsyncBatchResults:
        return self

    async def __anext__(self) -> BatchResult:
        """As `BatchResults.__next__`."""
        try:
            result = await self._feed.next()
        except BaseException:
            await self.close()
            raise
        if result is None:
            await self.close()
            raise StopAsyncIteration
        self._bar.update()
        return result

    async def close(self) -> None:
        """Abort what still runs. Idempotent; iteration ends."""
        await self._feed.close()
        self._bar.close()

    async def __aenter__(self) -> AsyncBatchResults:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if hasattr(self, "_feed"):
            self._feed.abandon()


class _Feed:
    """The tasks behind an AsyncBatchResults. They hold this and not the iterator, so that it is noticed when dropped."""

    def __init__(self, lines: AsyncGenerator[Line], serve: Serve, window: Window):
        self._lines = lines
        self._serve = serve
        self._window = window
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed, self._freed = asyncio.Event(), asyncio.Event()
        self._error: BaseException | None = None
        self._exhausted = self._closed = False

    async def next(self) -> BatchResult | None:
        """The next result; None at the end."""
        if self._loop is None and not self._closed:
            self._loop = asyncio.get_running_loop()
            self._start(self._read())
        while not self._closed:
            if self._error is not None:
                raise self._error
            if self._window.ready:
                self._freed.set()
                return self._window.ready.popleft()
            if self._exhausted and not self._window.under_way:
                break
            self._changed.clear()
            await self._changed.wait()
        return None

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self) -> None:
        """Read lines and have them answered, as far as there is room."""
        try:
            async for line in self._lines:
                while not self._window.has_room:
                    self._freed.clear()
                    await self._freed.wait()
                place = self._window.admit()
                if isinstance(line, BatchRequest):
                    self._start(_answer(self._serve, place, line, self._arrive))
                else:
                    self._arrive((place, line))
                await asyncio.sleep(0)  # a source that never waits must not hold up what runs
        except Exception as error:  # noqa: BLE001 - the caller's iterable's, raised in whoever awaits a result
            self._error = error
        self._exhausted = True
        self._changed.set()

    def _arrive(self, found: tuple[int, BatchResult] | BaseException) -> None:
        if isinstance(found, BaseException):
            self._error = found
        else:
            self._window.arrive(*found)
        self._freed.set()
        self._changed.set()

    async def close(self) -> None:
        self._cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(RuntimeError):  # another task is inside
            await self._lines.aclose()

    def _cancel(self) -> None:
        self._closed = True
        self._changed.set()
        for task in [*self._tasks]:
            task.cancel()

    def abandon(self) -> None:
        """Abort what still runs; from any thread, finalizers too; does not wait."""
        if self._tasks and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and its tasks are gone
                self._loop.call_soon_threadsafe(self._cancel)


async def _answer(
    serve: Serve,
    place: int,
    request: BatchRequest,
    put: Callable[[tuple[int, BatchResult] | BaseException], None],
) -> None:
    try:
        put((place, await serve(request)))
    except Exception as error:  # noqa: BLE001 - it ends the batch, in the thread that iterates
        put(error)


class LoopThread:
    """An event loop in a thread of its own. A daemon: nobody may be left to stop it when the interpreter exits."""

    def __init__(self) -> None:
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=_run_loop, args=(started,), name="cai-batch", daemon=True)
        self._thread.start()
        self._loop, self._stopping = started.result()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine; from any thread. After `stop` it never runs."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._create, make)

    def _create(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = self._loop.create_task(make())
        self._tasks.add(task)  # a loop holds its tasks weakly
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        """Cancel everything, and end. Idempotent; from any thread, finalizers too; does not wait."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stopping.set)

    def join(self) -> None:
        """Wait for the end."""
        if self._thread is not threading.current_thread():
            self._thread.join()


def _run_loop(started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    async def wait() -> None:
        loop, stopping = asyncio.get_running_loop(), asyncio.Event()
        loop.set_default_executor(ThreadPoolExecutor(PREPARING, thread_name_prefix="cai-batch-prepare"))
        started.set_result((loop, stopping))
        await stopping.wait()

    asyncio.run(wait())  # which cancels the tasks that are left
