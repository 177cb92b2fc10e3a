"""What compression costs SmolLM2-135M-Instruct: perplexity on unseen Wikipedia text, against the dense model's.

    python benchmarks/compress.py --keep 0.9 0.8 --stages plain shift refine heal

Stages: "plain" decomposes, allocates and rounds; "shift" does that for shifted inputs; "refine" trains each block after
"plain"; "heal" trains the whole model after that (the compressor's default).

Calibrates on the first half of the Wikipedia sample's articles, or on what --calibration names, and scores 48 windows of 512
tokens spread evenly over the last quarter, which nothing else has seen. The judge is transformers over the checkpoint's
reconstructed weights. Writes benchmarks/results/compress.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.compress import compress
from cai_runtime.compress.calibration import tokenize
from cai_runtime.compress.evaluate import dense_reference, perplexity, slim_as_transformers
from cai_runtime.convert.sources import pull
from cai_runtime.convert.texts import split_articles, wikipedia_articles
from cai_runtime.engine.open import load_tokenizer

WINDOW, WINDOWS = 512, 48
STAGES = {
    "plain": {"refine_epochs": 0, "heal_tokens": 0},
    "shift": {"shift": True, "refine_epochs": 0, "heal_tokens": 0},
    "refine": {"heal_tokens": 0},
    "heal": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8])
    parser.add_argument("--stages", nargs="+", default=["plain", "refine", "heal"], choices=STAGES)
    parser.add_argument("--allocation", default="pooled", choices=["pooled", "uniform"])
    parser.add_argument("--calibration", default="wikipedia", help='"wikipedia", "self" or a file')
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--store", default="int8")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "compress.json")
    args = parser.parse_args()

    source = pull("smollm2-135m-instruct")
    tokens = tokenize(load_tokenizer(source), split_articles(wikipedia_articles()).test)
    windows = tokens[: tokens.numel() // WINDOW * WINDOW].view(-1, WINDOW)
    unseen = windows[torch.linspace(0, len(windows) - 1, WINDOWS).long()].flatten()
    dense = perplexity(dense_reference(source), unseen)
    print(f"dense: perplexity {dense:.2f}", flush=True)
    results = []
    for keep in args.keep:
        for stage in args.stages:
            with tempfile.TemporaryDirectory() as folder:
                slim = Path(folder) / "slim"
                report = compress(
                    source,
                    slim,
                    keep=keep,
                    allocation=args.allocation,
                    store=args.store,
                    calibration=args.calibration,
                    samples=args.samples,
                    evaluate=False,
                    **STAGES[stage],
                )
                found = perplexity(slim_as_transformers(slim), unseen)
            entry = {
                "keep": keep, "stage": stage, "allocation": args.allocation, "store": args.store,
                "calibration": report.calibration["source"], "samples": args.samples, "perplexity": found,
                "ratio": found / dense, "bytes": report.total_bytes, "seconds": report.seconds,
            }  # fmt: skip
            results.append(entry)
            took = sum(report.seconds.values())
            print(
                f"keep {keep} {stage}: perplexity {found:.2f}, {found / dense:.3f} x dense, {took:.0f} s",
                flush=True,
            )
    document = {
        "benchmark": "compress", "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine(),
        "versions": versions(), "model": "SmolLM2-135M-Instruct", "dense_perplexity": dense, "results": results,
    }  # fmt: skip
    args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
