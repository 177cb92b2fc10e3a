"""Measures what `client.batch` costs beside the engine alone: `python benchmarks/batch.py [CHECKPOINT] [--requests N]`.

The same requests, in the same process and on the same engine, in turns: through `client.batch` from file to file, and
straight to the engine, all at once, with prompts that are tokenized before the clock starts. Prints tokens/s of each, and
the ratio of the medians: the batch's tokens/s by the engine's. The texts of both ways are compared, too.

CHECKPOINT: a directory, by default the oldest of `cai demo`. Writes benchmarks/results/batch.json with machine and date.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from cai_runtime.api import chat
from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.cli.options import checkpoint_name, demo_checkpoints
from cai_runtime.client import Client

RESULTS = Path(__file__).parent / "results"
SYSTEM = "You are a helpful assistant who answers in one short sentence."
TOPICS = ("the sea", "a violin", "bread", "the moon", "chess", "a bicycle", "rain", "an owl", "glass", "tea")


def bodies(count: int, tokens: int) -> list[dict[str, Any]]:
    """Chats with one system prompt, as batches have, and questions of a few words."""
    return [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"Question {i}: what should one know about {TOPICS[i % len(TOPICS)]}?"},
            ],
            "max_tokens": tokens,
            "seed": i,
        }
        for i in range(count)
    ]


def through_batch(client: Client, given: list[dict[str, Any]], directory: Path) -> tuple[float, dict[str, str]]:
    """Seconds, and the text of each request by its number."""
    source, output = directory / "in.jsonl", directory / "out.jsonl"
    lines = (
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i, body in enumerate(given)
    )
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output.unlink(missing_ok=True)
    begin = time.perf_counter()
    summary = client.batch(source, output, progress=False)
    seconds = time.perf_counter() - begin
    assert summary.succeeded == len(given), f"{summary.failed} requests failed: see {output}"
    results = map(json.loads, output.read_text().splitlines())
    return seconds, {r["custom_id"]: r["response"]["body"]["choices"][0]["message"]["content"] for r in results}


def through_engine(client: Client, given: list[dict[str, Any]]) -> tuple[float, dict[str, str], int]:
    """The same, and the tokens generated."""
    opened = client._host.open(client._host.resolve(None))
    generations = [chat.prepare(chat.parse(body), "model", opened) for body in given]
    begin = time.perf_counter()
    running = [generation.submit(opened.engine) for generation in generations]
    replies = [each.whole() for each in running]
    seconds = time.perf_counter() - begin
    texts = {str(i): reply.choices[0].message.content for i, reply in enumerate(replies)}
    return seconds, texts, sum(reply.usage.completion_tokens for reply in replies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "batch.json")
    args = parser.parse_args()
    checkpoint = args.checkpoint or demo_checkpoints()[0]
    given = bodies(args.requests, args.tokens)
    times: dict[str, list[float]] = {"batch": [], "engine": []}
    with Client(checkpoint) as client, tempfile.TemporaryDirectory() as directory:
        through_engine(client, given[:64])  # warm: the model, the pages of the system prompt
        for _ in range(args.rounds):
            seconds, texts = through_batch(client, given, Path(directory))
            times["batch"].append(seconds)
            seconds, expected, tokens = through_engine(client, given)
            times["engine"].append(seconds)
            assert texts == expected, "the batch gave other texts"
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine(), "versions": versions(),
        "checkpoint": checkpoint_name(checkpoint),
        "requests": args.requests, "tokens": tokens, "seconds": times,
        "tokens_per_s": {name: tokens / median(seconds) for name, seconds in times.items()},
        "batch_by_engine": median(times["engine"]) / median(times["batch"]),
    }  # fmt: skip
    print(
        json.dumps({name: found[name] for name in ("requests", "tokens", "tokens_per_s", "batch_by_engine")}, indent=2)
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
