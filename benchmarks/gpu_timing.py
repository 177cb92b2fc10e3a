"""Timing on a GPU for gpu_suite.py: device events, CUDA graphs over inputs larger than the caches, the copy bandwidth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

L2_FACTOR = 4  # sets of inputs together hold this many times the L2 cache


def sets_needed(nbytes: int) -> int:
    """How many inputs of `nbytes` to walk through, so that none is still in the L2 cache when its turn comes."""
    import torch

    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, math.ceil(L2_FACTOR * l2 / max(nbytes, 1)))


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of `run` on the GPU, by events, after three runs that don't count."""
    import torch

    times = []
    for i in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def graph_seconds(calls: Sequence[Callable[[], Any]], repeats: int = 20) -> float:
    """Seconds per call, of a CUDA graph that makes all of them in turn; every call reads memory of its own."""
    import torch

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


def copy_bandwidth() -> dict[str, float]:
    """Bytes a second of a device-to-device copy of 4 GiB, read plus written: the ceiling that everything is held to. And of
    reading alone, by a sum, which a GEMV is closer to."""
    import torch

    size = 4 << 30
    a = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    copied = 2 * size / median_seconds(lambda: b.copy_(a), 20)
    words = a.view(torch.float32).nan_to_num_(0.0, 0.0, 0.0)
    read = size / median_seconds(lambda: words.sum(), 20)
    print(f"copy: {copied / 1e9:.0f} GB/s read and written; a sum reads {read / 1e9:.0f} GB/s", flush=True)
    return {"bytes_per_second": copied, "read_bytes_per_second": read}
