"""Checks that `cai batch`, killed at random moments and restarted, loses nothing and does nothing twice.

    python benchmarks/batch_kills.py [CHECKPOINT] [--requests N] [--kills K]

One run of `cai batch` is undisturbed. The other gets SIGKILL after random times and restarts with the same command. Then
each request must have exactly one result, and the same text as in the undisturbed run. Besides chats, the requests hold
completions, Responses and lines at fault. Writes benchmarks/results/batch_kills.json.
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
from typing import Any

from batch import RESULTS, bodies
from killed_runs import killed_runs

from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.cli.options import checkpoint_name, demo_checkpoints


def requests(count: int, tokens: int) -> list[dict[str, Any]]:
    """Every tenth line is a completion, every tenth a response, and every hundredth has a parameter at fault."""
    lines = []
    for i, body in enumerate(bodies(count, tokens)):
        url, question = "/v1/chat/completions", body["messages"][-1]["content"]
        if i % 10 == 3:
            url, body = "/v1/completions", {"prompt": question, "max_tokens": tokens, "seed": i}
        elif i % 10 == 6:
            url, body = "/v1/responses", {"input": question, "max_output_tokens": max(tokens, 16), "temperature": 0}
        elif i % 100 == 9:
            body = {**body, "temperature": 9}
        lines.append({"custom_id": str(i), "method": "POST", "url": url, "body": body})
    return lines


def results(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def answer(result: dict[str, Any]) -> Any:
    """What a result says, without ids and times."""
    body = result["response"]["body"] if result["response"] else result["error"]
    if body.get("output"):  # of a response, whose items have ids
        return [item.get("content") for item in body["output"]]
    return body.get("choices") or body.get("error") or body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "batch_kills.json")
    args = parser.parse_args()
    checkpoint, draw = args.checkpoint or demo_checkpoints()[0], random.Random(args.seed)
    given = requests(args.requests, args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        source, whole, cut = (Path(folder) / name for name in ("in.jsonl", "whole.jsonl", "cut.jsonl"))
        source.write_text("".join(json.dumps(line) + "\n" for line in given))

        def command(output: Path) -> list[str]:
            return [
                sys.executable, "-m", "cai_runtime.cli", "batch", str(source), str(output), "--model", str(checkpoint)
            ]  # fmt: skip

        def on_disk() -> dict[str, int]:
            return {"lines": cut.read_bytes().count(b"\n") if cut.exists() else 0}

        begin = perf_counter()
        subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL)
        seconds = perf_counter() - begin
        most = 1.5 / (args.kills + 1)
        kills = killed_runs(command(cut), [draw.uniform(0.1, most) * seconds for _ in range(args.kills)], on_disk)
        expected = {result["custom_id"]: answer(result) for result in results(whole)}
        found = results(cut)
    counts = {name: sum(result["custom_id"] == name for result in found) for name in expected}
    lost = [name for name, count in counts.items() if count == 0]
    twice = [name for name, count in counts.items() if count > 1]
    other = [result["custom_id"] for result in found if answer(result) != expected.get(result["custom_id"])]
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine(), "versions": versions(),
        "checkpoint": checkpoint_name(checkpoint),
        "requests": len(given), "seconds": seconds, "kills": kills, "lost": len(lost), "twice": len(twice),
        "other_answers": len(other), "failed_lines": sum(result["response"]["status_code"] != 200 for result in found),
    }  # fmt: skip
    print(json.dumps({key: record[key] for key in ("requests", "lost", "twice", "other_answers", "failed_lines")}))
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {args.out}")
    if lost or twice or other:
        sys.exit(f"lost {lost[:5]}, done twice {twice[:5]}, other answers {other[:5]}")


if __name__ == "__main__":
    main()
