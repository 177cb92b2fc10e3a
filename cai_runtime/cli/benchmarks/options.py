"""Options that several benchmarks share, and how their values are read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.errors import BenchmarkError

if TYPE_CHECKING:
    from cai_runtime.bench.linear import LinearReport, LinearSettings
    from cai_runtime.bench.timing import Schedule
    from cai_runtime.models.shapes import LinearGroup

PEERS_MODEL = "smollm2-135m-instruct"


def words(text: str) -> tuple[str, ...]:
    """ "fp32,int8" -> ("fp32", "int8")."""
    found = tuple(word.strip() for word in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list")
    return found


def counts(text: str) -> tuple[int, ...]:
    """ "1,4,16" -> (1, 4, 16)."""
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list of whole numbers above 0")
    return found


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it runs, how long it is timed, and where the figures go."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU; default: all that this process may use")
    parser.add_argument("--seconds", type=float, default=0.25, metavar="S", help="timed for each figure; default: 0.25")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns that they are taken in; default: 5")
    parser.add_argument("--no-peers", action="store_true", help="leave out torch")
    parser.add_argument("--json", metavar="FILE", help="also write everything, machine and versions included, to FILE")


def add_backend_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", type=words, metavar="LIST", help="cpu, reference, triton, cuda; default: those for the device"
    )


def add_linear_arguments(parser: argparse.ArgumentParser, batches: str) -> None:
    """What `linear` and `prefill` share."""
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
        "--batch", type=counts, default=counts(batches), metavar="LIST", help=f"rows; default: {batches}"
    )
    add_backend_argument(parser)
    add_machine_arguments(parser)
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the roofline plot (needs the extra `bench`)")


def resolved_device(name: str) -> str:
    """ "auto", "cuda" -> "cpu", "cuda:0". Raises BenchmarkError for a device that is not there."""
    from cai_runtime.engine.open import choose_device

    device = str(choose_device(name))
    return f"{device}:0" if device == "cuda" else device


def schedule(args: argparse.Namespace) -> Schedule:
    from cai_runtime.bench.timing import Schedule

    return Schedule(rounds=args.rounds, seconds=args.seconds)


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
    """(what they are, the groups, whether they are all linears of a model, notes). Raises BenchmarkError."""
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
    """Measure, print the table, write the JSON and the plot."""
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


def output_file(option: str, name: str | None) -> Path | None:
    """The file an option names. Raises BenchmarkError, before anything is measured, when its directory isn't there."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if not path.absolute().parent.is_dir():
        raise BenchmarkError(f"{option} {name}: there is no directory {path.absolute().parent}")
    return path


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")
