"""Word errors, speed and memory of transcription, beside faster-whisper with the same weights.

    pip install whisper-normalizer jiwer
    python benchmarks/speech_corpus.py --repositories DIR --debian DIR
    python benchmarks/transcription.py --peer-python PROGRAM --peer-models DIR

A cell is a model, its weights (fp32, int8), a beam, and whether a file's windows are decoded one after another or 8
together. A slim checkpoint (--slim) has cells of its own, where it stands beside the same model with every layer dense, in
int8. At fp32, "ours as stored" computes as "ours" does, with weights held in fp16 as in the file, which is our default.
Every contender of a cell is a process of its own, with the model loaded and one file heard; both live side by side and take
turns, file by file. Words come from --starts passes over the corpus (English alone for tiny.en): a file that begins a
little later is heard a little differently, and one pass may be half a point from the next. Speed is seconds of audio per
second, of decoding a file of --minutes of English speech and transcribing it, the median of --rounds. Each round's file
begins a little later, since our encoder's pages are found again by their content. Memory is the process's peak. Options are
each library's defaults, but the language is given. faster-whisper's batched mode by default finds speech first and writes
no times; ours is measured as its caller asks for it, with times.

Writes benchmarks/results/transcription.json after each cell: what is measured again replaces what is there, the rest stays.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from speech_work import (
    Errors,
    Normalizer,
    Worker,
    add_arguments,
    cells,
    contenders,
    corpus,
    errors,
    join,
    open_worker,
    today,
    write_results,
)

BATCH = 8
REST = 0.3  # seconds, until another process's threads have gone to sleep
SKIPPED = 859  # samples that each round's file begins later; no whole number of frames, so that its windows are new
KEY = ("model", "weights", "mode", "beam", "who")
SPEECH = (
    "en-ljspeech",
    "en-jf_alpha-1",
    "en-joe-1",
    "en-jf_alpha-2",
    "en-joe-2",
    "en-jf_alpha-3",
    "en-joe-3",
    "en-joe-4",
)


def speech_file(lines: list[dict[str, Any]], minutes: float, out: Path, skipped: int = 0) -> float:
    """A file of English speech, at least as long as asked for while there is any; returns its seconds. skipped: samples."""
    named = {line["audio"].stem: line for line in lines}
    chosen, seconds = [], 0.0
    for name in SPEECH:
        if name in named and seconds < minutes * 60:
            chosen.append(named[name])
            seconds += named[name]["seconds"]
    return join(chosen, out, skipped)


def measure_words(
    workers: Mapping[str, Worker], lines: list[dict[str, Any]], starts: int, scratch: Path
) -> dict[str, dict[str, Any]]:
    """For each contender: errors in all and by language and kind."""
    normal = Normalizer()
    found: dict[str, defaultdict[str, Errors]] = {who: defaultdict(Errors) for who in workers}
    by_file: dict[str, defaultdict[str, Errors]] = {who: defaultdict(Errors) for who in workers}
    for line, start in itertools.product(lines, range(starts)):
        file = line["audio"]
        if start:
            file = scratch / "shifted.flac"
            join([line], file, start * SKIPPED)
        for who, worker in workers.items():
            time.sleep(REST)
            answer = worker.hear(file, line["language"])
            heard = " ".join(text.strip() for _, _, text in answer["segments"])
            count = errors(normal(line["text"], line["language"]), normal(heard, line["language"]))
            for group in ("all", f"{line['language']} {line['kind']}"):
                found[who][group] += count
            by_file[who][line["audio"].stem] += count
    audio = sum(line["seconds"] for line in lines)
    return {
        who: {
            "minutes": round(audio / 60, 2),
            "starts": starts,
            "word_errors": {group: count.row() for group, count in found[who].items()},
            "word_error_by_file": {name: round(count.percent, 2) for name, count in by_file[who].items()},
        }
        for who in workers
    }


def measure_speed(workers: Mapping[str, Worker], speech: Sequence[tuple[Path, float]]) -> dict[str, dict[str, Any]]:
    times: dict[str, list[float]] = {who: [] for who in workers}
    for file, _ in speech:
        for who, worker in workers.items():
            time.sleep(REST)
            times[who].append(worker.hear(file, "en")["seconds"])
    speeds = {who: [seconds / t for (_, seconds), t in zip(speech, each, strict=True)] for who, each in times.items()}
    return {
        who: {"speed": round(median(speeds[who]), 2), "speed_seconds": [round(t, 3) for t in each]}
        for who, each in times.items()
    }


def measure_cell(
    cell: Mapping[str, Any],
    args: argparse.Namespace,
    lines: list[dict[str, Any]],
    speech: Sequence[tuple[Path, float]],
    scratch: Path,
) -> Any:
    """The rows of a cell, one for each contender."""
    heard = [line for line in lines if line["language"] == "en" or not cell["model"].endswith(".en")]
    settings = {"weights": cell["weights"], "beam": cell["beam"], "batched": BATCH if cell["mode"] == "batched" else 0}
    with ExitStack() as stack:
        workers, loaded = {}, {}
        for who in contenders(args, cell["weights"]):
            workers[who] = stack.enter_context(open_worker(who, cell["model"], args, **settings))
            loaded[who] = workers[who].memory()[0]
            workers[who].hear(heard[0]["audio"], heard[0]["language"])  # untimed
        rows = {who: {**cell, "who": who, "date": today(), "versions": w.versions} for who, w in workers.items()}
        if args.rounds:
            for who, found in measure_speed(workers, speech).items():
                rows[who] |= found
        if not args.no_words:
            for who, found in measure_words(workers, heard, args.starts, scratch).items():
                rows[who] |= found
        if args.rounds:
            for who, worker in workers.items():
                rows[who] |= {"loaded_mb": round(loaded[who] / 1e6), "peak_mb": round(worker.memory()[1] / 1e6)}
    if args.activations and cell["weights"] != "fp32" and "ours" in rows:
        rows["ours"]["activations"] = args.activations
    return list(rows.values())


def shown(row: Mapping[str, Any]) -> str:
    words = row.get("word_errors", {})
    parts = [f"{group} {count['percent']:.2f}" for group, count in words.items()]
    speed = f"{row['speed']:.1f} x" if "speed" in row else "-"
    return f"| {' | '.join(str(row[k]) for k in KEY)} | {speed} | {row.get('peak_mb', '-')} | {', '.join(parts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--models", nargs="+", default=["tiny.en", "base"], metavar="NAME")
    parser.add_argument("--weights", nargs="*", choices=("fp32", "int8"), default=["fp32", "int8"])
    parser.add_argument("--modes", nargs="+", choices=("sequential", "batched"), default=["sequential", "batched"])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 5], metavar="N")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the file that speed is measured on (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="of it; 0: measure words alone")
    parser.add_argument("--starts", type=int, default=1, help="passes over the corpus, each a little later (default 1)")
    parser.add_argument("--no-words", action="store_true", help="measure speed and memory alone")
    parser.add_argument("--files", default="", metavar="TEXT", help="only corpus files with this in their name")
    parser.add_argument("--corpus", type=Path, metavar="DIR")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results/transcription.json")
    args = parser.parse_args()
    lines = corpus(args.corpus)
    with tempfile.TemporaryDirectory(prefix="cai-bench-") as scratch:
        files = [Path(scratch) / f"speech-{k}.flac" for k in range(args.rounds)]
        speech = [(file, speech_file(lines, args.minutes, file, k * SKIPPED)) for k, file in enumerate(files)]
        lines = [line for line in lines if args.files in line["audio"].stem]
        print(f"| {' | '.join(KEY)} | speed | peak MB | word error % |\n|{'---|' * 8}", flush=True)
        for cell in cells(args):
            rows = measure_cell(cell, args, lines, speech, Path(scratch))
            write_results(args.json, "transcription", rows, KEY)
            print("\n".join(map(shown, rows)), flush=True)


if __name__ == "__main__":
    main()
