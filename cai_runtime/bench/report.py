"""The figures of `cai bench decode` as a table and as JSON, and the device's line of all tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cai_runtime.tables import aligned, figure

if TYPE_CHECKING:
    from cai_runtime.bench.attention import AttentionReport
    from cai_runtime.bench.linear import LinearReport
    from cai_runtime.bench.run import DecodeReport


def device_name(report: LinearReport | AttentionReport) -> str:
    device = report.settings.device
    gpu = report.gpus[int(device.removeprefix("cuda:"))]["name"] if device.startswith("cuda") else None
    return processor({**report.machine, "gpu": gpu}, report.threads)


def device_line(report: LinearReport | AttentionReport) -> str:
    """The device and its roofs, for the table's head."""
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in report.roofs.matmul.items())
    return (
        f"{report.settings.device}: {device_name(report)}; reads {report.roofs.read / 1e9:.1f} GB/s, multiplies matrices "
        f"at {rates} GFLOP/s"
    )


def processor(machine: dict[str, Any], threads: int) -> str:
    """The GPU of a measurement, or the CPU and its threads."""
    return machine["gpu"] or f"{machine['cpu']}, {threads} threads"


def launch_count(launches: float | None) -> str:
    """For a table: a whole number as such, since all calls of a contender are alike."""
    return "-" if launches is None else f"{launches:g}"


def format_decode(report: DecodeReport) -> str:
    """The table that `cai bench decode` prints."""
    header = (
        "engine",
        "weights",
        "batch",
        "decode tok/s",
        "ms/step",
        "GB/s",
        "of floor",
        "first token ms",
        "prefill tok/s",
    )
    ours = {r.batch: r.decode_tokens_per_s for r in report.results if r.engine == "cai_runtime"}
    with_peers = any(r.engine != "cai_runtime" for r in report.results)
    table: list[Sequence[str]] = [(*header, "cai_runtime is") if with_peers else header]
    for r in report.results:
        fraction = r.floor_fraction(report.bandwidth)
        row: tuple[str, ...] = (
            r.engine,
            r.weights,
            str(r.batch),
            figure(r.decode_tokens_per_s),
            figure(r.step_ms, 2),
            figure(r.gb_per_s),
            "-" if fraction is None else f"{fraction:.0%}",
            figure(r.first_token_ms),
            figure(r.prefill_tokens_per_s),
        )
        if with_peers:
            mine = ours.get(r.batch)
            known = r.engine != "cai_runtime" and mine and r.decode_tokens_per_s
            row += (f"{mine / r.decode_tokens_per_s:.2f} x" if known else "",)  # type: ignore[operator]
        table.append(row)
    s = report.settings
    lines = [
        f"decode of {report.checkpoint} on {report.device}: {processor(report.machine, s['threads'])}, "
        f"reads {report.bandwidth / 1e9:.1f} GB/s",
        f"prompts of {s['prompt_tokens']} tokens, {s['tokens']} tokens each, greedy; median of {s['repeats']} repeats",
        "",
        *aligned(table, right=range(2, len(table[0]))),
    ]
    if any(r.decode_tokens_per_s is None for r in report.results):
        lines += ["", "-: less than the noise of this machine; raise --tokens"]
    return "\n".join(lines)


def decode_json(report: DecodeReport) -> dict[str, Any]:
    """All settings and results as JSON values."""
    return {
        "benchmark": "decode",
        "date": report.date,
        "checkpoint": report.checkpoint,
        "peers": report.peers,
        "device": report.device,
        "machine": report.machine,
        "versions": report.versions,
        "settings": report.settings,
        "bandwidth_gb_per_s": report.bandwidth / 1e9,
        "results": [result.to_json(report.bandwidth) for result in report.results],
    }
