"""Measures the machine's limits, which predictions build on.

Bandwidth of copies and of reads, also of reads by few or many programs; bf16 matrix products; the time of a launch in a
graph, with and without programmatic dependent launch; a barrier across all multiprocessors."""

from __future__ import annotations

from typing import Any

from gpu.context import Context
from gpu.report import Findings
from gpu.timing import graph_seconds, median_seconds

LAUNCHES = 200  # in one graph
BARRIERS = 200  # in one launch


def run(findings: Findings, context: Context) -> None:
    findings.attempt("copy", lambda: findings.add(**copy_bandwidth(context)))
    findings.attempt("read", lambda: findings.add(**read_bandwidth(context)))
    findings.attempt("matmul", lambda: findings.add(**matmul(context)))
    findings.attempt("launches", lambda: _launches(findings, context))
    findings.attempt("read by programs", lambda: _reads(findings, context))
    if not context.rehearsal:  # the interpreter runs programs in turn: the first would wait for ever
        findings.attempt("barrier", lambda: _barrier(findings))


def copy_bandwidth(context: Context) -> dict[str, Any]:
    """Bytes per second of a copy on the device, read plus written. Other bandwidths are given as fractions of it."""
    import torch

    size = context.scale.copy_bytes
    a = torch.randint(0, 255, (size,), dtype=torch.uint8, device=context.device)
    b = torch.empty_like(a)
    return {"what": "copy", "bytes_per_second": 2 * size / median_seconds(lambda: b.copy_(a), 20)}


def read_bandwidth(context: Context) -> dict[str, Any]:
    """Bytes per second of a sum, which only reads, as a matrix-vector product nearly does."""
    import torch

    words = torch.randn(context.scale.copy_bytes // 4, device=context.device)
    return {"what": "read", "bytes_per_second": words.nbytes / median_seconds(lambda: words.sum(), 20)}


def matmul(context: Context) -> dict[str, Any]:
    """Operations per second of cuBLAS's square bf16 matrix product, on random data."""
    import torch

    n = 64 if context.rehearsal else 8192
    a, b = (torch.randn(n, n, device=context.device).bfloat16() for _ in range(2))
    return {"what": "matmul bf16", "size": n, "flops_per_second": 2 * n**3 / median_seconds(lambda: a @ b, 10)}


def _launches(findings: Findings, context: Context) -> None:
    """Microseconds from one launch to the next, of empty kernels in a graph."""
    import torch

    from gpu.roof_kernels import nothing, nothing_dependent

    x = torch.zeros(1, device=context.device)
    for programs in (1, 132):
        calls = [lambda n=programs: nothing[(n,)](x, num_warps=4)] * LAUNCHES
        findings.add(what="launch", dependent=False, programs=programs, microseconds=1e6 * graph_seconds(calls))
        if not context.rehearsal:
            calls = [lambda n=programs: nothing_dependent[(n,)](x, num_warps=4, launch_pdl=True)] * LAUNCHES
            findings.add(what="launch", dependent=True, programs=programs, microseconds=1e6 * graph_seconds(calls))


def _reads(findings: Findings, context: Context) -> None:
    """Read bandwidth by the number of programs and the bytes that each requests at once."""
    import torch

    from gpu.roof_kernels import read

    x = torch.randint(0, 100, (context.scale.copy_bytes // 16,), dtype=torch.int32, device=context.device)
    grids = (2,) if context.rehearsal else (33, 66, 132, 264, 528)
    for programs in grids:
        for block in (1024, 4096) if context.rehearsal else (1024, 2048, 4096, 8192):
            out = torch.zeros(programs, dtype=torch.int32, device=context.device)
            steps = x.numel() // (programs * block)

            def call(p: int = programs, b: int = block, n: int = steps, o: Any = out) -> None:
                read[(p,)](x, o, n, BLOCK=b, num_warps=4)

            seconds = median_seconds(call, 10)
            rate = 4 * programs * block * steps / seconds
            findings.add(what="read by programs", programs=programs, bytes_at_once=4 * block, bytes_per_second=rate)


def _barrier(findings: Findings) -> None:
    """Microseconds of a barrier by an atomic counter, with one program per multiprocessor."""
    import torch

    from gpu.roof_kernels import barriers

    programs = torch.cuda.get_device_properties(0).multi_processor_count
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")

    def call() -> None:
        counter.zero_()
        barriers[(programs,)](counter, programs, BARRIERS, num_warps=4)

    findings.add(what="barrier", programs=programs, microseconds=1e6 * median_seconds(call, 5) / BARRIERS)
