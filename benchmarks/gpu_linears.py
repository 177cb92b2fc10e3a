"""Decode linears and attention at Llama-3.1-8B's shapes on a GPU: the parts of gpu_suite.py that time single operations.

Interpolative cores at keep 0.5, stored in bf16, int8 and int4, by our kernels, beside cuBLAS on the dense bf16 matrix, and
beside int4 dense matrices by our kernels and by torch's (tinygemm). Times are those of CUDA graphs that walk through several
sets of weights, larger together than the L2 cache, so that every call reads memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gpu_timing import graph_seconds, sets_needed

# The linears of one layer of Llama-3.1-8B that run as one call: in, and the out of each member.
GROUPS: dict[str, tuple[int, tuple[int, ...]]] = {
    "q/k/v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate/up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
LAYERS = 32
KEEP = 0.5
INT4_GROUP = 128
BATCHES = (1, 4, 16)
WEIGHTS = (("interpolative", "bf16"), ("interpolative", "int8"), ("interpolative", "int4"), ("dense", "int4"))
TOLERANCE = 1e-2  # relative, against float64, with bf16 activations
Entries = list[dict[str, Any]]


def time_linears(entries: Entries, bandwidth: float, kernels: list[str], checkpoint: Callable[[], None]) -> None:
    """Every group at every batch: cuBLAS on dense bf16, tinygemm on dense int4, then each of `kernels` ("triton", "cuda").
    `entries` grows by one for each. What fails or is wrong is left out, and named in the RuntimeError at the end.
    checkpoint: called before each kernel; what it raises ends the section."""
    import torch

    from cai_runtime.bench.factors import Factorization, RandomWeights
    from cai_runtime.kernels.gpu import prepare_linear
    from cai_runtime.kernels.slim_linear import reference

    problems: list[str] = []

    def measure(name: str, kernel: str, store: str, rows: int, nbytes: int, calls: list[Callable[[], Any]]) -> None:
        seconds = graph_seconds(calls)
        entries.append(
            {
                "group": name, "kernel": kernel, "weights": store, "batch": rows, "seconds": seconds,
                "weight_bytes": nbytes, "sets": len(calls), "bytes_per_second": nbytes / seconds,
                "fraction_of_copy": nbytes / seconds / bandwidth,
            }
        )  # fmt: skip

    def attempt(what: str, run: Callable[[], None]) -> None:
        checkpoint()
        try:
            run()
        except Exception as error:  # noqa: BLE001  # the others' numbers are still wanted
            problems.append(f"{what}: {type(error).__name__}: {error}")
            print(problems[-1][:500], flush=True)

    for name, (inp, outs) in GROUPS.items():
        out = sum(outs)
        inputs = {m: [torch.randn(m, inp, device="cuda").bfloat16() for _ in range(8)] for m in BATCHES}

        def cublas(name: str = name, inp: int = inp, out: int = out, inputs: Any = inputs) -> None:
            count = sets_needed(2 * inp * out)
            matrices = [(torch.randn(out, inp, device="cuda") / math.sqrt(inp)).bfloat16() for _ in range(count)]
            for m in BATCHES:
                calls = [
                    lambda w=w, x=inputs[m][i % 8]: torch.nn.functional.linear(x, w) for i, w in enumerate(matrices)
                ]
                measure(name, "cublas", "dense bf16", m, 2 * inp * out, calls)

        def tinygemm(name: str = name, inp: int = inp, out: int = out, inputs: Any = inputs) -> None:
            packed = [tinygemm_weights(out, inp) for _ in range(sets_needed(inp * out // 2))]
            nbytes = sum(t.nbytes for t in packed[0])
            for m in BATCHES:
                calls = [
                    lambda w=w, s=s, x=inputs[m][i % 8]: torch._weight_int4pack_mm(x, w, INT4_GROUP, s)
                    for i, (w, s) in enumerate(packed)
                ]
                measure(name, "tinygemm", "dense int4", m, nbytes, calls)

        attempt(f"{name} cublas", cublas)
        attempt(f"{name} tinygemm", tinygemm)
        for kind, store in WEIGHTS:
            draw = RandomWeights("cuda", group=INT4_GROUP)
            how = Factorization(kind, KEEP)
            first = draw.group_of(inp, outs, how, store)
            nbytes = sum(w.nbytes for w in first)
            groups = [first] + [draw.group_of(inp, outs, how, store) for _ in range(sets_needed(nbytes) - 1)]
            expected = {m: torch.cat([reference(inputs[m][0].double(), w) for w in first], dim=1) for m in BATCHES}
            for kernel in kernels:

                def ours(
                    name: str = name, kernel: str = kernel, weights: str = f"{kind} {store}", nbytes: int = nbytes,
                    groups: Any = groups, expected: Any = expected, inputs: Any = inputs,
                ) -> None:  # fmt: skip
                    prepared = [prepare_linear(g, kernel) for g in groups]
                    for m in BATCHES:
                        error = float((prepared[0](inputs[m][0]).double() - expected[m]).norm() / expected[m].norm())
                        if not error < TOLERANCE:
                            raise RuntimeError(f"relative error {error:.2e} against float64 at batch {m}")
                        calls = [lambda f=f, x=inputs[m][i % 8]: f(x) for i, f in enumerate(prepared)]
                        measure(name, kernel, weights, m, nbytes, calls)

                attempt(f"{name} {kind} {store} {kernel}", ours)
            del groups, first, expected
    if problems:
        raise RuntimeError("; ".join(p[:300] for p in problems))


def tinygemm_weights(out: int, inp: int) -> tuple[Any, Any]:
    """A random int4 matrix as torch's own int4 kernel takes it: packed codes, and bf16 scales with zero points."""
    import torch

    codes = torch.randint(0, 256, (out, inp // 2), dtype=torch.uint8, device="cuda")
    packed = torch._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(inp // INT4_GROUP, out, 2, device="cuda").bfloat16()
    return packed, scales


def table(entries: Entries) -> str:
    header = f"{'group':<9}{'kernel':<10}{'weights':<20}{'batch':>6}{'us':>9}{'GB/s':>8}{'of copy':>9}{'vs cuBLAS':>11}"
    lines = [header]
    dense = {(e["group"], e["batch"]): e["seconds"] for e in entries if e["kernel"] == "cublas"}
    totals: dict[tuple[str, str, int], list[float]] = {}
    for e in entries:
        base = dense.get((e["group"], e["batch"]))
        speedup = f"{base / e['seconds']:.2f}x" if base else "-"
        numbers = (
            f"{e['seconds'] * 1e6:>9.1f}{e['bytes_per_second'] / 1e9:>8.0f}{e['fraction_of_copy']:>9.2f}{speedup:>11}"
        )
        lines.append(f"{e['group']:<9}{e['kernel']:<10}{e['weights']:<20}{e['batch']:>6}{numbers}")
        totals.setdefault((e["kernel"], e["weights"], e["batch"]), []).append(e["seconds"])
    lines.append(f"\nall linears of {LAYERS} layers, ms per step")
    for (kernel, weights, batch), seconds in totals.items():
        if len(seconds) == len(GROUPS):
            lines.append(f"{kernel:<10}{weights:<20} batch {batch:>2}: {sum(seconds) * LAYERS * 1e3:.3f}")
    return "\n".join(lines)


def time_attention(entries: Entries, bandwidth: float, checkpoint: Callable[[], None]) -> None:
    """Paged decode attention with Llama-3.1-8B's heads: 1k and 8k positions, batch 1 and 16; bytes are the keys' and
    values'. Checked against torch's own attention first. checkpoint: called before each."""
    import torch

    from cai_runtime.kernels.triton import paged_attention

    heads, kv_heads, dim, page = 32, 8, 128, 16
    for context in (1024, 8192):
        for batch in (1, 16):
            checkpoint()
            nbytes = 2 * 2 * batch * context * kv_heads * dim
            pages = batch * context // page
            count = min(sets_needed(nbytes), 64)
            caches = [
                [torch.randn(pages, kv_heads, page, dim, device="cuda").bfloat16() for _ in range(2)]
                for _ in range(count)
            ]
            q = torch.randn(batch, heads, dim, device="cuda").bfloat16()
            starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
            lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
            tables = torch.randperm(pages, device="cuda").to(torch.int32).view(batch, -1)

            def attend(k: Any, v: Any, q: Any = q, at: Any = (starts, lengths, tables)) -> Any:
                return paged_attention(q, k, v, *at, dim**-0.5)

            k, v = (
                c[tables.long()].transpose(2, 3).reshape(batch, -1, kv_heads, dim).transpose(1, 2) for c in caches[0]
            )
            wanted = torch.nn.functional.scaled_dot_product_attention(
                q[:, :, None].double(), k.double(), v.double(), enable_gqa=True
            ).reshape(batch, -1)
            error = float((attend(*caches[0]).double() - wanted).norm() / wanted.norm())
            if not error < TOLERANCE:
                raise RuntimeError(f"context {context}, batch {batch}: relative error {error:.2e} against float64")
            seconds = graph_seconds([lambda k=k, v=v, f=attend: f(k, v) for k, v in caches])
            entries.append(
                {
                    "context": context, "batch": batch, "seconds": seconds, "kv_bytes": nbytes,
                    "fraction_of_copy": nbytes / seconds / bandwidth,
                }
            )  # fmt: skip
            print(
                f"attention, context {context}, batch {batch}: {seconds * 1e6:.1f} us, "
                f"{nbytes / seconds / 1e9:.0f} GB/s, {nbytes / seconds / bandwidth:.2f} of copy",
                flush=True,
            )


def check_benchmark_cases() -> dict[str, float]:
    """Without a GPU: the benchmark's groups, an eighth as wide, through the reference; returns each group's keep."""
    import torch

    from cai_runtime.bench.factors import Factorization, RandomWeights
    from cai_runtime.kernels.slim_linear import reference

    kept = {}
    for name, (inp, outs) in GROUPS.items():
        for kind, store in WEIGHTS:
            group = RandomWeights("cpu", group=INT4_GROUP).group_of(
                inp // 8, tuple(o // 8 for o in outs), Factorization(kind, KEEP), store
            )
            y = torch.cat([reference(torch.randn(2, inp // 8), w) for w in group], dim=1)
            if y.shape != (2, sum(outs) // 8) or not 0.3 < float(y.std()) < 3:
                raise RuntimeError(f"{name}: the reference gives {tuple(y.shape)}, deviation {float(y.std()):.2f}")
            if kind == "interpolative":
                kept[name] = sum(w.parameters for w in group) / sum(w.in_features * w.out_features for w in group)
                if not KEEP - 0.06 < kept[name] <= KEEP:
                    raise RuntimeError(f"{name}: keep is {kept[name]:.3f}, not {KEEP}")
    return kept
