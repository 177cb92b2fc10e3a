"""Linears by themselves: kernel backends side by side, beside torch, all in one run.

Shapes are those of a model by name, or given by --shape. Each line is one kernel on one group of linears that runs as
one call: median and best time, bytes of weights per second, operations per second, the fraction of the floor, and how
much faster than torch's dense linear. On a GPU every call is replayed from a CUDA graph, whose kernels are counted, and
vLLM's Marlin runs beside ours where vLLM is installed. Weights and inputs rotate, so that no call finds its weights in a
cache. `cai_runtime/bench/linear.py` defines each figure.
"""

from __future__ import annotations

import argparse
from pathlib import Path
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
    from cai_runtime.bench.linear import LinearReport, LinearSettings
    from cai_runtime.models.shapes import LinearGroup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_linear_arguments(parser)


def run(args: argparse.Namespace) -> int:
    run_linear(args, "linear")
    return 0


def add_linear_arguments(parser: argparse.ArgumentParser, batches: str | None = None) -> None:
    """The options that `linear` and `prefill` share. batches: the default of --batch; None is that of the device."""
    parser.add_argument("--model", metavar="NAME", help="all linears of a model, such as llama-3.1-8b (the default)")
    parser.add_argument("--only", type=words, metavar="LIST", help="of the model's groups, such as qkv,down")
    parser.add_argument(
        "--shape",
        action="append",
        metavar="INxOUT",
        help="4096x14336, or 4096x4096+1024+1024 with one input; repeatable",
    )
    parser.add_argument(
        "--kind", default="interpolative", help="interpolative, lowrank, dense or mpo; default: interpolative"
    )
    parser.add_argument("--keep", type=float, default=0.5, help="stored parameters over dense ones; default: 0.5")
    parser.add_argument("--rank", type=int, metavar="R", help="of every linear, instead of --keep")
    parser.add_argument("--store", type=words, default=("fp32", "bf16", "int8", "int4"), metavar="LIST",
                        help="default: fp32,bf16,int8,int4; also fp16")  # fmt: skip
    parser.add_argument("--group", type=int, default=64, help="columns that share an int4 scale; default: 64")
    parser.add_argument(
        "--batch",
        type=counts,
        default=None if batches is None else counts(batches),
        metavar="LIST",
        help=f"rows; default: {batches or '1,4,16,512, on a GPU 1,16,64,512,4096'}",
    )
    add_backend_argument(parser)
    add_machine_arguments(parser)
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the roofline plot (needs the extra `bench`)")


def linear_settings(args: argparse.Namespace) -> LinearSettings:
    from cai_runtime.bench.factors import Factorization
    from cai_runtime.bench.linear import LinearSettings

    return LinearSettings(
        how=Factorization(args.kind, args.keep, args.rank),
        stores=args.store,
        int4_group=args.group,
        batches=args.batch,
        backends=args.backend,
        device=resolved_device(args.device),
        threads=args.threads,
        peers=not args.no_peers,
        schedule=schedule(args),
    )


def linear_groups(args: argparse.Namespace) -> tuple[str, list[LinearGroup], bool, list[str]]:
    """(name of the subject, the groups, whether they are all linears of a model, notes). Raises BenchmarkError."""
    from cai_runtime.models.shapes import distinct, model_shapes, parse_shape

    if args.shape:
        if args.model or args.only:
            raise BenchmarkError("--shape stands for itself: leave out --model and --only")
        return ", ".join(args.shape), [parse_shape(text) for text in args.shape], False, []
    shapes = model_shapes(args.model or "llama-3.1-8b")
    groups = list(shapes.groups)
    names = {group.name for group in groups}
    for name in args.only or ():
        if name not in names:
            raise BenchmarkError(f"{shapes.name} has no linears named {name!r}; it has: {', '.join(sorted(names))}")
    if args.only:
        groups = [group for group in groups if group.name in args.only]
    notes = [f"not verified: {what}" for what in shapes.unverified]
    return shapes.name, distinct(tuple(groups)), not args.only, notes


def run_linear(args: argparse.Namespace, benchmark: str) -> LinearReport:
    """Measure, print the table, write the JSON and the plot. benchmark: the name in the JSON."""
    from cai_runtime.bench.linear import bench_linear
    from cai_runtime.bench.linear_report import draw_linear, format_linear, linear_json
    from cai_runtime.bench.roofline import check_plot

    out = output_file("--json", args.json)
    plot = None if args.plot is None else Path(args.plot).expanduser()
    if plot is not None:
        check_plot(plot)
    subject, groups, of_model, notes = linear_groups(args)
    report = bench_linear(
        groups, linear_settings(args), subject=subject, of_model=of_model, notes=notes, benchmark=benchmark
    )
    print(format_linear(report))
    write_json(out, linear_json(report))
    if plot is not None:
        draw_linear(report, plot)
    return report
