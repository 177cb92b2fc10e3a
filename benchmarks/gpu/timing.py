"""Timing on a GPU: device events, and CUDA graphs over inputs larger than the caches. On the CPU, in a rehearsal, each
call is made once and timed by the clock; such figures say nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

L2_FACTOR = 4  # sets of inputs together hold this many times the L2 cache
WARM_SECONDS = 0.03  # of work before any that counts: an idle GPU takes milliseconds to raise its clock
WAIT_CYCLES = 500_000  # about a quarter of a millisecond, longer than the host takes to launch a graph


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def sets_needed(nbytes: int) -> int:
    """How many inputs of `nbytes` to walk through, so that none is still in the L2 cache when its turn comes."""
    import torch

    if not _on_gpu():
        return 2
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, math.ceil(L2_FACTOR * l2 / max(nbytes, 1)))


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of `run` on the GPU, by events, after WARM_SECONDS of runs that don't count.

    A kernel that does nothing but wait goes before each, so that all of `run` is queued when the first event passes: else
    the host's time for a launch, microseconds, would count as the GPU's."""
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
    """Seconds per call, of a CUDA graph that makes all of them in turn; every call reads memory of its own."""
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
    """Give the allocator's unused memory back, between models."""
    import gc

    import torch

    gc.collect()
    if _on_gpu():
        torch.cuda.empty_cache()
