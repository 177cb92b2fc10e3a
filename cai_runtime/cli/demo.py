"""Fetch a small model, compress it, open the slim checkpoint, answer a question, and show what that saved.

The cache keeps the slim checkpoint and its perplexity, so a second run opens it at once. `cai chat` without a model then
talks to it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from cai_runtime.client import Client

HELP = "fetch a small model, compress it, chat with it and show what that saved"
MODEL = "smollm2-135m-instruct"
QUESTION = "Explain what a tensor is in two sentences."
# The smallest round keep at which SmolLM2-135M's answers make sense without healing.
KEEP, STORE = 0.9, "int8"
KIND: Literal["interpolative"] = "interpolative"
ALLOCATION: Literal["pooled"] = "pooled"
SAMPLES = 16  # calibration sequences of 512 tokens
EVALUATED_TOKENS = 4096
MAX_TOKENS = 128
RESULT_FILE = "demo.json"
DEMO_VERSION = 3  # part of the cache entry's identity: raise it when the entry's contents change


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cai_runtime.slim.spec import STORES

    parser.add_argument(
        "--model",
        default=MODEL,
        metavar="SOURCE",
        help=f"as for `cai pull`, such as qwen2.5-coder-0.5b-instruct (a quarter of an hour); default: {MODEL}",
    )
    parser.add_argument(
        "--keep", type=float, default=KEEP, help=f"parameters kept of the linear layers' count; default: {KEEP}"
    )
    parser.add_argument("--store", default=STORE, choices=sorted(STORES), help=f"of the weights; default: {STORE}")
    parser.add_argument("--question", default=QUESTION, help=f"default: {QUESTION}")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help=f"default: {MAX_TOKENS}")
    parser.add_argument("--force", action="store_true", help="compress and evaluate again")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    from cai_runtime.bench.machine import usable_threads
    from cai_runtime.convert.sources import pull

    def say(text: str = "", end: str = "\n") -> None:
        if not args.json:
            print(text, end=end, flush=True)

    start = time.perf_counter()
    say(f"{args.model}: {KIND} cores at keep {args.keep:g}, ranks {ALLOCATION}, stored as {args.store}")
    original = pull(args.model)
    made = slim_checkpoint(original, keep=args.keep, store=args.store, force=args.force, say=say)
    say(f"original: {original}\nslim:     {made.path}")
    if made.new:
        compressed, evaluated = made.seconds["compress"], made.seconds["evaluate"]
        say(f"compressed in {compressed:.0f} s, evaluated in {evaluated:.0f} s; the next run opens it at once")
    from cai_runtime.client import Client

    imported = import_libraries()
    with Client(made.path) as client:
        say(f"\n> {args.question}")
        answer = ask(client, args.question, args.max_tokens, say)
    say("\n")
    result = {
        "model": args.model,
        "kind": KIND,
        "allocation": ALLOCATION,
        "keep": args.keep,
        "store": args.store,
        "original": sizes(original) | {"path": str(original), "perplexity": made.perplexity_original},
        "slim": sizes(made.path) | {"path": str(made.path), "perplexity": made.perplexity_slim},
        "evaluated_tokens": made.evaluated_tokens,
        "compressed_now": made.new,
        "making_s": made.seconds,
        "import_s": imported,
        "threads": usable_threads(),
        **asdict(answer),
        "total_s": time.perf_counter() - start,
    }
    print(json.dumps(result, indent=2) if args.json else format_result(result))
    return 0


@dataclass(frozen=True)
class Made:
    """A slim checkpoint in the cache.

    new: whether this run made it. seconds: of "compress" and "evaluate", and of each stage of the compression.
    """

    path: Path
    new: bool
    seconds: dict[str, float]
    perplexity_original: float
    perplexity_slim: float
    evaluated_tokens: int


@dataclass(frozen=True)
class Answer:
    """The model's answer and its speed.

    load_s: seconds to open the checkpoint and accept the request. first_token_s: seconds from there to the first text.
    tokens_per_s: of the tokens after the first; None if there is none.
    """

    answer: str
    tokens: int
    load_s: float
    first_token_s: float
    tokens_per_s: float | None


def slim_checkpoint(
    original: Path, *, keep: float, store: str, force: bool = False, say: Callable[[str], object] = lambda text: None
) -> Made:
    """The slim checkpoint of `original` with both perplexities, from the cache or made now. force: make it again."""
    from cai_runtime.bench.machine import version_of
    from cai_runtime.convert.cache import entry
    from cai_runtime.slim.config import FORMAT_VERSION

    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(original)]
    versions = f"format {FORMAT_VERSION} cai-runtime {version_of('cai-runtime')} demo {DEMO_VERSION}"
    identity = f"{original} {files} {KIND} {ALLOCATION} keep {keep} store {store} samples {SAMPLES} {versions}"
    new = False

    def build(directory: Path) -> None:
        nonlocal new
        new = True
        from cai_runtime.compressor import compress

        say("compressing and evaluating; minutes, and only this once")
        start = time.perf_counter()
        slim = directory / "model"
        report = compress(
            original,
            slim,
            keep=keep,
            store=store,
            kind=KIND,
            allocation=ALLOCATION,
            samples=SAMPLES,
            calibration="wikipedia",
            refine_epochs=0,  # keeps the demo at two minutes; healing would take ten more
            heal_tokens=0,
            evaluate=False,
        )
        compressed = time.perf_counter()
        found = perplexities(original, slim)
        evaluated = time.perf_counter()
        seconds = {**report.seconds, "compress": compressed - start, "evaluate": evaluated - compressed}
        (directory / RESULT_FILE).write_text(json.dumps({**found, "seconds": seconds}))

    name = f"{original.name.rpartition('-')[0] or original.name}-keep{keep:g}-{store}"
    directory = entry("demo", name, identity, build, force=force)
    return Made(path=directory / "model", new=new, **json.loads((directory / RESULT_FILE).read_text()))


def weight_files(directory: Path) -> list[Path]:
    return [*sorted(directory.glob("*.safetensors")), directory / "config.json"]


def perplexities(original: Path, slim: Path) -> dict[str, Any]:
    """Perplexities of both models on the first tokens of the articles that calibration and tuning do not use."""
    from cai_runtime.convert.texts import split_articles, wikipedia_articles
    from cai_runtime.engine.open import load_tokenizer
    from cai_runtime.judge.evaluate import perplexity
    from cai_runtime.stock.load import dense_reference, slim_as_transformers

    text = "\n\n".join(split_articles(wikipedia_articles()).test)
    # A token has a few characters, so a short prefix has enough of them.
    token_ids = load_tokenizer(original)(text[: 20 * EVALUATED_TOKENS], verbose=False)["input_ids"][:EVALUATED_TOKENS]
    before = perplexity(dense_reference(original), token_ids)
    after = perplexity(slim_as_transformers(slim), token_ids)
    return {"perplexity_original": before, "perplexity_slim": after, "evaluated_tokens": len(token_ids)}


def import_libraries() -> float:
    """Import torch and transformers, so that the load time is without them. Returns the seconds."""
    start = time.perf_counter()
    import torch  # noqa: F401
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    return time.perf_counter() - start


def ask(client: Client, question: str, max_tokens: int, say: Any) -> Answer:
    """Stream the greedy answer through `say`, and time it."""
    start = time.perf_counter()
    stream = client.chat.completions.create(
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    loaded = time.perf_counter()
    first = last = None
    answer, tokens = "", 0
    with stream:
        for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text:
                last = time.perf_counter()
                first = first or last
                answer += text
                say(text, end="")
    decoding = (last or loaded) - (first or loaded)
    return Answer(
        answer=answer,
        tokens=tokens,
        load_s=loaded - start,
        first_token_s=(first or time.perf_counter()) - loaded,
        tokens_per_s=(tokens - 1) / decoding if tokens > 1 and decoding > 0 else None,
    )


def sizes(directory: Path) -> dict[str, int]:
    """Parameters, bytes on disk, and bytes of the parameters in bf16."""
    from cai_runtime.slim.inspect import inspect_checkpoint

    found = inspect_checkpoint(directory)
    return {"parameters": found.parameters, "bytes": found.nbytes, "bf16_bytes": 2 * found.parameters}


def format_result(result: dict[str, Any]) -> str:
    """The final table."""
    from cai_runtime.tables import aligned, figure

    before, after = result["original"], result["slim"]

    def pair(of_original: str, of_slim: str) -> tuple[str, str]:
        return f"{before[of_original] / 1e6:,.1f} MB", f"{after[of_slim] / 1e6:,.1f} MB"

    def ratio(name: str, reference: str) -> str:
        return f"{after[name] / before[reference]:.2f} x"

    comparison = [
        ("", "original", "slim", ""),
        ("parameters", f"{before['parameters']:,}", f"{after['parameters']:,}", ratio("parameters", "parameters")),
        ("bytes (original as bf16)", *pair("bf16_bytes", "bytes"), ratio("bytes", "bf16_bytes")),
        ("bytes (files as they are)", *pair("bytes", "bytes"), ratio("bytes", "bytes")),
        (
            f"perplexity ({result['evaluated_tokens']:,} tokens of Wikipedia)",
            figure(before["perplexity"], 2),
            figure(after["perplexity"], 2),
            ratio("perplexity", "perplexity"),
        ),
    ]
    speed = [
        ("import of torch and transformers", f"{result['import_s']:.2f} s"),
        ("load of the slim checkpoint", f"{result['load_s']:.2f} s"),
        ("time to first token", f"{result['first_token_s'] * 1e3:.0f} ms"),
        ("decode", f"{figure(result['tokens_per_s'])} tokens/s on {result['threads']} CPU threads"),
        ("everything", f"{result['total_s']:.1f} s"),
    ]
    # Both tables have a first column of one width, so that they look like one table.
    width = max(len(row[0]) for row in (*comparison, *speed))
    lines = aligned([(row[0].ljust(width), *row[1:]) for row in comparison], right=(1, 2, 3))
    return "\n".join([*lines, *aligned([(row[0].ljust(width), row[1]) for row in speed])])
