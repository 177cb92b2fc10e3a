"""How fast memory can be read: the floor under every decode step, which reads all weights once."""

from __future__ import annotations

import time
from collections.abc import Callable

MIN_BUFFER = 512 << 20
PASSES = 5


def read_bandwidth(device: str = "cpu", *, threads: int | None = None, buffer_bytes: int | None = None) -> float:
    """Bytes per second of a streaming read with `threads` threads (default: as torch is set; it is left so).

    A fp32 buffer of at least 512 MiB and eight times the last-level cache is summed, multiplied with itself and
    searched for its maximum by torch, each several times; the fastest pass counts. A reduction can't read faster than
    the memory, so every pass is a lower bound, and other work on the machine can only lower it. On a GPU, 2 GiB.
    """
    import torch

    from cai_runtime.bench.machine import last_level_cache

    if threads is not None:
        torch.set_num_threads(threads)
    on_gpu = device.startswith("cuda")
    wanted = buffer_bytes or (2 << 30 if on_gpu else max(MIN_BUFFER, 8 * last_level_cache()))
    x = torch.ones(wanted // 4, dtype=torch.float32, device=device)
    reductions: list[Callable[[], torch.Tensor]] = [x.sum, x.amax, lambda: torch.dot(x, x)]

    def seconds(reduce: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        reduce()
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.inference_mode():
        fastest = min(seconds(reduce) for reduce in reductions for _ in range(PASSES))
    return x.nbytes / fastest
