"""Times calls on a GPU by device events, and by CUDA graphs over inputs larger than the caches. On the CPU, in a rehearsal,
each call is made once and timed by the clock. Such figures mean nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

L2_FACTOR = 4  # all sets of inputs together are this many times as large as the L2 cache
WARM_SECONDS = 0.03  # of untimed work first: an idle GPU takes milliseconds to raise its clock
WAIT_CYCLES = 500_000  # about a quarter of a millisecond: longer than the host takes to launch a graph


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def sets_needed(nbytes: int) -> int:
    """How many sets of inputs of `nbytes` to use in turn, so that none is still in the L2 cache when it is used again."""
    import torch

    if not _on_gpu():
        return 2
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, math.ceil(L2_FACTOR * l2 / max(nbytes, 1)))


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median seconds of `run` on the GPU, by events, after WARM_SECONDS of untimed runs.

    A waiting kernel precedes each run, so that all of `run` is queued when the first event passes. Otherwise the host's time
    for launches, microseconds each, would count as the GPU's."""
    import torch

    if not _on_gpu():
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    began, ran = time.perf_counter(), 0
    while ran < 3 or time.perf_counter() - began < WARM_SECONDS:
        run()
        torch.cuda.synchronize()
        ran += 1
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def graph_seconds(calls: Sequence[Callable[[], Any]], repeats: int = 20) -> float:
    """Seconds per call of a CUDA graph that makes all calls in turn. Each call should read inputs of its own."""
    import torch

    if not _on_gpu():
        return median_seconds(calls[0], 1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # compiles, loads modules, fills the allocator
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_seconds(graph.replay, repeats) / len(calls)


def release() -> None:
    """Free the memory of a model that is no longer used, before the next is opened."""
    import gc

    import torch

    gc.collect()
    if _on_gpu():
        torch.cuda.empty_cache()
