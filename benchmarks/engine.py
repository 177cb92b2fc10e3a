"""Measures the engine's overhead over the model: `python benchmarks/engine.py [CHECKPOINT] [--only steps,...] [--out FILE]`.

    steps     microseconds of a step with given logits and a real tokenizer: sampling, and the rest. Vocabularies of 49,152
              and 128,256; batches of 1, 32, 64 and 256; greedy, and temperature 0.8 with top_p 0.95.
    callers   CPU milliseconds per step from the engine to its callers, at batch 64 and a model that sleeps 5 ms: one call
              with n=64, 64 threads with whole replies, 64 threads with streams.
    sampled   tokens/s of the checkpoint at batch 1, 8 and 32: greedy, and temperature 0.8 with top_p 0.95, in turns.
    gap       a stream beside a 2,000-token prompt: the worst token gap, and the prompt's time beside the stream and alone.

CHECKPOINT: a directory, by default the oldest of `cai demo`. Writes benchmarks/results/engine.json with machine and date.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cai_runtime import Client
from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.cli.options import checkpoint_name, demo_checkpoints
from cai_runtime.engine.engine import Engine
from cai_runtime.engine.open import open_engine
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.engine.runner import sampler_of
from cai_runtime.engine.tokenizer import load_tokenizer

RESULTS = Path(__file__).parent / "results"
GREEDY = {"temperature": 0.0}
TOP_P = {"temperature": 0.8, "top_p": 0.95}
WAYS = {"greedy": GREEDY, "top_p": TOP_P}
SECTIONS = ("steps", "callers", "sampled", "gap")


class GivenLogits:
    """A runner with given logits instead of a model. seconds: length of a step, spent without the GIL.

    Attribute `sampling`: seconds spent in `sample`.
    """

    page_size, num_pages, max_context = 16, 200_000, 4096

    def __init__(self, vocabulary: int, batch: int, seconds: float = 0.0):
        self.vocab_size, self.seconds, self.sampling = vocabulary, seconds, 0.0
        self._rows = (np.random.default_rng(0).normal(size=(batch, vocabulary)) * 4).astype(np.float32)
        self._rows[:, 49_000:] = -50  # the tokenizer has no tokens beyond these
        self._given = self._rows.copy()  # a sampler may overwrite its logits
        self._sample = sampler_of(object())

    def run(self, step: list[Any]) -> np.ndarray:
        if self.seconds:
            time.sleep(self.seconds)
        count = sum(feed.wanted for feed in step)
        return self._given[:count]

    def sample(self, logits: np.ndarray, batch: Any) -> Any:
        began = time.perf_counter()
        sampled = self._sample(logits, batch).wait()
        self.sampling += time.perf_counter() - began
        return _Done(sampled)

    def close(self) -> None: ...


class _Done:
    def __init__(self, sampled: Any):
        self._sampled = sampled

    def wait(self) -> Any:
        return self._sampled


def steps(checkpoint: Path) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(checkpoint)
    found = []
    for vocabulary in (49_152, 128_256):
        for batch in (1, 32, 64, 256):
            for way, sampling in WAYS.items():
                runs = [_step_seconds(tokenizer, vocabulary, batch, sampling) for _ in range(5)]
                whole, sampled = min(runs)
                entry = {"vocabulary": vocabulary, "batch": batch, "sampling": way, "sample_us": sampled * 1e6,
                         "rest_us": (whole - sampled) * 1e6}  # fmt: skip
                print(
                    f"{vocabulary:7d} x {batch:3d} {way:7s} sample {sampled * 1e6:8.0f} us, rest {entry['rest_us']:7.0f} us"
                )
                found.append(entry)
    return found


def _step_seconds(tokenizer: Any, vocabulary: int, batch: int, sampling: dict[str, Any]) -> tuple[float, float]:
    """(seconds of a step, seconds of its sampling)."""
    count = 120 if batch < 256 else 40
    runner = GivenLogits(vocabulary, batch)
    with Engine(runner, tokenizer, eos_token_ids=[], max_batch=batch, prefill_chunk=10**6) as engine:
        requests = [
            Request([1, 2, 3, 4, 5, i % 1000], SamplingParams(max_tokens=count, ignore_eos=True, seed=i, **sampling))
            for i in range(batch)
        ]
        engine.submit(requests[0]).result()  # loads what is loaded at first use
        begin = threading.Event()
        # Until all are there: to submit them is no part of a step.
        engine._loop.inbox.send(lambda: begin.wait() and None)
        handles = [engine.submit(request) for request in requests]
        runner.sampling, before = 0.0, engine.stats().steps
        began = time.perf_counter()
        begin.set()
        for handle in reversed(handles):  # so that this thread sleeps until the end
            handle.result()
        seconds = time.perf_counter() - began
        number = engine.stats().steps - before
    return seconds / number, runner.sampling / number


def callers(checkpoint: Path) -> list[dict[str, Any]]:
    tokenizer, batch, tokens = load_tokenizer(checkpoint), 64, 100
    question: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Say hi"}], "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip

    def open_given(path: Any, **options: Any) -> Engine:
        runner = GivenLogits(49_152, batch, seconds=0.005)
        return Engine(runner, tokenizer, eos_token_ids=[], max_batch=batch, prefill_chunk=10**6)

    def together(ask: Any) -> None:
        threads = [threading.Thread(target=ask) for _ in range(batch)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    ways: dict[str, Any] = {
        "one call, n=64": lambda c: c.chat.completions.create(**question, n=batch),
        "64 threads, whole replies": lambda c: together(lambda: c.chat.completions.create(**question)),
        "64 threads, streams": lambda c: together(lambda: list(c.chat.completions.create(**question, stream=True))),
    }
    found = []
    for name, ask in ways.items():
        runs = []
        for _ in range(3):
            with Client(checkpoint, _engine_factory=open_given) as client:
                client.engine()
                began, cpu = time.perf_counter(), time.process_time()
                ask(client)
                wall, cpu = time.perf_counter() - began, time.process_time() - cpu
                number = client.engine().stats().steps
            runs.append((cpu / number * 1e3, wall / number * 1e3))
        cpu_ms, wall_ms = min(runs)
        print(f"{name:28s} {cpu_ms:6.2f} ms of CPU a step, {wall_ms:6.2f} ms of time")
        found.append({"callers": name, "cpu_ms": cpu_ms, "wall_ms": wall_ms})
    return found


def sampled(checkpoint: Path) -> list[dict[str, Any]]:
    found = []
    with open_engine(checkpoint, kv_cache="512MiB", progress=False) as engine:
        random = np.random.default_rng(0)

        def seconds(batch: int, tokens: int, sampling: dict[str, Any]) -> float:
            params = SamplingParams(max_tokens=tokens, ignore_eos=True, **sampling)
            prompts = random.integers(20, 40_000, (batch, 16)).tolist()
            began = time.perf_counter()
            for handle in [engine.submit(Request(prompt, params)) for prompt in prompts]:
                handle.result()
            return time.perf_counter() - began

        seconds(8, 4, TOP_P)
        for batch, tokens in ((1, 96), (8, 64), (32, 48)):
            runs: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(5):  # in turns, so that a change of the machine's speed affects both
                for way, sampling in WAYS.items():
                    runs[way].append((seconds(batch, tokens + 4, sampling) - seconds(batch, 4, sampling)) / tokens)
            rates = {way: batch / median(times) for way, times in runs.items()}
            entry = {"batch": batch, "tokens_per_s": rates, "sampled_over_greedy": rates["top_p"] / rates["greedy"]}
            print(f"batch {batch:2d}: greedy {rates['greedy']:.0f} tokens/s, sampled {rates['top_p']:.0f}, "
                  f"{entry['sampled_over_greedy']:.3f} of it")  # fmt: skip
            found.append(entry)
    return found


def gap(checkpoint: Path) -> dict[str, Any]:
    random = np.random.default_rng(1)
    runs = []
    with Client(checkpoint, kv_cache="512MiB", progress=False) as client:

        def long_prompt() -> float:
            prompt = random.integers(20, 40_000, 2000).tolist()
            began = time.perf_counter()
            client.completions.create(prompt=prompt, max_tokens=1)
            return time.perf_counter() - began

        long_prompt()
        for _ in range(5):
            alone = long_prompt()
            worst, beside = _beside_a_stream(client, long_prompt)
            runs.append({"worst_gap_ms": worst * 1e3, "prompt_s": beside, "prompt_alone_s": alone})
            print(f"worst gap {worst * 1e3:.0f} ms; the prompt takes {beside:.2f} s, alone {alone:.2f} s")
    return {
        "runs": runs,
        "worst_gap_ms": median(run["worst_gap_ms"] for run in runs),
        "prompt_slowdown": median(run["prompt_s"] / run["prompt_alone_s"] for run in runs),
    }


def _beside_a_stream(client: Client, disturb: Any) -> tuple[float, float]:
    """(longest token gap of a stream while `disturb` runs, in seconds; what `disturb` returns)."""
    took: list[float] = []
    thread = threading.Thread(target=lambda: took.append(disturb()))
    gaps: list[float] = []
    stream = client.completions.create(
        prompt="Once upon a time", max_tokens=5000, ignore_eos=True, temperature=0, stream=True
    )
    last = time.perf_counter()
    for number, _ in enumerate(stream):
        now = time.perf_counter()
        if number == 40:
            thread.start()
        if number > 40:
            gaps.append(now - last)
            if not thread.is_alive():
                break
        last = now
    stream.close()
    return max(gaps), took[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--out", type=Path, default=RESULTS / "engine.json")
    args = parser.parse_args()
    checkpoint = args.checkpoint or demo_checkpoints()[0]
    found: dict[str, Any] = {
        "benchmark": "engine",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": checkpoint_name(checkpoint),
        "machine": describe_machine(),
        "versions": versions(),
    }
    for name in args.only.split(","):
        found[name] = {"steps": steps, "callers": callers, "sampled": sampled, "gap": gap}[name](checkpoint)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
