"""Options that several benchmarks share, and how the command line's values are read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.cli.options import add_device_argument
from cai_runtime.errors import BenchmarkError

if TYPE_CHECKING:
    from cai_runtime.bench.timing import Schedule

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
    """Options for the device, the timing and the output files."""
    add_device_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU; default: all that this process may use")
    parser.add_argument("--seconds", type=float, default=0.25, metavar="S", help="timed for each figure; default: 0.25")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns that they are taken in; default: 5")
    parser.add_argument("--no-peers", action="store_true", help="leave out torch and other libraries")
    parser.add_argument("--json", metavar="FILE", help="also write everything, machine and versions included, to FILE")


def add_backend_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", type=words, metavar="LIST", help="cpu, reference, triton, cuda; default: those for the device"
    )


def resolved_device(name: str) -> str:
    """ "auto" -> "cpu" or "cuda:0", "cuda" -> "cuda:0". Raises KernelError for a device that is not there."""
    from cai_runtime.engine.open import choose_device

    device = str(choose_device(name))
    return f"{device}:0" if device == "cuda" else device


def schedule(args: argparse.Namespace) -> Schedule:
    from cai_runtime.bench.timing import Schedule

    return Schedule(rounds=args.rounds, seconds=args.seconds)


def output_file(option: str, name: str | None) -> Path | None:
    """The file that an option names. Raises BenchmarkError for a missing directory, before anything is measured."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if not path.absolute().parent.is_dir():
        raise BenchmarkError(f"{option} {name}: there is no directory {path.absolute().parent}")
    return path


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")
