"""The figures of `cai bench linear` and `cai bench prefill` as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.bench.floors import floor, floor_fraction
from cai_runtime.bench.report import device_line, device_name, launch_count
from cai_runtime.tables import aligned, figure

if TYPE_CHECKING:
    from cai_runtime.bench.linear import LinearReport, LinearResult

HEADER = ("group", "rows", "kernel", "store", "median ms", "best ms", "GB/s", "GFLOP/s", "of floor")
FIRST_NUMBER = 4  # first right-aligned column


def format_linear(report: LinearReport) -> str:
    """The table that `cai bench linear` prints."""
    s, lines = report.settings, []
    lines += [
        f"linears of {report.subject}, {s.how.label}; int4 in groups of {s.int4_group}",
        device_line(report),
        *report.notes,
        "",
    ]
    launches = ("launches",) if s.on_gpu else ()
    table: list[tuple[str, ...]] = [(*HEADER, *launches, f"vs dense {report.baseline}")]
    reasons: list[str] = []
    for (group, batch), block in groupby(report.results, key=lambda r: (r.group, r.batch)):
        rows = _block(report, list(block), reasons)
        shape = next(r.shape for r in report.results if r.group == group)
        table += [(group if group == shape else f"{group} {shape}", str(batch), *rows[0])]
        table += [("", "", *row) for row in rows[1:]]
        table += [("",) * len(table[0])]
    lines += aligned(table, right=range(FIRST_NUMBER, len(table[0])))
    lines += [f"[{number}] not supported: {reason}" for number, reason in enumerate(reasons, start=1)]
    if totals := token_totals(report):
        lines += ["", "all linears of one token, by the sum of the medians:", *_total_lines(totals)]
    return "\n".join(lines)


def _block(report: LinearReport, results: Sequence[LinearResult], reasons: list[str]) -> list[tuple[str, ...]]:
    """The rows of one group at one batch. Unsupported cases of one reason share a row, which refers to the reason."""
    rows: dict[object, tuple[str, ...]] = {}
    for r in results:
        if r.unsupported is None:
            rows[r.label] = (f"{r.engine} {r.method}", r.store, *_figures(report, r))
            continue
        if r.unsupported not in reasons:
            reasons.append(r.unsupported)
        key = (r.engine, r.method, r.unsupported)
        stores = f"{rows[key][1]}, {r.store}" if key in rows else r.store
        reference = f"[{reasons.index(r.unsupported) + 1}]"
        empty = len(HEADER) - FIRST_NUMBER + report.settings.on_gpu
        rows[key] = (f"{r.engine} {r.method}", stores, reference, *("-",) * empty)
    return list(rows.values())


def _figures(report: LinearReport, r: LinearResult) -> tuple[str, ...]:
    fraction, speedup = floor_fraction(r), report.speedup(r, report.baseline)
    return (
        figure((r.median_s or 0) * 1e3, 3),
        figure((r.best_s or 0) * 1e3, 3),
        figure(r.rate(r.weight_bytes / 1e9)),
        figure(r.rate(r.flops / 1e9)),
        "-" if fraction is None else f"{fraction:.0%}",
        *((launch_count(r.launches),) if report.settings.on_gpu else ()),
        "-" if speedup is None else f"{speedup:.2f} x",
    )


def token_totals(report: LinearReport) -> list[dict[str, Any]]:
    """Milliseconds of all linears that a token passes, and their floor, for each contender that ran all groups at one row.

    Empty if the groups are not all linears of a model.
    """
    groups = {r.group for r in report.results}
    totals = []
    if report.of_model:
        for label in dict.fromkeys(r.label for r in report.results):
            mine = [r for r in report.results if r.label == label and r.batch == 1 and r.median_s is not None]
            if {r.group for r in mine} == groups:
                seconds = sum(r.active * (r.median_s or 0) for r in mine)
                least = sum(r.active * floor(r) for r in mine)
                totals.append({"kernel": label, "ms": seconds * 1e3, "floor_ms": least * 1e3})
    return totals


def _total_lines(totals: list[dict[str, Any]]) -> list[str]:
    table = [("kernel", "ms", "floor ms", "of floor")]
    table += [
        (t["kernel"], figure(t["ms"], 2), figure(t["floor_ms"], 2), f"{t['floor_ms'] / t['ms']:.0%}") for t in totals
    ]
    return aligned(table, right=range(1, 4))


def linear_json(report: LinearReport) -> dict[str, Any]:
    """All settings and results as JSON values."""
    results = []
    for r in report.results:
        gb, gflop = r.rate(r.weight_bytes / 1e9), r.rate(r.flops / 1e9)
        results.append(
            {
                **asdict(r),
                "roofs": r.roofs.to_json(),
                "gb_per_s": gb,
                "gflop_per_s": gflop,
                "floor_s": floor(r),
                "floor_fraction": floor_fraction(r),
                "speedup_over_dense_fp32": report.speedup(r, "fp32"),
                "speedup_over_dense_bf16": report.speedup(r, "bf16"),
            }
        )
    return {
        "benchmark": report.benchmark,
        "subject": report.subject,
        "notes": report.notes,
        "date": report.date,
        "machine": report.machine,
        "gpus": report.gpus,
        "versions": report.versions,
        "threads": report.threads,
        "settings": {**asdict(report.settings), "batches": report.settings.rows},
        "roofs": report.roofs.to_json(),
        "results": results,
        "token_totals": token_totals(report),
    }


def draw_linear(report: LinearReport, path: Path) -> None:
    """Write the roofline plot as PNG. Raises BenchmarkError as `plot_roofline`."""
    from cai_runtime.bench.roofline import Point, plot_roofline

    points = [
        Point(f"{r.engine} {r.method}", r.store, r.batch, r.intensity, r.flops / r.median_s)
        for r in report.results
        if r.median_s is not None
    ]
    plot_roofline(
        path,
        points,
        report.roofs,
        title=f"linears of {report.subject}, {report.settings.how.label}",
        subtitle=f"{device_name(report)}, {report.date[:10]}; medians",
    )
