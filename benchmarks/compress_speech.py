"""Measures Whisper tiny.en's word error rates before and after compression of encoder and decoder.

    python benchmarks/compress_speech.py --calibration DIR [DIR ...] --judge NAME=DIR [NAME=DIR ...] --work DIR

Clips with transcripts come from speech_clips.py or any other source; no clip may be in both sets. The cases are, for each
keep, `cai compress` with its defaults and without training (--fast), and int8 alone with every layer dense. Transformers'
Whisper transcribes greedily, in fp32 on dense matrices; its English normalizer normalizes the words. Writes
benchmarks/results/compress_speech.json after every case, with some of the clips that the two models hear differently.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cai_runtime.audio.files import find_clips
from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.compressor import compress
from cai_runtime.compressor.pipeline import options_of
from cai_runtime.convert.sources import pull
from cai_runtime.judge.speech_evaluation import compare_speech

MODEL = "whisper-tiny.en"
UNTRAINED: dict[str, Any] = {"refine_epochs": 0, "heal_tokens": 0}
SHOWN = 12  # clips heard differently that the JSON lists for each set


def cases(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if "int8" in args.cases:
        found["int8 alone"] = {"keep": 1.0, "store": "int8", **UNTRAINED}
    for keep in args.keep:
        if "fast" in args.cases:
            found[f"keep {keep} fast"] = {"keep": keep, **UNTRAINED}
        if "full" in args.cases:
            found[f"keep {keep}"] = {"keep": keep}
    return found


def judge(path: Path, sets: dict[str, str], reference: Path) -> dict[str, Any]:
    """Word errors of a checkpoint and of the dense model on each set."""
    found = {}
    for name, audio in sets.items():
        result = compare_speech(reference, path, audio=audio)
        assert result.candidate is not None and result.divergence is not None
        different = [clip for clip in result.clips if clip.reference != clip.candidate]
        found[name] = {
            "clips": result.audio["clips"],
            "minutes": round(result.audio["seconds"] / 60, 2),
            "words": result.reference.words,
            "dense_errors": result.reference.errors,
            "errors": result.candidate.errors,
            "dense_word_error": result.reference.word_error,
            "word_error": result.candidate.word_error,
            "word_error_error": result.candidate.word_error_error,
            "dense_word_error_capped": result.reference.word_error_capped,
            "word_error_capped": result.candidate.word_error_capped,
            "kl": result.divergence.kl,
            "kl_error": result.divergence.kl_error,
            "top1": result.divergence.top1,
            "different": [
                {"clip": c.name, "said": c.said, "dense": c.reference, "slim": c.candidate} for c in different[:SHOWN]
            ],
        }
        row, words = found[name], "no transcripts"
        if row["words"]:
            words = (
                f"{row['words']} words, word error {row['dense_word_error']:.2%} -> {row['word_error']:.2%} "
                f"(at most a clip's words: {row['word_error_capped']:.2%})"
            )
        print(f"    {name}: {words}, KL {row['kl']:.4f}, top-1 {row['top1']:.2%}", flush=True)
    return found


def made(source: Path, slim: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Make the checkpoint if it is missing, and return its report. Ends the program if it was made with other options."""
    if not slim.exists():
        compress(source, slim, evaluate=False, **options)
    report: dict[str, Any] = json.loads((slim / "slim_report.json").read_text())
    asked = json.loads(json.dumps(asdict(options_of(**options, speech=True))))
    kept = report["options"]
    if other := sorted(key for key in {*kept, *asked} if kept.get(key) != asked.get(key)):
        raise SystemExit(
            f"{slim} was made with other options: {', '.join(f'{k} {kept.get(k)}, not {asked.get(k)}' for k in other)}; "
            "remove it, or give another --work"
        )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", nargs="+", required=True, metavar="DIR")
    parser.add_argument("--judge", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8])
    parser.add_argument("--cases", nargs="+", choices=("int8", "fast", "full"), default=["int8", "fast", "full"])
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--heal-tokens", type=int, default=65_536)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="for checkpoints; a killed run goes on")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results/compress_speech.json")
    args = parser.parse_args()
    sets = dict(item.split("=", 1) for item in args.judge)
    calibrated = {clip.path.resolve() for clip in find_clips(args.calibration)}
    if both := [c.path for audio in sets.values() for c in find_clips(audio) if c.path.resolve() in calibrated]:
        parser.error(f"{both[0]} is among both the clips to calibrate on and those to judge with")
    args.work.mkdir(parents=True, exist_ok=True)
    source = pull(MODEL)
    results: list[dict[str, Any]] = []
    for name, options in cases(args).items():
        options = {"samples": args.samples, "heal_tokens": args.heal_tokens, **options}
        print(name, options, flush=True)
        slim = args.work / name.replace(" ", "-")
        report = made(source, slim, {"calibration": args.calibration, **options})
        print(f"    {sum(report['seconds'].values()):.0f} s: {report['seconds']}", flush=True)
        calibration = {key: value for key, value in report["calibration"].items() if key != "files"}
        results.append(
            {
                "case": name, "options": options, "calibration": calibration, "judged": judge(slim, sets, source),
                "keep_parameters": report["keep"]["parameters"], "keep_bytes": report["keep"]["bytes"],
                "bytes": report["total_bytes"], "of_bf16": report["total_bytes"] / report["total_dense_bytes"],
                "seconds": report["seconds"], "healing": report["healing"][:: max(len(report["healing"]) // 16, 1)],
            }
        )  # fmt: skip
        document = {
            "benchmark": "compress speech", "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(), "versions": versions(), "model": MODEL, "results": results,
        }  # fmt: skip
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
