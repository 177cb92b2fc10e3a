"""One measurement in a process of its own: `measure_in_child` starts it, `python -m cai_runtime.bench.child` is it.

The job comes as JSON on standard input, the result goes as JSON to the file that the job names: standard output belongs
to whatever the engine prints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cai_runtime.errors import BenchmarkError, CaiError

STDERR_LINES = 20  # of a failed child that are shown


def run_child(job: dict[str, Any], *, threads: int) -> Any:
    """Run `job` in a new process with `threads` threads for every library, and return its result.

    job: {"do": "bandwidth" or "roofs", "device": ...}, or {"do": "decode" or "prefill", "subject": ..., "path": ...,
    "settings": {...}}.

    Raises BenchmarkError with the child's error, or with the end of what it printed.
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
    """Do a job, in this process; the result is made of what JSON knows."""
    if job["do"] == "bandwidth":
        from cai_runtime.bench.bandwidth import read_bandwidth
        from cai_runtime.engine.open import choose_device

        device = str(choose_device(job["device"]))
        return {"device": device, "bytes_per_s": read_bandwidth(device, threads=job["threads"])}
    if job["do"] == "roofs":
        from cai_runtime.bench.roofs import measure_roofs
        from cai_runtime.engine.open import choose_device

        device = str(choose_device(job["device"]))
        return {"device": device, **asdict(measure_roofs(device, job["threads"]))}
    from cai_runtime.bench import decode, peers, prefill

    kinds: dict[str, Callable[[Path, decode.DecodeSettings], decode.Subject]] = {
        "cai_runtime": decode.OurEngine,
        "llama.cpp": peers.LlamaCpp,
        "transformers": peers.Transformers,
    }
    settings = decode.DecodeSettings(**job["settings"])
    subject = kinds[job["subject"]](Path(job["path"]), settings)
    try:
        if job["do"] == "prefill":
            return prefill.measure_prefill(subject, settings)
        return asdict(decode.measure(subject, settings))
    finally:
        subject.close()


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
