"""Measures SmolLM2-135M-Instruct's perplexity on unseen Wikipedia text after compression, against the dense model's.

    python benchmarks/compress.py keep --keep 0.9 0.8 0.5 --calibration wikipedia self
    python benchmarks/compress.py stages --keep 0.8
    python benchmarks/compress.py bytes --target 45% 30% --fast

keep: `cai compress` with its defaults, at several keeps. stages: the stages added one by one. bytes: ranks and stores chosen
under a budget in bytes, beside quantization alone, with int8 and int4 competing or every layer in one store.

Calibrates on the first half of the Wikipedia sample's articles, or on --calibration. Scores 48 windows of 512 tokens, spread
evenly over the last quarter, which nothing else uses, by transformers in fp32 on dense matrices.

Cases that share a calibration, or a refinement, start from copies of its work directory: it runs once, and its seconds
count in each case. Writes benchmarks/results/compress_<what>.json after every case. A case replaces an earlier one of the
same name and options. A budget that can't be met is printed and skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.compressor import compress, run
from cai_runtime.compressor.data.calibration import tokenize
from cai_runtime.compressor.options import HEAL_TOKENS
from cai_runtime.compressor.pipeline import options_of
from cai_runtime.convert.sources import pull
from cai_runtime.convert.texts import split_articles, wikipedia_articles
from cai_runtime.engine.open import load_tokenizer
from cai_runtime.errors import CompressionError
from cai_runtime.judge.evaluate import perplexity
from cai_runtime.stock.load import dense_reference, slim_as_transformers

MODEL = "smollm2-135m-instruct"
WINDOW, WINDOWS = 512, 48
UNTRAINED: dict[str, Any] = {"refine_epochs": 0, "heal_tokens": 0}
STAGES: dict[str, dict[str, Any]] = {
    "decompose": {"allocation": "uniform", "curvature": False, **UNTRAINED},
    "+ loss gradients": {"allocation": "uniform", **UNTRAINED},
    "+ allocation": UNTRAINED,
    "+ shifted inputs": {"shift": True, **UNTRAINED},
    "+ refine": {"refine_epochs": 2, "heal_tokens": 0},
    "+ heal": {"refine_epochs": 2},
    "heal, not refined": {"refine_epochs": 0},
}
Case = tuple[str, dict[str, Any]]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for calibration in args.calibration:
        source = {"calibration": calibration, "samples": args.samples, **(UNTRAINED if args.fast else {})}
        trained = "" if args.fast else ", healed"
        if args.what == "keep":
            for keep in args.keep:
                yield f"keep {keep}", {"keep": keep, "store": args.store, **source}
        elif args.what == "stages":
            for keep in args.keep:
                for stage in args.stages:
                    yield f"keep {keep} {stage}", {"keep": keep, "store": args.store, **STAGES[stage], **source}
        else:
            for target in args.target:
                yield f"{target} factors and stores{trained}", {"target_bytes": target, **source}
                yield f"{target} factors, int8{trained}", {"target_bytes": target, "store": "int8", **source}
                yield f"{target} stores alone{trained}", {"target_bytes": target, "kind": "dense", **source}
            for store in ("int8", "int4-g64"):
                yield f"{store} alone{trained}", {"keep": 1.0, "kind": "dense", "store": store, **source}


class _Done(Exception):
    """Ends a compression after the stages that cases share."""


def calibrated(source: Path, folder: Path, options: dict[str, Any]) -> Path:
    """The work directory in `folder` of a compression that has reached its allocation. Cases with one calibration share
    it."""
    # As much text as healing needs, also for cases without healing, so that both have the same text.
    shared = {key: options[key] for key in ("calibration", "samples", "curvature") if key in options}
    shared["heal_tokens"] = options_of(**options).heal_tokens or HEAL_TOKENS
    name = "-".join(map(str, shared.values()))
    work = folder / f".{name}.work"
    if not work.exists():
        with patch.object(run, "choose", side_effect=_Done), suppress(_Done):
            compress(source, folder / name, evaluate=False, **shared)
    return work


def refined(source: Path, folder: Path, options: dict[str, Any]) -> Path:
    """The work directory in `folder` of a compression that has reached its healing. Cases that differ only there share
    it."""
    shared = {key: value for key, value in options.items() if key != "heal_tokens"}
    slim = folder / hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]
    work = slim.with_name(f".{slim.name}.work")
    if not work.exists():
        go_on(calibrated(source, folder, options), slim, shared)
        with patch.object(run.Run, "_heal", side_effect=_Done), suppress(_Done):
            compress(source, slim, evaluate=False, **shared)
    return work


def go_on(work: Path, slim: Path, options: dict[str, Any]) -> None:
    """Copy `work` as the work directory of a compression to `slim` with these options."""
    own = slim.with_name(f".{slim.name}.work")
    # Hard links suffice: a compression replaces or removes these files and never writes into them.
    shutil.copytree(work, own, copy_function=os.link)
    # A budget in bytes needs other curves than one in parameters.
    if "target_bytes" in options:
        for file in own.glob("**/curves*"):
            file.unlink()
    manifest = own / "manifest.json"
    key = json.loads(manifest.read_text())
    key["options"] = asdict(options_of(**options))
    manifest.unlink()
    manifest.write_text(json.dumps(key, sort_keys=True, indent=1))


def earlier(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["results"] if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("keep", "stages", "bytes"))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--target", nargs="+", default=["45%", "30%"])
    parser.add_argument("--calibration", nargs="+", default=["wikipedia"], help='"wikipedia", "self" or a file')
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--store", default="int8")
    parser.add_argument("--fast", action="store_true", help="bytes: without training")
    parser.add_argument("--cases", nargs="+", metavar="TEXT", help="only cases with one of these in their name")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keeps calibrations for later runs of the same program (10 GB each)"
    )
    args = parser.parse_args()
    file = args.json or Path(__file__).parent / "results" / f"compress_{args.what}.json"

    source = pull(MODEL)
    tokens = tokenize(load_tokenizer(source), split_articles(wikipedia_articles()).test)
    windows = tokens[: tokens.numel() // WINDOW * WINDOW].view(-1, WINDOW)
    unseen = windows[torch.linspace(0, len(windows) - 1, WINDOWS).long()].flatten()
    dense = perplexity(dense_reference(source), unseen)
    print(f"dense: perplexity {dense:.2f}", flush=True)
    results = earlier(file)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(exist_ok=True)
        for name, options in cases(args):
            if args.cases and not any(text in name for text in args.cases):
                continue
            try:
                case = measure(source, folder, options, unseen) | {"case": name}
            except CompressionError as e:
                if "target_bytes" not in options:
                    raise
                # The smallest sizes of all layers together may exceed the budget.
                print(f"{name}, {options['calibration']}: {e}", flush=True)
                continue
            case["ratio"] = case["perplexity"] / dense
            print(
                f"{name}, {options['calibration']}: perplexity {case['perplexity']:.2f}, {case['ratio']:.3f} x dense, "
                f"{case['of_bf16']:.3f} of bf16, {sum(case['seconds'].values()):.0f} s",
                flush=True,
            )
            results = [r for r in results if (r["case"], r["options"]) != (name, options)] + [case]
            document = {
                "benchmark": f"compress {args.what}", "machine": describe_machine(), "versions": versions(),
                "model": MODEL, "tokens": unseen.numel(), "dense_perplexity": dense, "results": results,
            }  # fmt: skip
            file.write_text(json.dumps(document, indent=2) + "\n")


def measure(source: Path, folder: Path, options: dict[str, Any], unseen: torch.Tensor) -> dict[str, Any]:
    """Compress with these options and judge the result."""
    slim = folder / "slim"
    shutil.rmtree(slim.with_name(f".{slim.name}.work"), ignore_errors=True)  # of a run that was killed
    trained = options_of(**options).refine_epochs > 0
    go_on((refined if trained else calibrated)(source, folder, options), slim, options)
    report = compress(source, slim, evaluate=False, **options)
    found = perplexity(slim_as_transformers(slim), unseen)
    shutil.rmtree(slim)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "options": options, "calibration": report.calibration,
        "perplexity": found, "keep_parameters": report.keep_parameters, "bytes": report.total_bytes,
        "of_bf16": report.total_bytes / report.total_dense_bytes, "seconds": report.seconds,
        "healing": report.healing[:: max(len(report.healing) // 16, 1)],
    }  # fmt: skip


if __name__ == "__main__":
    main()
