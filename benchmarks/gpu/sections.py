"""The sections, the most important first, with their time limits and the calls that they belong to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from gpu import attention, bits, checks, correct, counters, decode, linears, roofs, serve, timeline, tuned
from gpu.children import build
from gpu.context import Context
from gpu.report import Findings


@dataclass(frozen=True)
class Section:
    """run: called with the findings, the context and the section's end by time.time(). limit: seconds. calls: the calls that
    run it. asks: its question. rehearsed: whether it can run on a CPU."""

    run: Callable[[Findings, Context, float], None]
    limit: float
    calls: tuple[int, ...]
    asks: str
    rehearsed: bool = True


def _build(findings: Findings, context: Context, until: float) -> None:
    if context.backends[-1] == "cuda":
        findings.add("the libraries are there", what="build", built=False)
    else:
        findings.attempt("build", lambda: findings.add(what="build", **build(max(until - time.time(), 1))))


def _correct(warm: bool) -> Callable[[Findings, Context, float], None]:
    return lambda f, c, until: correct.run(f, c, until=time.monotonic() + until - time.time() - 6, warm=warm)


SECTIONS: dict[str, Section] = {
    "build": Section(_build, 150, (1, 2), "the CUDA library loads, or is built", rehearsed=False),
    "correct": Section(
        _correct(True), 85, (1,), "tests of the Triton and CUDA kernels, `engine` beside them", rehearsed=False
    ),
    "bits": Section(lambda f, c, u: bits.run(f, c), 30, (1,), "do wgmma, mma.sync and CUDA give the same bits?"),
    "engine": Section(lambda f, c, u: checks.run(f, c), 60, (), "engines give the reference's tokens, graphs its bits"),
    "roofs": Section(lambda f, c, u: roofs.run(f, c), 25, (1, 2), "bandwidth, launches, barriers"),
    "decode": Section(lambda f, c, u: decode.run(f, c), 130, (1,), "whole steps of Llama-3.1-8B's shape, and prefill"),
    "timeline": Section(lambda f, c, u: timeline.run(f, c), 45, (1,), "kernel by kernel, with gaps"),
    "many": Section(lambda f, c, u: linears.run_many(f, c), 40, (1,), "linears of 64 to 4096 rows beside cuBLAS"),
    "prefill-attention": Section(lambda f, c, u: attention.run_prefill(f, c), 20, (1,), "beside torch's own"),
    "ncu": Section(
        lambda f, c, u: counters.run_ncu(f, c), 75, (1,), "hardware counters of single kernels", rehearsed=False
    ),
    "serve": Section(lambda f, c, u: serve.run(f, c), 80, (2,), "tokens a second of an engine, by sampling"),
    "linears": Section(lambda f, c, u: linears.run(f, c), 75, (2,), "linears of 1 to 16 rows, bare and fused"),
    "attention": Section(lambda f, c, u: attention.run(f, c), 25, (2,), "decode and prefill beside torch's own"),
    "tune": Section(lambda f, c, u: tuned.run(f, c), 60, (2,), "tiles of the Triton products", rehearsed=False),
    "sanitizer": Section(
        lambda f, c, u: counters.run_sanitizer(f, c), 60, (2,), "memory errors and races", rehearsed=False
    ),
    "all-tests": Section(_correct(False), 150, (2,), "the kernels' tests, with more time", rehearsed=False),
}


def names_of_call(call: int) -> list[str]:
    return [name for name, section in SECTIONS.items() if call in section.calls]
