"""Runs one measurement in a child process: `run_child` starts it, `python -m cai_runtime.bench.child` is the child.

The job is JSON on standard input. The result is JSON in a file that the job names, because engines print to standard output.
A job names a function of `cai_runtime.bench`, so this module imports no benchmark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from cai_runtime.errors import BenchmarkError, CaiError

STDERR_LINES = 20  # last lines of a failed child, for the error


def run_child(job: dict[str, Any], *, threads: int) -> Any:
    """Run `job` in a new process, with `threads` threads for every library, and return its result.

    job: {"do": "module.function", ...} names a function of `cai_runtime.bench`, such as "subjects.decode". The child calls
    it with the job; it returns JSON values.

    Raises BenchmarkError with the child's error, or with the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="cai-bench-") as scratch:
        out = Path(scratch) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", "cai_runtime.bench.child"],
            input=json.dumps({**job, "threads": threads, "out": str(out)}),
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "CAI_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            errors="replace",
        )
        what = job.get("subject", job["do"])
        if not out.exists():
            tail = "\n".join((done.stderr or done.stdout).splitlines()[-STDERR_LINES:])
            raise BenchmarkError(f"measuring {what} failed with exit status {done.returncode}:\n{tail}")
        answer = json.loads(out.read_text())
    if "error" in answer:
        raise BenchmarkError(f"measuring {what}: {answer['error']}")
    return answer["result"]


def perform(job: dict[str, Any]) -> Any:
    """Run a job in this process and return its result, JSON values."""
    module, _, function = job["do"].rpartition(".")
    return getattr(import_module(f"cai_runtime.bench.{module}"), function)(job)


def main() -> int:
    job = json.load(sys.stdin)
    try:
        answer = {"result": perform(job)}
    except CaiError as error:
        answer = {"error": str(error)}
    Path(job["out"]).write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
