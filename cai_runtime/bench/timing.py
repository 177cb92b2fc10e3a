"""How short pieces of work are timed, side by side.

Every contender is a list of calls that do the same work on data of their own, which together exceed the last cache several
times over (`rotation`): going through them in turn, each call reads memory, as it would in a model. Contenders take turns
too, in rounds, so that a machine that slows down or speeds up does it to all. A turn begins with calls that are not timed:
the thread pool of the one before may still be spinning, and on a GPU clocks rise.

On a CPU every call is timed by itself. On a GPU all calls of a contender are captured into one CUDA graph; what is timed is
the graph, by events, and divided by its calls: no launch from Python is in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from cai_runtime.bench.machine import available_memory, cache_bytes
from cai_runtime.errors import BenchmarkError, KernelError

CACHE_FACTOR = 8  # data that is rotated, over the last cache
MAX_SETS = 512  # of data that is so small that its calls measure the call
MEMORY_SHARE = 0.5  # of what is available, that all contenders together may take
SETTLE_SECONDS = 0.01
ENOUGH_SECONDS = 5.0
LONG_CALL = 0.1  # seconds; after such a call nothing of the contender before it is left

Call = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Seconds of every timed call (on a GPU: of every replay, over its calls)."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class Schedule:
    """`seconds` of timed calls for each contender, divided into `rounds` turns; a turn has at least one call."""

    rounds: int = 5
    seconds: float = 0.25

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise BenchmarkError(f"rounds is {self.rounds}; it is at least 1")
        if not 0 <= self.seconds < math.inf:
            raise BenchmarkError(f"seconds is {self.seconds}; it is 0 or more")


def rotation(sizes: Sequence[int], device: str, *, available: int | None = None) -> list[int]:
    """How many sets of data each contender rotates through, given the bytes of one set of each.

    Enough that they exceed eight times the last-level cache (L2 on a GPU), at most 512, and bounded by memory: half of
    what is available is divided so that everyone has one set and an equal share of the rest for more.

    Raises BenchmarkError when one set of each doesn't fit.
    """
    budget = MEMORY_SHARE * (available_memory(device) if available is None else available)
    once = sum(sizes)
    if once > budget:
        raise BenchmarkError(
            f"the weights take {once / 1e9:.1f} GB and half of the available memory is {budget / 1e9:.1f} GB: "
            "compare fewer at once (fewer stores, a smaller shape, --no-peers)"
        )
    spare = (budget - once) / max(len(sizes), 1)
    wanted = CACHE_FACTOR * cache_bytes(device)
    return [1 + max(0, min(math.ceil(wanted / size), MAX_SETS, 1 + int(spare // size)) - 1) for size in sizes]


def interleaved(
    clocks: Sequence[Clock], schedule: Schedule, *, after_turn: Callable[[int], None] | None = None
) -> list[Times]:
    """Times of every contender, taken in rounds; one that has been timed for five seconds (twenty times its share, if that
    is more) sits the others out. after_turn: told the contender's index after each of its turns."""
    enough = max(ENOUGH_SECONDS, 20 * schedule.seconds)
    found: list[list[float]] = [[] for _ in clocks]
    for _ in range(schedule.rounds):
        for index, clock in enumerate(clocks):
            if sum(found[index]) < enough:
                clock.settle()
                end = time.perf_counter() + schedule.seconds / schedule.rounds
                found[index].append(clock.sample())
                while time.perf_counter() < end:
                    found[index].append(clock.sample())
            if after_turn is not None:
                after_turn(index)
    return [Times(tuple(seconds)) for seconds in found]


class Clock(Protocol):
    def settle(self) -> None:
        """Untimed calls, until what ran before no longer matters."""
        ...

    def sample(self) -> float:
        """Seconds of a call."""
        ...


def make_clock(calls: Sequence[Call], device: str) -> Clock:
    """The clock of the device. Raises KernelError when a GPU's calls can't be captured into a graph."""
    if not device.startswith("cuda"):
        return CallClock(calls)
    try:
        return GraphClock(calls, device)
    except RuntimeError as error:  # what torch raises for an operation that must wait for the GPU, and the like
        raise KernelError(f"can't be captured into a CUDA graph: {str(error).splitlines()[0]}") from error


class CallClock:
    """Times one call after the other."""

    def __init__(self, calls: Sequence[Call]):
        self._calls, self._next, self._last = calls, 0, 0.0

    def sample(self) -> float:
        call = self._calls[self._next]
        self._next = (self._next + 1) % len(self._calls)
        start = time.perf_counter()
        call()
        self._last = time.perf_counter() - start
        return self._last

    def settle(self) -> None:
        if self._last > LONG_CALL:
            return
        end = time.perf_counter() + SETTLE_SECONDS
        while time.perf_counter() < end:
            self.sample()


class GraphClock:
    """Times the replay of a CUDA graph that makes all calls. The results of the calls live as long as the clock."""

    def __init__(self, calls: Sequence[Call], device: str):
        import torch

        self._calls = calls  # what the graph reads must stay
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for call in calls:  # compiles, loads modules, fills the allocator
                    call()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = [call() for call in calls]
            self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self) -> float:
        self._begin.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3 / len(self._calls)

    def settle(self) -> None:
        self.sample()


@contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """torch and the CPU kernels with `threads` threads (default: those this process may use), put back afterwards."""
    import torch

    from cai_runtime.bench.machine import usable_threads
    from cai_runtime.kernels import cpu_library

    wanted = usable_threads() if threads is None else threads
    if wanted < 1:
        raise BenchmarkError(f"threads is {wanted}; it must be at least 1")
    ours = cpu_library.num_threads() if cpu_library.available() else None
    theirs = torch.get_num_threads()
    try:
        torch.set_num_threads(wanted)
        if ours is not None:
            cpu_library.set_num_threads(wanted)
        yield wanted
    finally:
        torch.set_num_threads(theirs)
        if ours is not None:
            cpu_library.set_num_threads(ours)
