"""The figures of `cai bench attention` as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from cai_runtime.bench.floors import floor, floor_fraction
from cai_runtime.bench.report import device_line, launch_count
from cai_runtime.tables import aligned, figure

if TYPE_CHECKING:
    from cai_runtime.bench.attention import AttentionReport, AttentionResult

HEADER = ("step", "batch", "positions", "kernel", "cache", "median ms", "best ms", "GB/s", "GFLOP/s", "of floor")


def format_attention(report: AttentionReport) -> str:
    """The table that `cai bench attention` prints."""
    s = report.settings
    window = f", window {s.window}" if s.window else ""
    lines = [
        f"attention of {report.subject}: {s.heads.query}/{s.heads.kv} heads of {s.heads.dim}{window}",
        device_line(report),
        *report.notes,
        "",
    ]
    launches = ("launches",) if s.on_gpu else ()
    table: list[Sequence[str]] = [(*HEADER, *launches, f"vs torch {report.baseline}")]
    reasons: list[str] = []
    for (mode, batch, context), results in groupby(report.results, key=lambda r: (r.mode, r.batch, r.context)):
        for index, r in enumerate(results):
            named = (mode, str(batch), str(context)) if index == 0 else ("", "", "")
            table.append((*named, f"{r.engine} {r.method}", r.cache, *_figures(report, r, reasons)))
        table.append(("",) * len(table[0]))
    lines += aligned(table, right=(1, 2, *range(5, len(table[0]))))
    lines += [f"[{number}] not supported: {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join(lines)


def _figures(report: AttentionReport, r: AttentionResult, reasons: list[str]) -> tuple[str, ...]:
    if r.median_s is None or r.best_s is None:
        reason = r.unsupported or "not measured"
        if reason not in reasons:
            reasons.append(reason)
        return (f"[{reasons.index(reason) + 1}]", *("-",) * (5 + report.settings.on_gpu))
    fraction, speedup = floor_fraction(r), report.speedup(r)
    return (
        figure(r.median_s * 1e3, 3),
        figure(r.best_s * 1e3, 3),
        figure(r.rate(r.cache_bytes / 1e9)) if r.mode == "decode" else "",
        figure(r.rate(r.flops / 1e9)),
        "-" if fraction is None else f"{fraction:.0%}",
        *((launch_count(r.launches),) if report.settings.on_gpu else ()),
        "-" if speedup is None else f"{speedup:.2f} x",
    )


def attention_json(report: AttentionReport) -> dict[str, Any]:
    """Everything, for a file."""
    return {
        "benchmark": "attention",
        "subject": report.subject,
        "notes": report.notes,
        "date": report.date,
        "machine": report.machine,
        "gpus": report.gpus,
        "versions": report.versions,
        "threads": report.threads,
        "settings": asdict(report.settings),
        "roofs": report.roofs.to_json(),
        "results": [
            {
                **asdict(r),
                "roofs": r.roofs.to_json(),
                "gb_per_s": r.rate(r.cache_bytes / 1e9),
                "gflop_per_s": r.rate(r.flops / 1e9),
                "floor_s": floor(r),
                "floor_fraction": floor_fraction(r),
                "speedup_over_torch": report.speedup(r),
            }
            for r in report.results
        ],
    }
