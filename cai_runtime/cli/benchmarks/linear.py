"""Linears by themselves: kernel backends side by side, beside torch, all in one run.

Shapes are those of a model by name, or given by --shape. Each line is one kernel on one group of linears that runs as
one call: median and best time, bytes of weights per second, operations per second, the fraction of the floor, and how
much faster than torch's dense linear. On a GPU every figure is that of a CUDA graph. Weights and inputs rotate, so that no
call finds its weights in a cache. `cai_runtime/bench/linear.py` says exactly what is measured.
"""

from __future__ import annotations

import argparse

from cai_runtime.cli.benchmarks.options import add_linear_arguments, run_linear


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_linear_arguments(parser, batches="1,4,16,512")


def run(args: argparse.Namespace) -> int:
    run_linear(args, "linear")
    return 0
