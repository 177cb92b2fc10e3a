"""Heals SmolLM2-135M-Instruct at keep 0.5 and 0.8 on a GPU, with more tokens than a CPU has time for.

    python benchmarks/gpu_heal.py [--minutes 7] [--keep 0.5 0.8] [--out FOLDER] [--device cuda] [--model DIR]

The original writes the text, as in `cai compress`, but the engine runs many sequences at once. Three quarters are documents,
one quarter is conversations. `compress` then compresses at each keep. Healing takes as many tokens as the time allows, and
its learning rate follows the clock. FOLDER/gpu_heal_<date>.json gets the perplexity at 65,536 tokens, at every doubling and
at the end; after an interruption it has all points so far.

.gpu/model-0 and model-1 (gpu_prepare.py) hold the model's 4-bit GGUF file, which is joined and converted here, and token ids
of the Wikipedia sample's last quarter, for the perplexity."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu import environment
from gpu.report import write_json

INDEX, TEXT = "model.json", "test_text.json"  # files that gpu_prepare.py writes
FIRST_CHECKPOINT = 65_536  # tokens after which the perplexity is first measured
CHAT_SHARE = 0.25  # of the sequences
TEXT_SHARE = 0.2  # of the time, for writing the text
RESERVE = 25.0  # seconds per keep for everything but healing: calibration, decomposition, the checkpoint


def assemble(prepared: Path, into: Path) -> Path:
    """Join the model's file from its parts. Raises SystemExit, with a message, for a missing or damaged part."""
    index = prepared / "model-0" / INDEX
    if not index.exists():
        raise SystemExit(f"{index} is missing: bring .gpu/model-0 and .gpu/model-1, which gpu_prepare.py makes")
    known = json.loads(index.read_text())
    path, digest = into / known["name"], hashlib.sha256()
    with path.open("wb") as file:
        for name in known["parts"]:
            if not (prepared / name).exists():
                raise SystemExit(f"{prepared / name} is missing: bring both parts, in two calls of one machine")
            piece = (prepared / name).read_bytes()
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != known["sha256"]:
        raise SystemExit(f"{path.name}: the parts are not those of the file that was split")
    return path


def test_windows(prepared: Path) -> list[list[int]]:
    """Token ids of the windows on which perplexity is measured."""
    return json.loads((prepared / "model-0" / TEXT).read_text())["windows"]


# ------------------------------------------------------------------------------------------------------------- text


@dataclass
class TextWriter:
    """Writes the model's own text with the engine, in sequences of `length` tokens.

    Documents begin with their start token and are concatenated. A conversation fills a sequence with turns. Control tokens
    that text must not contain are banned, as in `compressor.data.self_text`."""

    path: Path
    device: str
    lanes: int
    length: int = 512  # tokens of a sequence

    def write(self, count: int, until: float) -> Any:
        """Up to `count` sequences, int64 [sequences, length]; fewer if time.monotonic() reaches `until`."""
        import torch

        from cai_runtime.compressor.data.conversation import chat_frame
        from cai_runtime.compressor.data.self_text import document_marks
        from cai_runtime.engine.open import open_engine
        from cai_runtime.engine.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.path)
        with open_engine(
            self.path, device=self.device, max_batch=self.lanes, max_context=self.length, progress=False
        ) as engine:
            self._engine = engine
            self._frame = chat_frame(tokenizer)
            self._marks = document_marks(tokenizer, self._frame, engine.vocab_size)
            self._banned = {int(token): -math.inf for token in self._marks.banned}
            self._seed = 0
            documents: list[int] = []
            chats: list[list[int]] = []
            wanted_chats = int(count * CHAT_SHARE) if self._frame is not None else 0
            while time.monotonic() < until:
                missing = count - len(chats) - len(documents) // self.length
                if missing <= 0:
                    break
                requests = max(1, min(4 * self.lanes, missing * 2))  # more than lanes, so that no lane is idle
                chat = min(requests // 4, wanted_chats - len(chats)) if wanted_chats else 0
                chats += self._chats(chat)[: max(wanted_chats - len(chats), 0)]
                documents += self._documents(requests - chat)
        cut = range(0, len(documents) - self.length + 1, self.length)
        rows = [documents[i : i + self.length] for i in cut][: count - len(chats)] + chats
        if not rows:
            raise RuntimeError("no text was written in the time: give more --minutes")
        return torch.tensor(rows, dtype=torch.int64)

    def _continued(self, prompts: Sequence[Sequence[int]], ends: Sequence[int], most: int) -> list[list[int]]:
        """The model's continuation of each prompt, without its end token. ends: end tokens. most: tokens, at most."""
        from cai_runtime.engine.request import Request, SamplingParams

        requests = []
        for prompt in prompts:
            room = min(most, self.length - len(prompt))
            self._seed += 1
            params = SamplingParams(
                max_tokens=max(room, 1), min_tokens=min(4, max(room, 1)), temperature=1.0, seed=self._seed,
                stop_token_ids=tuple(ends), logit_bias=self._banned,
            )  # fmt: skip
            requests.append(Request(list(prompt), params))
        replies = [list(handle.result().token_ids) for handle in self._engine.submit_all(requests)]
        return [reply[:-1] if reply and reply[-1] in ends else reply for reply in replies]

    def _documents(self, count: int) -> list[int]:
        start = self._marks.start
        # Without a start token a document begins with an arbitrary one.
        begins = [
            [start if start is not None else (97 * (self._seed + i)) % self._engine.vocab_size] for i in range(count)
        ]
        tail = [] if self._marks.end is None else [self._marks.end]
        replies = self._continued(begins, sorted(self._marks.ends), self.length - 1)
        return [token for begin, reply in zip(begins, replies, strict=True) for token in [*begin, *reply, *tail]]

    def _chats(self, count: int) -> list[list[int]]:
        """Conversations of exactly `length` tokens, with as many turns as that takes."""
        if not count or self._frame is None:
            return []
        frame, ends = self._frame, sorted(self._marks.ends)
        texts = [list(frame.opening) for _ in range(count)]
        asking = True
        for _ in range(2 * self.length):
            open_ones = [text for text in texts if len(text) < self.length]
            if not open_ones:
                break
            most = self.length // 4 if asking else self.length
            for text, reply in zip(open_ones, self._continued(open_ones, ends, most), strict=True):
                text += [*reply, *(frame.answer if asking else frame.next)]
            asking = not asking
        return [text[: self.length] for text in texts]


# ---------------------------------------------------------------------------------------------------------- healing


@dataclass
class Progress:
    """The results of healing at one keep.

    entry: the keep's object in the results. windows: see `test_windows`. write: writes the results to their file."""

    entry: dict[str, Any]
    windows: list[list[int]]
    seconds: float  # limit of the healing
    write: Callable[[], None]
    points: list[dict[str, Any]] = field(default_factory=list)

    def perplexity(self, model: Any) -> float:
        from cai_runtime.judge.evaluate import perplexity

        length = min(len(w) for w in self.windows)
        ids = [token for window in self.windows for token in window[:length]]
        return perplexity(model, ids, window=length, batch_size=16, progress=False)

    def note(self, model: Any, tokens: int, began: float, losses: Sequence[float]) -> None:
        recent = losses[-8:]
        point = {
            "tokens": tokens, "seconds": round(time.monotonic() - began, 1), "perplexity": self.perplexity(model),
            "divergence": sum(recent) / len(recent) if recent else None,
        }  # fmt: skip
        self.points.append(point)
        self.entry["points"] = self.points
        print(f"keep {self.entry['keep']}: {point}", flush=True)
        self.write()


def timed_healer(progress: Progress, per_step: int) -> type:
    """A `Healer` class with a time limit and `per_step` sequences a step, which records perplexities on the way."""
    import torch

    from cai_runtime.compressor.train import heal

    class TimedHealer(heal.Healer):
        def __init__(
            self, student: Any, teacher: Any, batches: Any, work: Any, settings: Any, *, tick: Callable[[], object]
        ):
            rows = torch.cat([batch["input_ids"] for batch in batches])
            joined = [{"input_ids": ids} for ids in rows.split(per_step) if len(ids) == per_step]
            # No states on disk: they serve killed runs, and writing one takes longer than the steps between two.
            settings = replace(settings, steps=1 << 30, seconds=progress.seconds, keep_every=1 << 30)
            super().__init__(student, teacher, joined, work, settings, tick=self._after_step)
            self._began, self._next = time.monotonic(), FIRST_CHECKPOINT
            self._tokens = per_step * rows.shape[1]  # of a step
            progress.entry |= {"sequences_per_step": per_step, "sequences": len(rows)}
            self._note()

        def run(self) -> None:
            super().run()
            self._note()

        def _after_step(self) -> None:  # of training
            if len(self.losses) * self._tokens >= self._next:
                self._next *= 2
                self._note()

        def _note(self) -> None:
            tokens = len(self.losses) * self._tokens
            if not progress.points or progress.points[-1]["tokens"] != tokens:
                with self._precision():
                    progress.note(self._student, tokens, self._began, self.losses)

    return TimedHealer


def heal(path: Path, keep: float, sequences: Any, folder: Path, progress: Progress, args: argparse.Namespace) -> None:
    """Compress with this text, healing for as long as `progress` allows."""
    from cai_runtime.compressor import compress, run
    from cai_runtime.compressor.data.calibration import Calibration

    text = Calibration(sequences, "the model's own text, by gpu_heal.py")
    began = time.monotonic()
    with (
        patch.object(run, "calibration_sequences", lambda *_, **__: text),
        patch.object(run, "Healer", timed_healer(progress, args.sequences_per_step)),
    ):
        report = compress(
            path, folder / f"keep-{keep}", keep=keep, store=args.store, samples=min(args.samples, len(sequences)),
            sequence_length=sequences.shape[1], heal_tokens=sequences.numel(), device=args.device, evaluate=False,
            progress=False,
        )  # fmt: skip
    progress.entry |= {"seconds": round(time.monotonic() - began, 1), "stages": report.seconds}
    progress.write()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = os.environ.get("OUT")
    default = Path(out) if out else environment.ROOT / "benchmarks/results"
    parser.add_argument("--minutes", type=float, default=7.0, help="limit of the whole run (default: 7)")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--store", default="int8", help="of the cores (default: int8)")
    parser.add_argument("--out", type=Path, default=default, help="folder for the JSON (default: $OUT)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", type=Path, default=None, help="a model directory, instead of the parts in .gpu")
    parser.add_argument("--prepared", type=Path, default=environment.PREPARED, help="where the parts lie")
    parser.add_argument("--sequences", type=int, default=4096, help="of the text, at most (default: 4096)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence (default: 512)")
    parser.add_argument("--lanes", type=int, default=256, help="sequences written at once (default: 256)")
    parser.add_argument("--samples", type=int, default=48, help="sequences to calibrate on (default: 48)")
    parser.add_argument("--sequences-per-step", type=int, default=4, help="of healing (default: 4)")
    parser.add_argument("--reserve", type=float, default=RESERVE, help="seconds per keep for everything but healing")
    args = parser.parse_args(argv)
    began = time.monotonic()
    environment.use_kit()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "links").mkdir()
        environment.make_importable(folder / "links")
        environment.name_a_cache()
        return run_all(args, folder, began)


def run_all(args: argparse.Namespace, folder: Path, began: float) -> int:
    from cai_runtime.convert.sources import pull
    from cai_runtime.stock.load import dense_reference

    path = pull(args.model or assemble(args.prepared, folder), progress=False)
    windows = test_windows(args.prepared)
    results = args.out / f"gpu_heal_{datetime.date.today().isoformat()}.json"
    found: dict[str, Any] = {
        "environment": environment.describe(),
        "options": {k: str(v) for k, v in vars(args).items()},
    }

    def write() -> None:
        write_json(results, found)

    total = args.minutes * 60
    dense = dense_reference(path, device=args.device)
    found["dense_perplexity"] = Progress({}, windows, 0, write).perplexity(dense)
    del dense
    print(f"dense: {found['dense_perplexity']:.3f}", flush=True)
    write()
    text_began = time.monotonic()
    writer = TextWriter(path, args.device, args.lanes, args.length)
    sequences = writer.write(args.sequences, text_began + TEXT_SHARE * total)
    took = time.monotonic() - text_began
    found["text"] = {"sequences": len(sequences), "tokens": sequences.numel(), "seconds": round(took, 1)}
    print(found["text"], flush=True)
    found["keeps"] = []
    write()
    for k, keep in enumerate(args.keep):
        left = (began + total - time.monotonic()) / (len(args.keep) - k)
        entry = {"keep": keep}
        found["keeps"].append(entry)
        heal(path, keep, sequences, folder, Progress(entry, windows, max(left - args.reserve, 1.0), write), args)
    print(f"written to {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
