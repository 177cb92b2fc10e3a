"""Attention by itself: kernel backends over a paged cache, beside torch over contiguous keys and values, in one run.

Decode at several contexts and batch sizes, and prefill; head layouts are those of a model by name, or given by --heads.
Each line: median and best time, bytes of keys and values per second, operations per second, the fraction of the floor, on a
GPU also the kernels of a call. There FlashInfer runs beside ours where it is installed.
`cai_runtime/bench/attention.py` defines each figure.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from cai_runtime.cli.bench.options import (
    add_backend_argument,
    add_machine_arguments,
    counts,
    output_file,
    resolved_device,
    schedule,
    words,
    write_json,
)
from cai_runtime.errors import BenchmarkError

if TYPE_CHECKING:
    from cai_runtime.models.shapes import AttentionHeads

CONTEXTS, BATCHES, PROMPTS = "128,512,2048,8192", "1,8", "128,512,2048"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="heads of a model, such as llama-3.1-8b (the default)")
    parser.add_argument("--heads", metavar="QUERY/KVxDIM", help="heads by hand, such as 32/8x128")
    parser.add_argument("--window", type=int, metavar="N", help="a sliding window of N positions; default: none")
    parser.add_argument("--mode", type=words, default=("decode", "prefill"), metavar="LIST", help="default: both")
    parser.add_argument("--context", type=counts, default=counts(CONTEXTS), metavar="LIST",
                        help=f"positions at decode; default: {CONTEXTS}")  # fmt: skip
    parser.add_argument("--batch", type=counts, default=counts(BATCHES), metavar="LIST",
                        help=f"sequences at decode; default: {BATCHES}")  # fmt: skip
    parser.add_argument("--prompt", type=counts, default=counts(PROMPTS), metavar="LIST",
                        help=f"tokens at prefill; default: {PROMPTS}")  # fmt: skip
    parser.add_argument(
        "--cache", type=words, metavar="LIST", help="dtypes: fp32, bf16, fp16, int8; default: fp32,bf16 (on a GPU bf16)"
    )
    add_backend_argument(parser)
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from cai_runtime.bench.attention import AttentionSettings, bench_attention
    from cai_runtime.bench.attention_report import attention_json, format_attention

    out = output_file("--json", args.json)
    for mode in args.mode:
        if mode not in ("decode", "prefill"):
            raise BenchmarkError(f"unknown mode {mode!r}; there are: decode, prefill")
    subject, heads, notes = heads_of(args)
    settings = AttentionSettings(
        heads=heads,
        window=args.window,
        contexts=args.context if "decode" in args.mode else (),
        batches=args.batch,
        prompts=args.prompt if "prefill" in args.mode else (),
        caches=args.cache,
        backends=args.backend,
        device=resolved_device(args.device),
        threads=args.threads,
        peers=not args.no_peers,
        schedule=schedule(args),
    )
    report = bench_attention(settings, subject=subject, notes=notes)
    print(format_attention(report))
    write_json(out, attention_json(report))
    return 0


def heads_of(args: argparse.Namespace) -> tuple[str, AttentionHeads, list[str]]:
    """(name of the subject, the heads, notes). Raises BenchmarkError."""
    from cai_runtime.models.shapes import AttentionHeads, model_shapes

    if args.heads:
        found = re.fullmatch(r"(\d+)/(\d+)x(\d+)", args.heads)
        if found is None or args.model:
            raise BenchmarkError(f"--heads {args.heads}: write query/kv x dimension, such as 32/8x128, without --model")
        return args.heads, AttentionHeads(*map(int, found.groups())), []
    shapes = model_shapes(args.model or "llama-3.1-8b")
    if shapes.heads is None:
        raise BenchmarkError(f"{shapes.name} attends over latent vectors (MLA), which this benchmark doesn't measure")
    notes = [f"not verified: {what}" for what in shapes.unverified]
    if shapes.heads.window and not args.window:
        notes.append(f"{shapes.name} also has layers with a window: --window {shapes.heads.window}")
    return shapes.name, shapes.heads, notes
