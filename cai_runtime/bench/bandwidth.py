"""Measures memory bandwidth and matrix rate: the floors of decode, which reads all weights once, and of prefill."""

from __future__ import annotations

import time
from collections.abc import Callable

MIN_BUFFER = 512 << 20
PASSES = 5
LONGEST = 2.0  # seconds of matrix products, after which no further pass begins
MATRIX = {"cpu": 1536, "cuda": 8192}  # rows and columns of the square matrices
MATRIX_DTYPES = ("float32", "bfloat16")


def read_bandwidth(device: str = "cpu", *, threads: int | None = None, buffer_bytes: int | None = None) -> float:
    """Bytes per second of a streaming read.

    torch sums an fp32 buffer, takes its maximum and its dot product with itself, five times each. The fastest pass counts:
    a reduction can't read faster than the memory, and other work can only slow it down. The buffer has at least 512 MiB and
    eight times the last-level cache; on a GPU 2 GiB. On a CPU it lies in huge pages if the system has them, as packed
    weights do: through 4 KiB pages some machines read up to a quarter less.

    threads: sets torch's number of threads, for good; None leaves it.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    reads, nbytes = streaming_reads(device, buffer_bytes=buffer_bytes)
    with torch.inference_mode():
        return nbytes / min(_seconds(read, device) for read in reads for _ in range(PASSES))


def streaming_read(device: str = "cpu", *, buffer_bytes: int | None = None) -> tuple[Callable[[], object], int]:
    """(the fastest of `read_bandwidth`'s reads, to be timed between other work; the bytes that it reads)."""
    import torch

    reads, nbytes = streaming_reads(device, buffer_bytes=buffer_bytes)
    with torch.inference_mode():
        return min(reads, key=lambda read: min(_seconds(read, device) for _ in range(PASSES))), nbytes


def streaming_reads(device: str, *, buffer_bytes: int | None = None) -> tuple[list[Callable[[], object]], int]:
    """(the reads that `read_bandwidth` times; the bytes that each reads)."""
    import torch

    from cai_runtime.bench.machine import last_level_cache
    from cai_runtime.kernels.cpu_library import system_memory

    on_gpu = device.startswith("cuda")
    wanted = buffer_bytes or (2 << 30 if on_gpu else max(MIN_BUFFER, 8 * last_level_cache()))
    if on_gpu:
        x = torch.ones(wanted // 4, dtype=torch.float32, device=device)
    else:
        x = torch.frombuffer(system_memory(wanted), dtype=torch.float32, count=wanted // 4).fill_(1)
    return [x.sum, x.amax, lambda: torch.dot(x, x)], x.nbytes


def _seconds(read: Callable[[], object], device: str) -> float:
    import torch

    start = time.perf_counter()
    read()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matmul_rates(device: str = "cpu", *, threads: int | None = None, size: int | None = None) -> dict[str, float]:
    """Operations per second of torch's matrix product in fp32 and bf16, by dtype. A multiply-add is two operations.

    The matrices have `size` rows and columns; default 1536 on a CPU and 8192 on a GPU, enough for the best rate. The fastest
    of six passes counts, of fewer where they take more than two seconds: without bf16 instructions a pass may take ten. The
    bf16 rate shows whether the processor has them. threads: as in `read_bandwidth`.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    on_gpu = device.startswith("cuda")
    n = size or MATRIX["cuda" if on_gpu else "cpu"]
    rates = {}
    with torch.inference_mode():
        for name in MATRIX_DTYPES:
            a, b = (torch.rand(n, n, device=device).to(getattr(torch, name)) for _ in range(2))
            out = torch.empty_like(a)
            seconds: list[float] = []  # the first pass warms up, and counts where no other comes in time
            while len(seconds) <= PASSES and sum(seconds) < LONGEST:
                start = time.perf_counter()
                torch.mm(a, b, out=out)
                if on_gpu:
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - start)
            rates[name] = 2 * n**3 / min(seconds)
    return rates
