"""What compression costs SmolLM2-135M-Instruct: perplexity on unseen Wikipedia text, against the dense model's.

    python benchmarks/compress.py keep --keep 0.9 0.8 0.5 --calibration wikipedia self
    python benchmarks/compress.py stages --keep 0.8
    python benchmarks/compress.py bytes --target 45% 30%

keep: `cai compress` as it is by default, at several budgets in parameters. stages: what each stage adds, one by one.
bytes: factors and stores competing under a budget in bytes, beside quantization alone (int8 and int4 competing, and every
layer in one store).

Calibrates on the first half of the Wikipedia sample's articles, or on what --calibration names, and scores 48 windows of 512
tokens spread evenly over the last quarter, which nothing else has seen. The judge is transformers over the checkpoint's
reconstructed weights, in fp32. Writes benchmarks/results/compress_<what>.json after every case.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.compress import compress
from cai_runtime.compress.calibration import tokenize
from cai_runtime.compress.evaluate import dense_reference, perplexity, slim_as_transformers
from cai_runtime.convert.sources import pull
from cai_runtime.convert.texts import split_articles, wikipedia_articles
from cai_runtime.engine.open import load_tokenizer

MODEL = "smollm2-135m-instruct"
WINDOW, WINDOWS = 512, 48
UNTRAINED: dict[str, Any] = {"refine_epochs": 0, "heal_tokens": 0}
STAGES: dict[str, dict[str, Any]] = {
    "decompose": {"allocation": "uniform", "curvature": False, **UNTRAINED},
    "+ loss gradients": {"allocation": "uniform", **UNTRAINED},
    "+ allocation": UNTRAINED,
    "+ shifted inputs": {"shift": True, **UNTRAINED},
    "+ refine": {"heal_tokens": 0},
    "+ heal": {},
}
Case = tuple[str, dict[str, Any]]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for calibration in args.calibration:
        source = {"calibration": calibration, "samples": args.samples}
        if args.what == "keep":
            for keep in args.keep:
                yield f"keep {keep}", {"keep": keep, "store": args.store, **source}
        elif args.what == "stages":
            for keep in args.keep:
                for stage in args.stages:
                    yield f"keep {keep} {stage}", {"keep": keep, "store": args.store, **STAGES[stage], **source}
        else:
            for target in args.target:
                yield f"{target} factors and stores", {"target_bytes": target, **source}
                yield f"{target} factors, int8", {"target_bytes": target, "store": "int8", **source}
                yield f"{target} stores alone", {"target_bytes": target, "kind": "dense", **source}
            for store in ("int8", "int4-g64"):
                yield f"{store} alone", {"keep": 1.0, "kind": "dense", "store": store, **source}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("keep", "stages", "bytes"))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--target", nargs="+", default=["45%", "30%"])
    parser.add_argument("--calibration", nargs="+", default=["wikipedia"], help='"wikipedia", "self" or a file')
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--store", default="int8")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    file = args.json or Path(__file__).parent / "results" / f"compress_{args.what}.json"

    source = pull(MODEL)
    tokens = tokenize(load_tokenizer(source), split_articles(wikipedia_articles()).test)
    windows = tokens[: tokens.numel() // WINDOW * WINDOW].view(-1, WINDOW)
    unseen = windows[torch.linspace(0, len(windows) - 1, WINDOWS).long()].flatten()
    dense = perplexity(dense_reference(source), unseen)
    print(f"dense: perplexity {dense:.2f}", flush=True)
    results: list[dict[str, Any]] = []
    for name, options in cases(args):
        start = perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            slim = Path(folder) / "slim"
            report = compress(source, slim, evaluate=False, **options)
            took = perf_counter() - start
            found = perplexity(slim_as_transformers(slim), unseen)
        results.append(
            {
                "case": name, "options": options, "calibration": report.calibration, "perplexity": found,
                "ratio": found / dense, "keep_parameters": report.keep_parameters, "bytes": report.total_bytes,
                "of_bf16": report.total_bytes / report.total_dense_bytes, "total_seconds": took,
                "seconds": report.seconds,
            }
        )  # fmt: skip
        print(
            f"{name}, {options['calibration']}: perplexity {found:.2f}, {found / dense:.3f} x dense, "
            f"{report.total_bytes / report.total_dense_bytes:.3f} of bf16, {took:.0f} s",
            flush=True,
        )
        document = {
            "benchmark": f"compress {args.what}", "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(), "versions": versions(), "model": MODEL, "tokens": unseen.numel(),
            "dense_perplexity": dense, "results": results,
        }  # fmt: skip
        file.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
