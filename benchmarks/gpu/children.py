"""Runs child processes with a time limit, and reads the results of tests and builds from their output."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from gpu.environment import ROOT

GRACE = 5.0  # seconds between SIGINT, after which pytest prints the failures so far, and SIGKILL


def child_environment() -> dict[str, str]:
    """An environment in which children import the same packages as this process, installed or not.

    PYTHONSAFEPATH keeps the working folder off the path: its cai_runtime has no kernels and no models."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "300",  # in narrower summaries pytest omits the reasons of failures
    }


def _scratch_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", errors="replace")  # deleted when the child's object is


@dataclass
class Child:
    """A process in a new session. Its output goes to a file. late: whether it ran into its time limit."""

    command: list[str]
    output: IO[str] = field(default_factory=_scratch_file)
    late: bool = False

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=child_environment(), stdin=subprocess.DEVNULL, stdout=self.output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait(self, until: float) -> int:
        """Wait until it ends, and return its exit status. until: by time.monotonic(); then it is interrupted, and killed
        after `GRACE`. In the end all processes of its session are killed."""
        try:
            self.process.wait(max(until - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            self.late = True
            self._send(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        self._send(signal.SIGKILL)  # processes that it left running would hold GPU memory
        return self.process.wait()

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def run_child(command: list[str], limit: float) -> str:
    """Run a command and return its output. Raises RuntimeError, with the end of the output, if it fails or takes more than
    `limit` seconds."""
    child = Child(command)
    status = child.wait(time.monotonic() + limit)
    if child.late:
        raise RuntimeError(f"{' '.join(command[:6])} took more than {limit:.0f} s:\n{child.text()[-2000:]}")
    if status != 0:
        raise RuntimeError(f"{' '.join(command[:6])} exited with {status}:\n{child.text()[-5000:]}")
    return child.text()


@dataclass(frozen=True)
class Tests:
    """The result of a pytest run. failures: one line each. finished: whether it was not cut off."""

    passed: int
    failed: int
    failures: list[str]
    finished: bool

    @property
    def ok(self) -> bool:
        """Whether at least one test passed and none failed."""
        return not self.failed and self.passed > 0


def pytest_command(files: list[str], workers: int) -> list[str]:
    import importlib.util

    beside = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *beside, *files]


def read_tests(output: str, *, finished: bool) -> Tests:
    """Parse the output of `pytest -v`, whole or cut off: the line of each test, and the summary's lines of failures."""
    # With pytest-xdist a test's line is "[gw0] [ 10%] PASSED name", else "name PASSED [ 10%]".
    seen = re.findall(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR) (.+)$", output, re.M)
    seen += [(verdict, name) for name, verdict in re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR)\b", output, re.M)]
    passed = sum(verdict == "PASSED" for verdict, _ in seen)
    # The summary has the reasons of failures. A run that was killed has no summary.
    summary = re.findall(r"^(?:FAILED|ERROR) (\S+::.*)$", output, re.M)
    names = summary or [name.strip() for verdict, name in seen if verdict != "PASSED"]
    failures = list(dict.fromkeys(names))
    return Tests(passed, len(failures), failures, finished)


def triton_tests() -> list[str]:
    """The test files of the Triton kernels that run on a GPU. The others interpret Triton, or execute PTX, on the CPU."""
    on_cpu = ("interpreted", "compiled", "tuning")
    found = sorted((ROOT / "tests/kernels").glob("test_triton_*.py"))
    return [str(p.relative_to(ROOT)) for p in found if not any(word in p.name for word in on_cpu)]


CUDA_TESTS = ["tests/kernels/test_cuda_gpu.py"]


def build(limit: float) -> dict[str, int]:
    """Build the native libraries in place, CUDA for this machine's GPU. Returns the library's size, its kernels, and their
    most registers, as ptxas reports them. Raises RuntimeError if the build fails or a kernel spills registers."""
    import importlib.util

    if importlib.util.find_spec("tvm_ffi") is None:
        raise RuntimeError("apache-tvm-ffi is not installed: run benchmarks/gpu_prepare.py where packages can be had")
    output = run_child([sys.executable, "setup.py", "build_ext", "--inplace"], limit)
    library = Path(ROOT / "cai_runtime/_lib/libcai_cuda.so")
    if not library.exists():
        raise RuntimeError(f"the build made no {library.name}: was nvcc found?\n{output[-2000:]}")
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", output)]
    if any(spilled):
        raise RuntimeError(f"{sum(n > 0 for n in spilled)} of {len(spilled)} CUDA kernels spill registers")
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", output)]
    return {"bytes": library.stat().st_size, "kernels": len(registers), "most_registers": max(registers, default=0)}
