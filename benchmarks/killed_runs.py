"""Runs of a command that are killed, for the benchmarks of what survives a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence


def killed_runs(
    command: Sequence[str], times: Sequence[float], found: Callable[[], dict[str, int]]
) -> list[dict[str, float]]:
    """Run a command once for each of `times`, kill it after so many seconds (SIGKILL), and then run it to its end. A run
    that ends before its time is the last one.

    Returns for each kill the seconds since the run's start, and what `found` says is on disk.
    """
    met: list[dict[str, float]] = []
    for after in (*times, None):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, errors = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            met.append({"seconds": round(after or 0, 1), **found()})
            print("killed:", ", ".join(f"{value} {name}" for name, value in met[-1].items()), flush=True)
            continue
        if process.returncode:
            sys.exit(errors.decode())
        break
    return met
