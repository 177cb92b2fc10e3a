"""What the speech benchmarks share: workers in processes of their own, the corpus, and the count of word errors."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cai_runtime.bench.machine import describe_machine
from cai_runtime.compressor import compress
from cai_runtime.convert.sources import pull
from cai_runtime.home import cai_home
from cai_runtime.options import ACTIVATIONS
from cai_runtime.slim.reader import REPORT_FILE

HERE = Path(__file__).parent
CORPUS = cai_home() / "speech-corpus"
INT8 = cai_home() / "speech-int8"  # our models with dense weights in int8
STORED = "ours as stored"  # by default we keep these models' weights in fp16, as their files do, and compute in fp32
SLIM = "slim"  # how the `weights` of a slim checkpoint's cells begin
DENSE = "ours dense"  # beside a slim checkpoint: the same model with every layer dense, in int8
SAMPLE_SECONDS = 1.0  # between two looks at a worker's memory


class Worker:
    """speech_ours.py or speech_peer.py as a child process with a model in it. A context manager.

    settings: model (directory), weights ("fp32", "int8"), beam, batched (windows together, 0: one after another), threads,
    options (of a transcription), engine (options of ours). versions: of what it runs on.
    """

    def __init__(self, python: str, script: str, settings: Mapping[str, Any]):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        threads = str(settings["threads"])
        self._child = subprocess.Popen(
            [python, str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "CAI_NUM_THREADS": threads},
        )
        self.versions = self._ask(dict(settings))["versions"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._child.kill()
        self._child.wait()
        self._errors.close()

    def hear(self, file: str | Path, language: str, **more: Any) -> dict[str, Any]:
        """Its answer: seconds, and segments of [start, end, text]. Ends the program if it failed."""
        return self._ask({"file": str(file), "language": language, **more})

    def memory(self) -> tuple[int, int]:
        """Bytes of memory that it has now, and had at most."""
        lines = Path(f"/proc/{self._child.pid}/status").read_text().splitlines()
        found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
        return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            raise SystemExit(f"the worker ended:\n{self._errors.read().decode(errors='replace')[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"the worker failed on {question.get('file')}: {answer['error']}")
        return answer


class MemoryWatch:
    """Looks at a worker's memory each second, until its block ends: `samples` of (seconds, bytes)."""

    def __init__(self, worker: Worker):
        self._worker, self._over = worker, threading.Event()
        self.samples: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            self.samples.append((len(self.samples) * SAMPLE_SECONDS, self._worker.memory()[0]))
            if self._over.wait(SAMPLE_SECONDS):
                return

    def summary(self, points: int = 20) -> dict[str, Any]:
        """Megabytes at evenly spread moments, and how much the second half's largest exceeds the second quarter's."""
        sizes = [size / 1e6 for _, size in self.samples]
        count = len(sizes)
        chosen = [sizes[k * (count - 1) // max(points - 1, 1)] for k in range(points)]
        quarter, half = sizes[count // 4 : count // 2 + 1], sizes[count // 2 :]
        return {"mb": [round(size) for size in chosen], "growth_mb": round(max(half) - max(quarter))}


def open_worker(who: str, model: str, args: Any, **settings: Any) -> Worker:
    """A worker of "ours", "ours as stored", "ours dense" or "peer" for a named model.

    args: peer_python, peer_models, threads, activations, slim."""
    given = {"threads": args.threads, "options": {}, "batched": 0, **settings}
    if who == "peer":
        return Worker(args.peer_python, "speech_peer.py", {**given, "model": str(args.peer_models / model)})
    engine: dict[str, Any] = {"activations": args.activations}
    if given["weights"] == "fp32":
        engine = {} if who == STORED else {"dtype": "fp32"}
    if who == "ours" and given["weights"].startswith(SLIM):
        path = args.slim[model][given["weights"]]
    else:
        path = pull(f"whisper-{model}")
        path = path if given["weights"] == "fp32" else int8_of(model, path)
    return Worker(sys.executable, "speech_ours.py", {**given, "model": str(path), "engine": engine})


def int8_of(model: str, path: Path) -> Path:
    """Our checkpoint of a model with every layer dense and its weights in int8; made at first."""
    into = INT8 / model
    if not (into / "config.json").is_file():
        clips = str(CORPUS / "calibration/corpus.jsonl")
        compress(path, into, keep=1.0, store="int8", refine_epochs=0, heal_tokens=0, evaluate=False, calibration=clips)
    return into


def add_arguments(parser: Any) -> None:
    """The options that `open_worker` reads."""
    parser.add_argument("--peer-python", metavar="PROGRAM", help="a Python that has faster-whisper")
    parser.add_argument("--peer-models", type=Path, metavar="DIR", help="CTranslate2's models: tiny.en and base in it")
    parser.add_argument("--only", choices=("ours", "peer"), help="measure one of the two")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--slim", action=Slim, nargs="+", default={}, metavar="MODEL=DIR", help="our slim checkpoints")
    parser.add_argument("--activations", choices=ACTIVATIONS, help="what ours rounds inputs to; theirs rounds to int8")


def cells(args: Any) -> list[dict[str, Any]]:
    """Every model, weights, mode and beam that is asked for, and the slim checkpoints in each mode and beam."""
    found = []
    for model in args.models:
        weights = [*args.weights, *args.slim.get(model, {})]
        for weight, mode, beam in itertools.product(weights, args.modes, args.beams):
            found.append({"model": model, "weights": weight, "mode": mode, "beam": beam})
    return found


class Slim(argparse.Action):
    """MODEL=DIR ... as {model: {"slim 0.8": directory}}: the share of the layers' parameters that is kept names it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        pairs = [value.split("=", 1) for value in values]
        if any(len(pair) != 2 for pair in pairs):
            parser.error(f"{option} takes MODEL=DIR, such as base=models/base-slim")
        found: dict[str, dict[str, Path]] = {}
        for model, directory in pairs:
            try:
                keep = json.loads((Path(directory) / REPORT_FILE).read_text())["keep"]["parameters"]
            except OSError as error:
                parser.error(f"{option}: {directory} is no checkpoint that cai compress made: {error}")
            name = f"{SLIM} {keep:.2g}"
            if name in found.setdefault(model, {}):
                parser.error(f"{option}: {directory} and {found[model][name]} would both be {model}, {name}")
            found[model][name] = Path(directory)
        setattr(namespace, self.dest, found)


def contenders(args: Any, weights: str = "") -> list[str]:
    """Who is measured; slim checkpoints beside the dense one."""
    if weights.startswith(SLIM):
        return ["ours", DENSE]
    found = [args.only] if args.only else ["ours", "peer"]
    if weights == "fp32" and "ours" in found:
        found.insert(1, STORED)
    if "peer" in found and not (args.peer_python and args.peer_models):
        raise SystemExit("the peer needs --peer-python and --peer-models; --only ours leaves it out")
    return found


def corpus(path: Path | None = None) -> list[dict[str, Any]]:
    """The lines of speech_corpus.py's list, "audio" as a path."""
    folder = path or CORPUS
    list_file = folder / "corpus.jsonl"
    if not list_file.is_file():
        raise SystemExit(f"{list_file} is not there: make it with benchmarks/speech_corpus.py")
    lines = [json.loads(line) for line in list_file.read_text().splitlines()]
    return [{**line, "audio": folder / line["audio"]} for line in lines]


def join(lines: Sequence[Mapping[str, Any]], out: Path, skipped: int = 0) -> float:
    """Write the sounds of these lines behind each other, without the first `skipped` samples; returns the seconds."""
    import numpy as np
    import soundfile

    from cai_runtime.audio.files import RATE, read_audio

    sound = np.concatenate([read_audio(line["audio"]) for line in lines])[skipped:]
    soundfile.write(out, sound, RATE)
    return len(sound) / RATE


@dataclass
class Errors:
    """Counts of words said, and of words that were heard wrongly, not heard, and heard without being said."""

    words: int = 0
    wrong: int = 0
    lost: int = 0
    added: int = 0

    def __iadd__(self, other: Errors) -> Errors:
        for name in ("words", "wrong", "lost", "added"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    @property
    def percent(self) -> float:
        return 100 * (self.wrong + self.lost + self.added) / max(self.words, 1)

    def row(self) -> dict[str, float]:
        return {**vars(self), "percent": round(self.percent, 3)}


@dataclass
class Normalizer:
    """Words as the field compares them: whisper-normalizer's English one, and the basic one without accents for others."""

    _made: dict[str, Any] = field(default_factory=dict)

    def __call__(self, text: str, language: str) -> str:
        if language not in self._made:
            from whisper_normalizer.basic import BasicTextNormalizer
            from whisper_normalizer.english import EnglishTextNormalizer

            english = language == "en"
            self._made[language] = EnglishTextNormalizer() if english else BasicTextNormalizer(remove_diacritics=True)
        return " ".join(self._made[language](text).split())


def errors(said: str, heard: str) -> Errors:
    """Word errors of normalized texts."""
    import jiwer

    if not said:
        return Errors(added=len(heard.split()))
    found = jiwer.process_words(said, heard)
    return Errors(len(said.split()), found.substitutions, found.deletions, found.insertions)


def write_results(path: Path, name: str, rows: Sequence[Mapping[str, Any]], key: Sequence[str]) -> None:
    """Put rows into a results file; one with the `key` of a row that is there changes what it has measured of it."""
    kept = json.loads(path.read_text())["results"] if path.exists() else []
    new: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in [*kept, *rows]:
        cell = tuple(row[k] for k in key)
        new[cell] = {**new.get(cell, {}), **row}
    document = {"benchmark": name, "machine": describe_machine(), "results": list(new.values())}
    path.write_text(json.dumps(document, indent=1) + "\n")


def today() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
