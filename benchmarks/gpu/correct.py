"""Runs the kernels' tests, compiled, on the GPU. Beside them run the checks of checks.py, and models of one layer that fill
Triton's cache on disk.

Each runs in a process of its own, and this process only waits. So the results of one are kept if another is cut off."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from gpu.children import CUDA_TESTS, Child, pytest_command, read_tests, triton_tests
from gpu.context import VARIANTS, Context
from gpu.report import Findings

KEPT_LINES = 3  # of a failed warm-up's output


def run(findings: Findings, context: Context, *, until: float, warm: bool) -> None:
    """until: by time.monotonic(). warm: also check engines, and compile the kernels of all variants."""
    processors = os.cpu_count() or 1
    engine = context.out / ".engine.json"
    started = {"tests triton": Child(pytest_command(triton_tests(), min(8, processors)))}
    if "cuda" in context.backends:
        started["tests cuda"] = Child(pytest_command(CUDA_TESTS, min(4, processors)))
    else:
        findings.problem("tests cuda: there are no CUDA kernels to check")
    program = str(Path(__file__).parents[1] / "gpu_suite.py")
    if warm:
        own = ["--section", "engine", "--findings", str(engine), "--until", str(time.time() + until - time.monotonic())]
        started["engine"] = Child([sys.executable, program, *own, "--out", str(context.out)])
        for backend in context.backends:
            for kind, store in VARIANTS:
                name = f"{kind},{store},{backend}"
                started[f"warm {name}"] = Child([sys.executable, program, "--program", f"warm,{name}"])
    began = time.monotonic()
    for name in sorted(started, key=lambda n: n.startswith("tests")):  # the short ones first
        child = started[name]
        status = child.wait(until)
        output = child.text()
        print(f"----- {name}: exit status {status}\n{output}", flush=True)
        seconds = round(time.monotonic() - began, 1)
        if name == "engine":
            _take_over(findings, engine, status)
            continue
        if name.startswith("warm"):
            findings.add(f"{name}: {status}", what=name, ok=status == 0, seconds=seconds)
            if status != 0:
                findings.problem(f"{name}: {' | '.join(output.strip().splitlines()[-KEPT_LINES:])}")
            continue
        tests = read_tests(output, finished=not child.late)
        findings.add(
            f"{name}: {tests.passed} passed, {tests.failed} failed, {'finished' if tests.finished else 'CUT OFF'}",
            what=name, passed=tests.passed, failed=tests.failed, failures=tests.failures, finished=tests.finished,
            seconds=seconds,
        )  # fmt: skip
        if not tests.ok:
            findings.problem(f"{name}: {'; '.join(tests.failures[:10]) or 'nothing was checked'}")
        elif status != 0 and tests.finished:
            findings.problem(f"{name}: pytest exited with {status}")


def _take_over(findings: Findings, path: Path, status: int) -> None:
    """Add the findings of section "engine", which its process wrote to `path`, and delete the file."""
    found = json.loads(path.read_text()) if path.exists() else {"items": [], "problems": []}
    path.unlink(missing_ok=True)
    for item in found["items"]:
        findings.add(**item)
    for problem in found["problems"]:
        findings.problem(problem)
    if status != 0 and not found["problems"]:
        findings.problem(f"engine: exit status {status}")
