"""Runs kernels under NVIDIA's tools: ncu for hardware counters, compute-sanitizer for memory errors and races.

Each tool runs a program of this file in a process of its own. A section fails if its tool is missing."""

from __future__ import annotations

import csv
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from gpu.children import run_child
from gpu.context import INT4_GROUP, KEEP, Context
from gpu.report import Findings

# Linears whose counters are read, with one row: group, kind, store.
COUNTED = (
    ("q/k/v", "interpolative", "bf16"), ("o", "interpolative", "bf16"), ("gate/up", "interpolative", "bf16"),
    ("down", "interpolative", "bf16"), ("gate/up", "interpolative", "int4"),
)  # fmt: skip
NCU_SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
)
METRICS = (
    "DRAM Throughput", "Memory Throughput", "Compute (SM) Throughput", "Duration", "Achieved Occupancy", "L2 Hit Rate",
    "Issue Slots Busy", "No Eligible", "Registers Per Thread", "Block Size", "Grid Size",
)  # fmt: skip
STORES = ("bf16", "int8", "int4")


def suite_command(program: str) -> list[str]:
    """The command that runs `counted` or `small` below."""
    return [sys.executable, str(Path(__file__).parents[1] / "gpu_suite.py"), "--program", program]


def run_ncu(findings: Findings, context: Context) -> None:
    findings.attempt("ncu", lambda: _ncu(findings, context))


def _ncu(findings: Findings, context: Context) -> None:
    ncu = shutil.which("ncu")
    if ncu is None:
        raise RuntimeError("ncu is not on the path")
    sections = [part for name in NCU_SECTIONS for part in ("--section", name)]
    command = [
        ncu, "--clock-control", "none", "--profile-from-start", "off", *sections, "--csv", "--page", "details",
        *suite_command("counted"),
    ]  # fmt: skip
    output = run_child(command, 100)
    (context.out / "ncu.csv").write_text(output)
    for item in read_ncu(output):
        findings.add(**item)


def read_ncu(output: str) -> list[dict[str, Any]]:
    """The `METRICS` of each kernel, from ncu's CSV table, which follows the program's own output."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError(f"ncu wrote no table: {output[-600:]}")
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[start:]):
        kernel = kernels.setdefault(row["ID"], {"what": "ncu", "kernel": row["Kernel Name"][:80]})
        if row["Metric Name"] in METRICS:
            kernel[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(kernels.values())


def run_sanitizer(findings: Findings, context: Context) -> None:
    for tool in ("memcheck", "racecheck"):
        findings.attempt(tool, lambda t=tool: _sanitize(findings, t))


def _sanitize(findings: Findings, tool: str) -> None:
    found = shutil.which("compute-sanitizer")
    if found is None:
        raise RuntimeError("compute-sanitizer is not on the path")
    output = run_child([found, "--tool", tool, "--error-exitcode", "9", *suite_command("small")], 90)
    findings.add(what=tool, says=output.strip().splitlines()[-1])


def counted(context: Context) -> None:
    """The program under ncu: calls each case of `COUNTED` once on every backend, with the norm, gate and residual of the
    model. A first round of calls compiles and is not profiled."""
    import torch

    from cai_runtime.bench.factors import Factorization, RandomWeights
    from cai_runtime.kernels.gpu import prepare_linear
    from gpu.linears import Case

    calls = []
    for name, kind, store in COUNTED:
        inp, outs = context.scale.groups[name]
        case = Case(None, context, name, inp, outs, (1,))  # type: ignore[arg-type]  # no findings are added
        weights = RandomWeights(context.device, group=INT4_GROUP).group_of(inp, outs, Factorization(kind, KEEP), store)
        arguments = case._arguments(1, "fused")[0]
        calls += [partial(prepare_linear(weights, b), **arguments) for b in context.backends]
    for call in calls:
        call()
    if not context.rehearsal:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for call in calls:
        call()
    if not context.rehearsal:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def small(context: Context) -> None:
    """The program under compute-sanitizer: a small interpolative linear of each store, with 1, 3 and 20 rows. Raises
    RuntimeError for a wrong result."""
    import torch

    from cai_runtime.bench.factors import Factorization, RandomWeights
    from cai_runtime.kernels.gpu import prepare_linear
    from cai_runtime.kernels.slim_linear import reference

    for store in STORES:
        w = RandomWeights(context.device, group=INT4_GROUP).linear(
            320, 208, Factorization("interpolative", KEEP), store
        )  # fmt: skip
        for backend in context.backends:
            linear = prepare_linear([w], backend)
            for rows in (1, 3, 20):
                x = torch.randn(rows, 320, device=context.device).bfloat16()
                wanted = reference(x.double(), w)
                error = float((linear(x).double() - wanted).norm() / wanted.norm())
                if not error < 1e-2:
                    raise RuntimeError(f"{store} {backend}, {rows} rows: relative error {error:.2e}")
    print("small linears are right")
