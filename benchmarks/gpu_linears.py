"""Decode linears at Llama-3.1-8B's shapes on a GPU: the timing part of gpu_suite.py.

Interpolative cores at keep 0.5, stored in bf16 and int8, beside cuBLAS on the dense bf16 matrix. Times are those of CUDA
graphs that walk through several sets of weights, larger together than the L2 cache, so that every call reads memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

# The linears of one layer of Llama-3.1-8B that run as one call, as (in, out) of each member.
GROUPS = {
    "q/k/v": ((4096, 4096), (4096, 1024), (4096, 1024)),
    "o": ((4096, 4096),),
    "gate/up": ((4096, 14336), (4096, 14336)),
    "down": ((14336, 4096),),
}
LAYERS = 32
KEEP = 0.5
BATCHES = (1, 4, 16)
L2_FACTOR = 4  # sets of weights together hold this many times the L2 cache


def interpolative_rank(inp: int, out: int, keep: float) -> int:
    """The largest multiple of 16 with r (in + out - r) parameters at most keep times in times out."""
    half = (inp + out) / 2
    return int(half - math.sqrt(half * half - keep * inp * out)) // 16 * 16


def random_group(members: tuple[tuple[int, int], ...], store: str, device: str) -> list[Any]:
    """Interpolative linears with random cores, in the store."""
    import torch

    from cai_runtime.kernels.weights import Core, LinearWeights

    def core(rows: int, cols: int) -> Core:
        if store == "int8":
            data = torch.randint(-127, 128, (rows, cols), dtype=torch.int8, device=device)
            return Core(data, torch.full((rows,), 1 / (73 * math.sqrt(cols)), device=device))
        return Core((torch.randn(rows, cols, device=device) / math.sqrt(cols)).bfloat16())

    group = []
    for inp, out in members:
        r = interpolative_rank(inp, out, KEEP)
        pivot = torch.randperm(out, device=device).to(torch.int32)
        group.append(LinearWeights("interpolative", inp, out, (core(r, inp), core(out - r, r)), rank=r, pivot=pivot))
    return group


def copy_bandwidth() -> dict[str, float]:
    """Bytes a second of a device-to-device copy of 4 GiB, read plus written: the ceiling that the linears are held to."""
    import torch

    size = 4 << 30
    a = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    seconds = median_seconds(lambda: b.copy_(a), 20)
    print(f"copy: {2 * size / seconds / 1e9:.0f} GB/s")
    return {"bytes_per_second": 2 * size / seconds}


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
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


def graph_seconds(calls: list[Callable[[], Any]]) -> float:
    """Seconds per call, of a CUDA graph that makes all of them in turn; every call reads weights of its own."""
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
    return median_seconds(graph.replay, 20) / len(calls)


def time_linears(entries: list[dict[str, Any]], bandwidth: float) -> None:
    """Every group at every batch: cuBLAS on dense bf16, then each of our backends in bf16 and int8. `entries` grows by one
    for each. A backend that fails or is wrong is left out, and named in the RuntimeError at the end."""
    import torch

    from cai_runtime.kernels.gpu import prepare_linear
    from cai_runtime.kernels.slim_linear import reference

    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    problems = []

    def measure(name: str, kernel: str, store: str, rows: int, nbytes: int, calls: list[Callable[[], Any]]) -> None:
        seconds = graph_seconds(calls)
        rate = nbytes / seconds
        entry = {
            "group": name, "kernel": kernel, "store": store, "batch": rows, "seconds": seconds, "weight_bytes": nbytes,
            "sets": len(calls), "bytes_per_second": rate, "fraction_of_copy": rate / bandwidth,
        }  # fmt: skip
        entries.append(entry)

    for name, members in GROUPS.items():
        inp, out = members[0][0], sum(o for _, o in members)
        dense_bytes = 2 * inp * out
        sets = max(2, math.ceil(L2_FACTOR * l2 / dense_bytes))
        matrices = [(torch.randn(out, inp, device="cuda") / math.sqrt(inp)).bfloat16() for _ in range(sets)]
        inputs = {m: [torch.randn(m, inp, device="cuda").bfloat16() for _ in range(8)] for m in BATCHES}
        for rows in BATCHES:
            xs = inputs[rows]
            calls = [lambda w=w, x=xs[i % 8]: torch.nn.functional.linear(x, w) for i, w in enumerate(matrices)]
            measure(name, "cublas", "bf16 dense", rows, dense_bytes, calls)
        del matrices
        for store in ("bf16", "int8"):
            first = random_group(members, store, "cuda")
            nbytes = sum(w.nbytes for w in first)
            sets = max(2, math.ceil(L2_FACTOR * l2 / nbytes))
            groups = [first] + [random_group(members, store, "cuda") for _ in range(sets - 1)]
            expected = {m: torch.cat([reference(inputs[m][0].double(), w) for w in first], dim=1) for m in BATCHES}
            for kernel in ("triton", "cuda"):
                try:
                    prepared = [prepare_linear(g, kernel) for g in groups]
                    for rows in BATCHES:
                        xs = inputs[rows]
                        error = (prepared[0](xs[0]).double() - expected[rows]).norm() / expected[rows].norm()
                        if not error < 1e-2:
                            raise RuntimeError(f"relative error {float(error):.2e} against float64")
                        calls = [lambda f=f, x=xs[i % 8]: f(x) for i, f in enumerate(prepared)]
                        measure(name, kernel, store, rows, nbytes, calls)
                except Exception as error:  # noqa: BLE001  # the other backend's numbers are still wanted
                    problems.append(f"{name} {store} {kernel}: {type(error).__name__}: {error}")
                    print(problems[-1], flush=True)
    if problems:
        raise RuntimeError("; ".join(problems))


def table(entries: list[dict[str, Any]]) -> str:
    lines = [f"{'group':<9}{'kernel':<9}{'store':<12}{'batch':>6}{'us':>9}{'GB/s':>8}{'of copy':>9}{'vs cuBLAS':>11}"]
    dense = {(e["group"], e["batch"]): e["seconds"] for e in entries if e["kernel"] == "cublas"}
    totals: dict[tuple[str, str, int], list[float]] = {}
    for e in entries:
        base = dense.get((e["group"], e["batch"]))
        speedup = f"{base / e['seconds']:.2f}x" if base else "-"
        numbers = (
            f"{e['seconds'] * 1e6:>9.1f}{e['bytes_per_second'] / 1e9:>8.0f}{e['fraction_of_copy']:>9.2f}{speedup:>11}"
        )
        lines.append(f"{e['group']:<9}{e['kernel']:<9}{e['store']:<12}{e['batch']:>6}{numbers}")
        totals.setdefault((e["kernel"], e["store"], e["batch"]), []).append(e["seconds"])
    lines.append(f"\nall linears of {LAYERS} layers, ms per step")
    for (kernel, store, batch), seconds in totals.items():
        if len(seconds) == len(GROUPS):
            lines.append(f"{kernel:<9}{store:<12} batch {batch:>2}: {sum(seconds) * LAYERS * 1e3:.3f}")
    return "\n".join(lines)


def check_benchmark_cases() -> dict[str, float]:
    """Without a GPU: the benchmark's groups, an eighth as wide, through the reference; returns each group's keep."""
    import torch

    from cai_runtime.kernels.slim_linear import reference

    kept = {}
    for name, members in GROUPS.items():
        group = random_group(tuple((i // 8, o // 8) for i, o in members), "int8", "cpu")
        y = torch.cat([reference(torch.randn(2, group[0].in_features), w) for w in group], dim=1)
        if y.shape != (2, sum(o // 8 for _, o in members)) or not y.isfinite().all():
            raise RuntimeError(f"{name}: the reference gives {tuple(y.shape)}")
        ranks = [interpolative_rank(i, o, KEEP) for i, o in members]
        parameters = sum(r * (i + o - r) for r, (i, o) in zip(ranks, members, strict=True))
        kept[name] = parameters / sum(i * o for i, o in members)
        if not KEEP - 0.02 < kept[name] <= KEEP:
            raise RuntimeError(f"{name}: keep is {kept[name]:.3f}, not {KEEP}")
    return kept
