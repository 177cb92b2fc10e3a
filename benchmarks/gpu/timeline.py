"""Profiles the kernels of three replays of a decode step with torch's profiler: their durations and the gaps between them.

timeline.json gets all kernels in order. The findings get sums by kernel name, and each launch of a layer with its predicted
time."""

from __future__ import annotations

import statistics
from collections import defaultdict
from itertools import pairwise
from typing import Any

from gpu.context import Context, predicted_launches
from gpu.models import open_step
from gpu.report import Findings, write_json
from gpu.timing import release

REPLAYS = 3
CASES = (("interpolative", "bf16", 1), ("interpolative", "int4", 1), ("interpolative", "bf16", 16))
Kernel = tuple[str, float, float]  # name, start and duration in microseconds
PRODUCTS = "products_kernel"  # in the names of all kernels of linears, Triton's and CUDA's


def run(findings: Findings, context: Context) -> None:
    found: list[dict[str, Any]] = []
    for backend in context.backends:
        for kind, store, rows in CASES[:1] if context.rehearsal else CASES:
            what = f"{kind} {store} {backend}, {rows} rows"
            findings.attempt(what, lambda a=(kind, store, backend, rows): _case(findings, context, found, *a))
            release()


def _case(
    findings: Findings, context: Context, found: list[dict[str, Any]], kind: str, store: str, backend: str, rows: int
) -> None:
    scale = context.scale
    rows = min(rows, max(scale.decode_rows))
    step = open_step(scale.config, kind, store, backend, context.device, max_batch=rows, context=scale.context)
    kernels = _profile(step.graph(step.sequences(rows)), context)
    step.runner.close()
    layers = scale.config["num_hidden_layers"]
    weights = f"{kind} {store}"
    found.append(
        {
            "weights": weights, "backend": backend, "rows": rows, "replays": REPLAYS,
            "kernels": [[name, round(start, 3), round(took, 3)] for name, start, took in kernels],
        }
    )  # fmt: skip
    write_json(context.out / "timeline.json", found)
    for name, entry in by_name(kernels).items():
        findings.add(what="kernels", weights=weights, backend=backend, rows=rows, name=name, **entry)
    launches = layer_launches(kernels, layers)
    if not launches and not context.rehearsal:
        findings.problem(f"{weights} {backend}: the kernels of a layer were not recognized; see timeline.json")
    expected = predicted_launches(backend, weights, rows)
    for launch in launches:
        predicted = expected.get(launch["launch"])
        ratio = launch["microseconds"] / predicted if predicted else None
        findings.add(
            what="launch", weights=weights, backend=backend, rows=rows, **launch, predicted_microseconds=predicted,
            measured_to_predicted=ratio,
        )  # fmt: skip


def _profile(replay: Any, context: Context) -> list[Kernel]:
    """The kernels of `REPLAYS` replays; in a rehearsal, the operations on the CPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = not context.rehearsal
    replay()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        for _ in range(REPLAYS):
            replay()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = "CUDA" if on_gpu else "CPU"
    kernels = [
        (e.name, float(e.time_range.start), float(e.time_range.end - e.time_range.start))
        for e in profiled.events()
        if wanted in str(e.device_type)
    ]
    return sorted(kernels, key=lambda kernel: kernel[1])


def by_name(kernels: list[Kernel]) -> dict[str, dict[str, float]]:
    """By kernel name: count, total and median microseconds, and the mean gap to the next kernel. A gap is negative if the
    next kernel began before this one's end."""
    gathered: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for this, following in zip(kernels, [*kernels[1:], None], strict=True):
        gap = following[1] - this[1] - this[2] if following else 0.0
        gathered[this[0]].append((this[2], gap))
    return {
        name: {
            "count": len(seen),
            "microseconds": round(sum(t for t, _ in seen), 3),
            "median_microseconds": round(statistics.median(t for t, _ in seen), 3),
            "gap_microseconds": round(statistics.mean(g for _, g in seen), 3),
        }
        for name, seen in sorted(gathered.items(), key=lambda item: -sum(t for t, _ in item[1]))
    }


def layer_launches(kernels: list[Kernel], layers: int) -> list[dict[str, Any]]:
    """The launches from one attention to the next: name, microseconds and gap, medians over all layers and replays.

    Launches of linears are named by group and stage ("q/k/v 0"). Empty if the layers' sequences of launches differ."""
    starts = [i for i, (name, _, _) in enumerate(kernels) if "paged_attention_kernel" in name]
    if layers < 2 or len(starts) != REPLAYS * layers:
        return []
    # Between the last attention of one replay and the first of the next run the head and the embedding: no layer.
    spans = [(a, b) for k, (a, b) in enumerate(pairwise(starts), 1) if k % layers]
    if len({b - a for a, b in spans}) != 1:
        return []
    rows = [kernels[a : b + 1] for a, b in spans]
    names = [name for name, _, _ in rows[0][:-1]]
    linears = [i for i, name in enumerate(names) if PRODUCTS in name]
    groups = ("o", "gate/up", "down", "q/k/v")  # in the order in which they follow attention
    stages = len(linears) // len(groups)
    labels = {}
    if stages and len(linears) == stages * len(groups):
        labels = {at: f"{groups[k // stages]} {k % stages}" for k, at in enumerate(linears)}
    return [
        {
            "launch": labels.get(i, names[i].split("(")[0][:60]),
            "microseconds": round(statistics.median(row[i][2] for row in rows), 3),
            "gap_microseconds": round(statistics.median(row[i + 1][1] - row[i][1] - row[i][2] for row in rows), 3),
        }
        for i in range(len(names))
    ]
