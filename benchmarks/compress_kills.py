"""Checks that a compression, killed at random moments and restarted, gives the same checkpoint bit for bit.

    python benchmarks/compress_kills.py --kills 5

Compresses SmolLM2-135M-Instruct with every stage, on little text, so that it takes minutes. One run is undisturbed. The
other gets SIGKILL after random times and restarts with the same command. Then the script compares every file of the two
checkpoints, except the report's times. Writes benchmarks/results/compress_kills.json.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

from killed_runs import killed_runs

from cai_runtime.bench.machine import describe_machine, versions

OPTIONS = [
    "--keep", "0.8", "--calibration", "wikipedia", "--samples", "6", "--sequence-length", "256", "--refine-epochs", "1",
    "--heal-tokens", "6144", "--no-evaluation",
]  # fmt: skip
MODEL = "smollm2-135m-instruct"


def command(dst: Path) -> list[str]:
    return [sys.executable, "-m", "cai_runtime.cli", "compress", MODEL, str(dst), *OPTIONS]


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    report = json.loads(found["slim_report.json"])
    del report["seconds"]
    return {**found, "slim_report.json": json.dumps(report).encode()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "compress_kills.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        straight, other = Path(folder) / "straight", Path(folder) / "killed"
        start = perf_counter()
        subprocess.run(command(straight), check=True, stdout=subprocess.DEVNULL)
        seconds = perf_counter() - start
        print(f"left alone: {seconds:.0f} s", flush=True)
        draw, work = random.Random(args.seed), other.with_name(f".{other.name}.work")
        times = [draw.uniform(0.1, 0.5) * seconds for _ in range(args.kills)]
        met = killed_runs(command(other), times, lambda: {"steps": len(list(work.glob("*.safetensors")))})
        a, b = contents(straight), contents(other)
        different = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        left = [str(p.name) for p in Path(folder).iterdir() if p not in (straight, other)]
    print("the same bit for bit" if not different else f"different: {different}", flush=True)
    document = {
        "benchmark": "compress kills", "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(), "versions": versions(), "model": MODEL, "options": OPTIONS, "seconds": seconds,
        "kills": met, "files": len(a), "different": different, "left_behind": left,
    }  # fmt: skip
    args.json.write_text(json.dumps(document, indent=2) + "\n")
    sys.exit(bool(different or left))


if __name__ == "__main__":
    main()
