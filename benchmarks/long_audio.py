"""Hours of audio: memory over time, lost and invented words, and the order of times, beside faster-whisper.

    pip install whisper-normalizer jiwer
    python benchmarks/long_audio.py --hours 2 --peer-python PROGRAM --peer-models DIR
    python benchmarks/long_audio.py --hours 10 --models tiny.en --beams 1 ...

The file is made of the English half of speech_corpus.py's corpus in drawn orders, with 4 to 60 s of digital silence,
swelling noise, music or a quiet room before each part; it is kept in the corpus's folder. The contenders hear it one after
another, each in a process of its own, and the process's memory is read every second. The words of segments more than a
second away from speech are invented; a passage is lost where five words in a row are not heard. --stop-after ends at a
minute of the audio, and judges up to there: enough to see the memory of reading ten hours.

Writes benchmarks/results/long_audio.json after each contender.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from speech_scene import build, judge
from speech_work import (
    CORPUS,
    MemoryWatch,
    add_arguments,
    cells,
    contenders,
    corpus,
    open_worker,
    today,
    write_results,
)

KEY = ("file_hours", "model", "weights", "mode", "beam", "vad", "who")
BATCH = 8


def measure(
    who: str, cell: dict[str, Any], args: argparse.Namespace, file: Path, scene: dict[str, Any]
) -> dict[str, Any]:
    options = {("vad_filter" if who == "peer" else "vad"): cell["vad"]}
    settings = {"weights": cell["weights"], "beam": cell["beam"], "batched": BATCH if cell["mode"] == "batched" else 0}
    until = 60 * args.stop_after if args.stop_after else float("inf")
    with open_worker(who, cell["model"], args, options=options, **settings) as worker:
        loaded = worker.memory()[0]
        with MemoryWatch(worker) as watch:
            answer = worker.hear(file, "en", **({"stop_after": until} if args.stop_after else {}))
        peak = worker.memory()[1]
        versions = worker.versions
    judged = judge(scene, answer["segments"], until)
    return {
        **cell, "who": who, "date": today(), "versions": versions, **judged,
        "seconds": round(answer["seconds"], 1), "speed": round(judged["hours"] * 3600 / answer["seconds"], 2),
        "loaded_mb": round(loaded / 1e6), "peak_mb": round(peak / 1e6), "memory": watch.summary(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--models", nargs="+", default=["tiny.en"], metavar="NAME")
    parser.add_argument("--weights", nargs="+", choices=("fp32", "int8"), default=["int8"])
    parser.add_argument("--modes", nargs="+", choices=("sequential", "batched"), default=["sequential"])
    parser.add_argument("--beams", nargs="+", type=int, default=[5], metavar="N")
    parser.add_argument("--vad", nargs="+", choices=("off", "on"), default=["off"])
    parser.add_argument("--stop-after", type=float, metavar="MINUTES")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results/long_audio.json")
    args = parser.parse_args()
    lines = [line for line in corpus() if line["language"] == "en"]
    file = CORPUS / f"long-{args.hours:g}h.flac"
    scene = build(file, args.hours, lines)
    for cell, vad in itertools.product(cells(args), args.vad):
        for who in contenders(args, cell["weights"]):
            row = measure(who, {"file_hours": args.hours, **cell, "vad": vad == "on"}, args, file, scene)
            write_results(args.json, "long audio", [row], KEY)
            print({name: row[name] for name in row if name not in ("invented_words", "versions")}, flush=True)


if __name__ == "__main__":
    main()
