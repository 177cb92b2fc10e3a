"""Prefill: linears at prompt lengths, or, with a checkpoint, the tokens/s of whole prompts.

Without DIR, as `cai bench linear`, at 128, 512 and 2048 rows. With DIR, the engine and transformers (fp32 and bf16) each
run prompts of --batch tokens, one at a time; --no-peers leaves transformers out. The options for linears are then
refused. `cai_runtime/bench/prefill.py` defines each figure.
"""

from __future__ import annotations

import argparse

from cai_runtime.cli.bench.linear import add_linear_arguments, run_linear
from cai_runtime.cli.bench.options import PEERS_MODEL, output_file, write_json
from cai_runtime.errors import BenchmarkError

LENGTHS = "128,512,2048"
OF_LINEARS = ("model", "only", "shape", "kind", "keep", "rank", "store", "group", "backend", "plot", "seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", nargs="?", help="checkpoint directory, slim or plain dense")
    add_linear_arguments(parser, batches=LENGTHS)
    parser.add_argument(
        "--dtype", default="auto", help="with DIR: what float weights are held in: fp32, bf16, fp16, auto"
    )
    parser.add_argument(
        "--peers-model",
        default=PEERS_MODEL,
        metavar="SOURCE",
        help="with a slim DIR: where transformers gets the same model, a name or URI of `cai pull`; "
        f"default: {PEERS_MODEL}",
    )
    parser.set_defaults(defaults={name: parser.get_default(name) for name in OF_LINEARS})


def run(args: argparse.Namespace) -> int:
    if args.dir is None:
        run_linear(args, "prefill")
        return 0
    for name, default in args.defaults.items():
        if getattr(args, name) != default:
            raise BenchmarkError(f"--{name} is for linears by themselves: leave out either it or {args.dir}")
    from cai_runtime.bench.prefill import bench_prefill, format_prefill, prefill_json

    out = output_file("--json", args.json)
    report = bench_prefill(
        args.dir,
        prompts=args.batch,
        repeats=args.rounds,
        threads=args.threads,
        device=args.device,
        dtype=args.dtype,
        peer=None if args.no_peers else dense_directory(args.dir, args.peers_model),
    )
    print(format_prefill(report))
    write_json(out, prefill_json(report))
    return 0


def dense_directory(checkpoint: str, source: str) -> str:
    """The directory that transformers runs: a dense checkpoint itself, or `source` in place of a slim one."""
    from cai_runtime.convert.sources import pull
    from cai_runtime.slim.reader import Checkpoint

    with Checkpoint.open(checkpoint) as opened:
        return str(pull(source)) if opened.is_slim else checkpoint
