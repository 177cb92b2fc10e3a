"""Tunes the tiles of the Triton products. The file of tuned tiles, which the package may ship, is copied to the results."""

from __future__ import annotations

import shutil
from dataclasses import asdict

from gpu.context import Context
from gpu.report import Findings

# (columns, features) of Llama-3.1-8B's cores at keep 0.5, the most expensive ones first: gate/up, down, q/k/v, o.
SHAPES = ((12576, 1760), (1760, 14336), (1760, 4096), (1184, 4096), (2912, 1184))
STORES = ("bf16", "int4/128", "int8")


def run(findings: Findings, context: Context) -> None:
    """Tune one store after the other. An interrupted run keeps the stores that it finished."""
    for store in STORES:
        findings.attempt(store, lambda s=store: _store(findings, context, s))


def _store(findings: Findings, context: Context, store: str) -> None:
    from cai_runtime.kernels.triton.tune import tune

    path, best = tune(SHAPES, (store,), show=False)
    shutil.copy2(path, context.out / f"tuned-{path.name}")
    for family, tile in best.items():
        findings.add(what="tile", family=family, **asdict(tile))
