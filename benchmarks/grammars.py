"""Measures what masks cost: `python benchmarks/grammars.py [CHECKPOINT] [--only fill,speed] [--tokens N] [--out FILE]`.

    fill    microseconds per token of a JSON schema's mask on texts that the checkpoint's model wrote under it: compiling
            the grammar, starting a sequence, filling the masks of 1 and 16 sequences in one call, accepting a token.
    speed   tokens/s of the checkpoint at batch 1 and 16 with and without a JSON schema, in turns, all texts of N tokens; the
            milliseconds of a step that filling takes, and how much of that the forward pass hides.

CHECKPOINT: a directory, by default the oldest of `cai demo`. Writes benchmarks/results/grammars.json with machine and date.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.cli.options import checkpoint_name, demo_checkpoints
from cai_runtime.engine import loop
from cai_runtime.engine.masks import MaskedRow, fill_masks
from cai_runtime.engine.open import open_engine
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.grammars import Grammars, expressions

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 16)
# Long enough that no text ends before its last token.
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "born": {"type": "string", "format": "date"},
        "role": {"enum": ["admin", "user", "guest"]},
        "scores": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 100}, "minItems": 2, "maxItems": 4},
        "address": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 30}}, "required": ["city"],
                    "additionalProperties": False},
    },
    "required": ["name", "born", "role", "scores", "address"],
    "additionalProperties": False,
}  # fmt: skip
SCHEMA = {"type": "array", "items": PERSON, "minItems": 1000}


def requests_of(engine: Any, count: int, tokens: int, mask: Any) -> list[Request]:
    prompt = engine.tokenizer.encode("A list of people in JSON:\n")
    return [
        Request(
            prompt,
            SamplingParams(max_tokens=tokens, temperature=0.8, top_p=0.95, seed=i, ignore_eos=mask is None),
            mask=mask,
        )
        for i in range(count)
    ]


def run(engine: Any, requests: list[Request]) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds, and the texts' tokens."""
    begin = time.perf_counter()
    done = [handle.result() for handle in engine.submit_all(requests)]
    seconds = time.perf_counter() - begin
    assert all(len(finished.token_ids) == requests[0].sampling.max_tokens for finished in done), "a text ended early"
    return seconds, [finished.token_ids for finished in done]


def measure_fill(engine: Any, tokens: int) -> dict[str, Any]:
    grammars = Grammars(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
    begin = time.perf_counter()
    assert grammars.vocabulary
    vocabulary = time.perf_counter() - begin
    begin = time.perf_counter()
    made = grammars.mask(f"start: {expressions.json_schema(SCHEMA)}")
    compiled = time.perf_counter() - begin
    _, texts = run(engine, requests_of(engine, max(BATCHES), tokens, made))
    found: dict[str, Any] = {"vocabulary_ms": 1e3 * vocabulary, "compile_ms": 1e3 * compiled}
    begin = time.perf_counter()
    for _ in range(100):
        made()
    found["start_us"] = 1e4 * (time.perf_counter() - begin)
    for batch in BATCHES:
        masks = [made() for _ in range(batch)]
        filling, accepting = [], 0.0
        for at in range(tokens - 1):
            rows = [MaskedRow(i, mask, (), ()) for i, mask in enumerate(masks)]
            begin = time.perf_counter()
            _, errors = fill_masks(rows, batch, engine.vocab_size)
            filling.append(1e6 * (time.perf_counter() - begin))
            assert not errors
            begin = time.perf_counter()
            for mask, text in zip(masks, texts, strict=False):
                mask.accept(text[at])
            accepting += time.perf_counter() - begin
        found[f"batch_{batch}"] = {
            "fill_us_per_step": {
                "median": median(filling),
                "p99": float(np.quantile(filling, 0.99)),
                "max": max(filling),
            },
            "fill_us_per_token": float(np.mean(filling)) / batch,
            "accept_us_per_token": 1e6 * accepting / batch / (tokens - 1),
        }
    return found


@contextmanager
def timed_filling() -> Iterator[list[float]]:
    """The seconds of each step's filling, in the engine."""
    seconds: list[float] = []

    def timed(*args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return fill_masks(*args)
        finally:
            seconds.append(time.perf_counter() - begin)

    loop.fill_masks = timed  # type: ignore[assignment]
    try:
        yield seconds
    finally:
        loop.fill_masks = fill_masks


def measure_speed(engine: Any, tokens: int, rounds: int = 5) -> dict[str, Any]:
    grammars = Grammars(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
    made, found = grammars.mask(f"start: {expressions.json_schema(SCHEMA)}"), {}
    for batch in BATCHES:
        ways = {"plain": requests_of(engine, batch, tokens, None), "schema": requests_of(engine, batch, tokens, made)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        filling = []
        for requests in ways.values():
            run(engine, requests)  # warm
        for _ in range(rounds):
            for name, requests in ways.items():
                with timed_filling() as seconds:
                    times[name].append(run(engine, requests)[0])
                if name == "schema":
                    filling.append(sum(seconds))
        plain, schema, fill = median(times["plain"]), median(times["schema"]), median(filling)
        found[f"batch_{batch}"] = {
            "plain_tokens_per_s": batch * tokens / plain,
            "schema_tokens_per_s": batch * tokens / schema,
            "slower_percent": 100 * (1 - plain / schema),
            "fill_ms_per_step": 1e3 * fill / tokens,
            "step_ms_more": 1e3 * (schema - plain) / tokens,
            "hidden_share": min(1.0, max(0.0, 1 - (schema - plain) / fill)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--only", default="fill,speed")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--out", type=Path, default=RESULTS / "grammars.json")
    args = parser.parse_args()
    checkpoint = args.checkpoint or demo_checkpoints()[0]
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine(), "versions": versions(),
        "checkpoint": checkpoint_name(checkpoint), "tokens": args.tokens,
    }  # fmt: skip
    with open_engine(checkpoint, max_batch=max(BATCHES)) as engine:
        for name in args.only.split(","):
            found[name] = {"fill": measure_fill, "speed": measure_speed}[name](engine, args.tokens)
            print(json.dumps({name: found[name]}, indent=2))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
