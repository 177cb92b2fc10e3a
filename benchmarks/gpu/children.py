"""Processes with a time limit: a hang costs what it was given, and no more."""

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

GRACE = 5.0  # seconds from the interrupt, on which pytest says what failed so far, to the kill


def child_environment() -> dict[str, str]:
    """This process's packages, also where the repository is not installed: the working folder stays off the path, whose
    cai_runtime has neither kernels nor models in it."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "300",  # else pytest cuts the reasons off its summary
    }


def _scratch_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", errors="replace")  # open as long as its child


@dataclass
class Child:
    """A process in a session of its own, which ends with all that it started; its output goes to a file."""

    command: list[str]
    output: IO[str] = field(default_factory=_scratch_file)
    late: bool = False

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=child_environment(), stdin=subprocess.DEVNULL, stdout=self.output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait(self, until: float) -> int:
        """Until it ends, or `until` by time.monotonic: then it is interrupted, and after `GRACE` killed."""
        try:
            self.process.wait(max(until - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            self.late = True
            self._send(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        self._send(signal.SIGKILL)  # what it left running holds the GPU
        return self.process.wait()

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def run_child(command: list[str], limit: float) -> str:
    """The child's output. A failure, or more than `limit` seconds, raises RuntimeError with its end."""
    child = Child(command)
    status = child.wait(time.monotonic() + limit)
    if child.late:
        raise RuntimeError(f"{' '.join(command[:6])} took more than {limit:.0f} s:\n{child.text()[-2000:]}")
    if status != 0:
        raise RuntimeError(f"{' '.join(command[:6])} exited with {status}:\n{child.text()[-5000:]}")
    return child.text()


@dataclass(frozen=True)
class Tests:
    """What a run of pytest came to. failures: one line for each."""

    passed: int
    failed: int
    failures: list[str]
    finished: bool

    @property
    def ok(self) -> bool:
        """Nothing failed, and something was checked."""
        return not self.failed and self.passed > 0


def pytest_command(files: list[str], workers: int) -> list[str]:
    import importlib.util

    beside = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *beside, *files]


def read_tests(output: str, *, finished: bool) -> Tests:
    """From the output of `pytest -v`, also of a run that was cut off: a line for each test, and the summary's lines of those
    that failed."""
    # "[gw0] [ 10%] PASSED name" where tests run side by side, else "name PASSED [ 10%]".
    seen = re.findall(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR) (.+)$", output, re.M)
    seen += [(verdict, name) for name, verdict in re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR)\b", output, re.M)]
    passed = sum(verdict == "PASSED" for verdict, _ in seen)
    summary = re.findall(
        r"^(?:FAILED|ERROR) (\S+::.*)$", output, re.M
    )  # has the reasons; a run that was killed has none
    names = summary or [name.strip() for verdict, name in seen if verdict != "PASSED"]
    failures = list(dict.fromkeys(names))
    return Tests(passed, len(failures), failures, finished)


def triton_tests() -> list[str]:
    """Every test file of the Triton kernels that runs on a GPU: not those that interpret, or execute PTX on the CPU."""
    apart = ("interpreted", "compiled", "tuning")
    found = sorted((ROOT / "tests/kernels").glob("test_triton_*.py"))
    return [str(p.relative_to(ROOT)) for p in found if not any(word in p.name for word in apart)]


CUDA_TESTS = ["tests/kernels/test_cuda_gpu.py"]


def build(limit: float) -> dict[str, int]:
    """The native libraries, in place: CUDA for the GPU that is there. Registers and spills of its kernels, by ptxas."""
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
