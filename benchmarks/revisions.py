"""Whole runs of two checkouts in turns: `python benchmarks/revisions.py OTHER [--python PYTHON] [--out FILE]`.

OTHER is a checkout whose library is built; PYTHON an interpreter that imports it, default this one. Both open the same
checkpoint in a process of their own and answer the same prompts, greedily, one after the other, in changing order, so that
a machine that changes speed does it to both. Reported: tokens/s of submission to last token, and the median of the ratios.

Writes benchmarks/results/revisions.json with machine, date and commits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent.parent
# sequences, tokens of each, tokens of a prompt, rounds
RUNS = ((1, 96, 16, 30), (8, 48, 16, 14), (32, 32, 16, 20), (1, 1, 512, 10))


def answer(checkpoint: Path) -> None:
    """The child: for each line `sequences tokens prompt` on stdin, one with the seconds it took."""
    sys.path.insert(0, str(Path.cwd()))
    import numpy as np

    from cai_runtime.engine.open import open_engine
    from cai_runtime.engine.request import Request, SamplingParams

    random = np.random.default_rng(0)
    with open_engine(checkpoint, kv_cache="512MiB") as engine:
        print("ready", flush=True)
        for line in sys.stdin:
            batch, tokens, length = map(int, line.split())
            params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
            prompts = random.integers(20, 40_000, (batch, length)).tolist()
            began = time.perf_counter()
            for handle in [engine.submit(Request(prompt, params)) for prompt in prompts]:
                handle.result()
            print(time.perf_counter() - began, flush=True)


class Checkout:
    def __init__(self, root: Path, python: str, checkpoint: Path):
        self.commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, check=True, capture_output=True, text=True
        ).stdout.strip()
        command = [python, str(HERE / "benchmarks" / "revisions.py"), "--answer", str(checkpoint)]
        self._process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if self._read() != "ready":
            raise SystemExit(f"the engine of {root} did not start: is its library built?")

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def seconds(self, batch: int, tokens: int, length: int) -> float:
        assert self._process.stdin is not None
        print(batch, tokens, length, file=self._process.stdin, flush=True)
        return float(self._read())

    def close(self) -> None:
        self._process.communicate()


def compare(this: Checkout, other: Checkout) -> list[dict[str, Any]]:
    found = []
    for batch, tokens, length, rounds in RUNS:
        pairs = []
        for number in range(rounds + 1):
            order = (this, other) if number % 2 else (other, this)
            took = {checkout: checkout.seconds(batch, tokens, length) for checkout in order}
            pairs.append((took[this], took[other]))
        here, there = zip(*pairs[1:], strict=True)  # the first warms up
        entry = {
            "batch": batch, "tokens": tokens, "prompt": length,
            "this_tokens_per_s": batch * (tokens if tokens > 1 else length) / median(here),
            "other_tokens_per_s": batch * (tokens if tokens > 1 else length) / median(there),
            "this_over_other": median(b / a for a, b in pairs[1:]),
        }  # fmt: skip
        print(f"{batch:2d} sequences, prompts of {length}, {tokens} tokens: {entry['this_tokens_per_s']:.0f} tokens/s, "
              f"the other {entry['other_tokens_per_s']:.0f}, ratio {entry['this_over_other']:.3f}", flush=True)  # fmt: skip
        found.append(entry)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", nargs="?", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "benchmarks" / "results" / "revisions.json")
    args = parser.parse_args()
    if args.answer is not None:
        return answer(args.answer)
    if args.other is None:
        parser.error("name the other checkout")
    from cai_runtime.bench.machine import describe_machine, versions
    from cai_runtime.cli.options import demo_checkpoints

    checkpoint = demo_checkpoints()[0]
    this, other = Checkout(HERE, sys.executable, checkpoint), Checkout(args.other, args.python, checkpoint)
    result = {
        "benchmark": "revisions",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": checkpoint.parent.name,
        "machine": describe_machine(),
        "versions": versions(),
        "this": this.commit,
        "other": other.commit,
        "runs": compare(this, other),
    }
    this.close()
    other.close()
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
