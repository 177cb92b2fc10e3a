"""Compares word times with a reference, ours beside faster-whisper's, on LibriVox sentences with silence around them.

    python benchmarks/word_times.py CLIPS --peer-python PYTHON --peer-models DIR [--models tiny.en base] [--json FILE]

CLIPS: the folder test/data/librivox of https://github.com/cmusphinx/pocketsphinx: five sentences, and JSON files with the
times of their words, which a forced alignment found to 0.01 s. Each is heard alone, behind 5 s of silence and before 8 s of
it; besides, sentences that follow each other without a pause, and with pauses of 3 to 6 s. Silence is noise at -80 dB.
--peer-python: a Python with faster-whisper. --peer-models: CTranslate2 models by name, as for transcription.py. Both sides
use fp32 weights and greedy search, one window after the other.

A table of absolute errors in seconds of starts and ends: median, 95th percentile, largest, and the median with its sign; and
how many words end before they start, start before the one before, last more than 2 s, or reach more than 0.3 s into silence.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000
NAMES = ("0870", "0880", "0890", "0920", "0930")
LONGEST, REACH = 2.0, 0.3  # seconds
SPELT = {"mr": "mister"}
PEER = Path(__file__).with_name("word_times_peer.py")


@dataclass(frozen=True)
class Word:
    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Case:
    """Audio with the times of its words. group: what lies around the sentences."""

    group: str
    samples: np.ndarray
    words: list[Word]


@dataclass
class Errors:
    """Seconds that times are too late, of a group of cases."""

    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    wrong: int = 0
    said: int = 0

    def summary(self) -> dict[str, Any]:
        return {
            "words": self.said,
            "matched": round(len(self.starts) / max(self.said, 1), 3),
            "starts": _spread(self.starts),
            "ends": _spread(self.ends),
            "wrong": self.wrong,
        }


def _spread(errors: Sequence[float]) -> dict[str, float]:
    sizes = np.abs(errors) if len(errors) else np.array([np.nan])
    figures = {"median": np.median(sizes), "p95": np.percentile(sizes, 95), "largest": sizes.max()}
    figures["bias"] = np.median(errors) if len(errors) else np.nan
    return {name: round(float(value), 3) for name, value in figures.items()}


def read_clip(folder: Path, name: str) -> tuple[np.ndarray, list[Word]]:
    import soundfile

    stem = folder / f"sense_and_sensibility_01_austen_64kb-{name}"
    samples, rate = soundfile.read(stem.with_suffix(".wav"), dtype="float32")
    if rate != RATE:
        raise SystemExit(f"{stem}.wav has {rate} samples a second, not {RATE}")
    found = json.loads(Path(f"{stem}.json").read_text())["w"]
    spoken = [word for word in found if not word["t"].startswith("<")]
    return samples, [Word(re.sub(r"\(\d+\)$", "", w["t"]), w["b"], w["b"] + w["d"]) for w in spoken]


def join(group: str, parts: Sequence[float | tuple[np.ndarray, list[Word]]]) -> Case:
    """Clips and seconds of silence, one after another."""
    random = np.random.default_rng(0)
    sounds: list[np.ndarray] = []
    words: list[Word] = []
    at = 0.0
    for part in parts:
        if isinstance(part, tuple):
            sounds.append(part[0])
            words += [Word(word.text, word.start + at, word.end + at) for word in part[1]]
        else:
            sounds.append(random.normal(0, 1e-4, round(part * RATE)).astype(np.float32))
        at += len(sounds[-1]) / RATE
    return Case(group, np.concatenate(sounds), words)


def cases(folder: Path) -> Iterator[Case]:
    clips = {name: read_clip(folder, name) for name in NAMES}
    for clip in clips.values():
        yield join("alone", [clip])
        yield join("after silence", [5.0, clip])
        yield join("before silence", [clip, 8.0])
    first, second, third, fourth, fifth = clips.values()
    yield join("pauses between", [2.0, first, 4.0, second, 3.0, third])
    yield join("pauses between", [fourth, 6.0, fifth])
    yield join("without pause", [first, second, third, fourth])
    yield join("without pause", [fifth, fourth, third])


def letters(words: Sequence[Word]) -> tuple[str, list[tuple[int, bool, bool]]]:
    """The words' letters in a row; of each its word, and whether it is the word's first and last."""
    text, places = "", list[tuple[int, bool, bool]]()
    for at, word in enumerate(words):
        bare = "".join(char for char in word.text.lower() if char.isalnum())
        bare = SPELT.get(bare, bare)
        text += bare
        places += [(at, k == 0, k == len(bare) - 1) for k in range(len(bare))]
    return text, places


def compare(case: Case, heard: Sequence[Word], errors: Errors) -> None:
    """Add the errors of one case. Letters are matched, so that "ill-disposed" is compared with two words."""
    (said, said_places), (found, found_places) = letters(case.words), letters(heard)
    errors.said += len(case.words)
    matcher = difflib.SequenceMatcher(None, said, found, autojunk=False)
    for i, j, length in matcher.get_matching_blocks():
        for k in range(length):
            word, begins, ends = said_places[i + k]
            other, other_begins, other_ends = found_places[j + k]
            if begins and other_begins:
                errors.starts.append(heard[other].start - case.words[word].start)
            if ends and other_ends:
                errors.ends.append(heard[other].end - case.words[word].end)
    before = 0.0
    for word in heard:
        nearest = [w for w in case.words if w.start - REACH <= word.start and word.end <= w.end + REACH]
        reaches = not nearest and _silence(case, word.start, word.end) > REACH
        errors.wrong += word.end < word.start or word.start < before or word.end - word.start > LONGEST or reaches
        before = word.start


def _silence(case: Case, start: float, end: float) -> float:
    """Seconds between two times in which no word is said."""
    covered = sum(max(0.0, min(end, word.end) - max(start, word.start)) for word in case.words)
    return end - start - covered


def ours(files: Sequence[Path], model: str) -> list[list[Word]]:
    import cai_runtime

    found = []
    with cai_runtime.Client(model=f"whisper-{model}", device="cpu") as client:
        for file in files:
            answer: Any = client.audio.transcriptions.create(
                file=str(file), language="en", beam_size=1, timestamp_granularities=["word", "segment"]
            )
            found.append([Word(word.word, word.start, word.end) for word in answer.words])
    return found


def peer(files: Sequence[Path], python: str, model: Path) -> list[list[Word]]:
    command = [python, str(PEER), str(model), *map(str, files)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [[Word(*word) for word in json.loads(line)] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, metavar="CLIPS")
    parser.add_argument("--models", nargs="+", default=["tiny.en", "base"])
    parser.add_argument("--peer-python", metavar="PYTHON")
    parser.add_argument("--peer-models", type=Path, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    import soundfile

    wanted = list(cases(args.clips))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{at}.wav" for at in range(len(wanted))]
        for file, case in zip(files, wanted, strict=True):
            soundfile.write(file, case.samples, RATE)
        for model in args.models:
            sides = {"ours": ours(files, model)}
            if args.peer_python:
                sides["faster-whisper"] = peer(files, args.peer_python, args.peer_models / model)
            for side, heard in sides.items():
                groups: dict[str, Errors] = {"all": Errors()}
                for case, words in zip(wanted, heard, strict=True):
                    for name in ("all", case.group):
                        compare(case, words, groups.setdefault(name, Errors()))
                results.setdefault(model, {})[side] = {name: errors.summary() for name, errors in groups.items()}
    heads = ["model", "", "around", "words found"]
    heads += [f"{edge}: {figure}" for edge in ("start", "end") for figure in ("median", "p95", "largest", "bias")]
    print(f"| {' | '.join([*heads, 'wrong'])} |")
    print("| --- " * (len(heads) + 1) + "|")
    for model, sides_of in results.items():
        for side, groups_of in sides_of.items():
            for name, s in groups_of.items():
                figures = [f"{v:.3f}" for at in ("starts", "ends") for v in s[at].values()]
                print(f"| {model} | {side} | {name} | {s['matched']:.1%} | {' | '.join(figures)} | {s['wrong']} |")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
