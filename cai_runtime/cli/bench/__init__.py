"""Measure speed: of a checkpoint, of linears, of attention; alone or beside other engines.

`cai bench decode DIR`      tokens/s of a checkpoint while decoding, time to first token, at several batch sizes
`cai bench linear`          linears by themselves: backends side by side, beside torch, with a roofline plot
`cai bench attention`       attention over a paged cache, beside torch
`cai bench prefill [DIR]`   linears at prompt lengths; with a checkpoint, the tokens/s of whole prompts

`cai bench linear --help` explains one of them. Every figure comes with its floor, measured in the same run.
"""

from __future__ import annotations

import argparse
from importlib import import_module

SUBCOMMANDS = True
HELP = "measure the speed of a checkpoint, alone or beside other engines"
BENCHMARKS = {
    "decode": "tokens/s of a checkpoint while decoding",
    "linear": "linears by themselves, backends side by side",
    "attention": "attention over a paged cache, backends side by side",
    "prefill": "linears at prompt lengths, or whole prompts of a checkpoint",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, text in BENCHMARKS.items():
        module = import_module(f"{__name__}.{name}")
        own = benchmarks.add_parser(name, help=text, description=module.__doc__, formatter_class=parser.formatter_class)
        module.add_arguments(own)


def run(args: argparse.Namespace) -> int:
    return int(import_module(f"{__name__}.{args.benchmark}").run(args))
