"""Times short calls of several contenders side by side.

A contender is a list of calls that do the same work on different data. The data together exceed the last-level cache several
times (`rotation`), so each call reads from memory, as in a model. Contenders take turns in rounds, so that a change of the
machine's speed affects all. A turn begins with untimed calls: the last contender's thread pool may still be spinning, and a
GPU's clocks must rise.

On a CPU every call is timed alone. On a GPU one CUDA graph holds all calls of a contender; events time a replay, and the
time is divided by the number of calls. No launch from Python is in it. The graph's kernels are counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from cai_runtime.bench.cuda_graph import count_kernels
from cai_runtime.bench.machine import available_memory, cache_bytes
from cai_runtime.errors import BenchmarkError, KernelError

CACHE_FACTOR = 8  # rotated data over the last-level cache, in bytes
MAX_SETS = 512  # reached only by data so small that overhead dominates the call
MEMORY_SHARE = 0.5  # of the available memory, for all contenders together
SETTLE_SECONDS = 0.01
ENOUGH_SECONDS = 5.0
LONG_CALL = 0.1  # seconds; a call this long needs no untimed ones before it

Call = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Seconds of every timed call; on a GPU, of every replay divided by its number of calls."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class Schedule:
    """`seconds` of timed calls per contender, divided into `rounds` turns of at least one call.

    Raises BenchmarkError for a value out of range.
    """

    rounds: int = 5
    seconds: float = 0.25

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise BenchmarkError(f"rounds is {self.rounds}; it is at least 1")
        if not 0 <= self.seconds < math.inf:
            raise BenchmarkError(f"seconds is {self.seconds}; it is 0 or more")


def rotation(sizes: Sequence[int], device: str, *, available: int | None = None) -> list[int]:
    """The number of data sets that each contender rotates through.

    sizes: bytes of one set of each contender. available: bytes of free memory; None asks the system.

    A contender gets enough sets to exceed eight times the last-level cache (L2 on a GPU), at most 512. Half of the available
    memory limits them: each contender has one set and an equal share of the rest.

    Raises BenchmarkError if one set of each does not fit.
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
    """Time all contenders in rounds.

    A contender that has been timed for five seconds, or twenty times its share if that is more, skips its further turns.
    after_turn: called with the contender's index after each turn.
    """
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
    launches: float | None  # kernels of a call on a GPU; None on a CPU, or if the driver does not say

    def settle(self) -> None:
        """Make untimed calls until the last contender's work no longer has an effect."""
        ...

    def sample(self) -> float:
        """Make a timed call and return its seconds."""
        ...


def make_clock(calls: Sequence[Call], device: str) -> Clock:
    """A clock for the device. Raises KernelError if a GPU's calls can't be captured into a CUDA graph."""
    if not device.startswith("cuda"):
        return CallClock(calls)
    try:
        return GraphClock(calls, device)
    except RuntimeError as error:  # such as torch's error for an operation that waits for the GPU
        raise KernelError(f"can't be captured into a CUDA graph: {str(error).splitlines()[0]}") from error


class CallClock:
    """Times single calls on a CPU, going through the data sets."""

    launches: float | None = None

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
    """Times replays of a CUDA graph of all calls. The calls' results live as long as the clock."""

    def __init__(self, calls: Sequence[Call], device: str):
        import torch

        self._calls = calls  # keeps the tensors alive that the graph reads
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for call in calls:  # compiles kernels, loads modules and fills the allocator before the capture
                    call()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(self._graph):
                self._results = [call() for call in calls]
            kernels = count_kernels(self._graph)
            self.launches: float | None = None if kernels is None else kernels / len(calls)
            self._graph.instantiate()
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
    """Run torch and the CPU kernels with `threads` threads, then restore their numbers. Gives the number.

    threads: None is all that this process may use. Raises BenchmarkError for fewer than 1.
    """
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
