"""How launches of real shapes are cut up, by the CUDA library's own plan (cut.cu), compiled for the host."""

from __future__ import annotations

import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Shapes = Mapping[str, tuple[int, tuple[int, ...], int]]
# Llama-3.1-8B: inputs, outputs of the members, prologue of the first cores (0 none, 1 norm, 2 gate).
LAYER: Shapes = {
    "q/k/v": (4096, (4096, 1024, 1024), 1),
    "o": (4096, (4096,), 0),
    "gate/up": (4096, (14336, 14336), 1),
    "down": (14336, (4096,), 2),
}
HEAD: Shapes = {"head": (4096, (128256,), 0)}
STORES = {"bf16": (0, 0), "int8": (1, 0), "int4/128": (2, 128)}
ROWS = (1, 8, 16)
MANY = (32, 64, 256, 2048)
FUSED_GATES = 4  # FUSED_SWIGLU_ROWS of kernels/cuda.py
WARPS, SLOTS, PARTS = 8, 4, 8


def rank(inputs: int, outputs: int, keep: float) -> int:
    """Of an interpolative linear that keeps this part of the parameters, as a multiple of 16."""
    half = (inputs + outputs) / 2
    return int(half - math.sqrt(half * half - keep * inputs * outputs)) // 16 * 16


def launches(
    multiprocessors: int, keep: float | None = 0.5, rows: Sequence[int] = ROWS, shapes: Shapes = LAYER
) -> list[dict[str, Any]]:
    """Of every launch of a layer, or of other shapes, with up to 16 rows of x: store, rows, tiles for each multiprocessor,
    cluster, blocks, shared memory, and the bytes of weights that a multiprocessor has under way. keep: None for dense
    linears."""
    found = []
    for plan, (cluster, blocks, groups, nbytes, slot) in _plans(multiprocessors, keep, rows, shapes):
        found.append(plan | {
            "tiles_a_multiprocessor": round(plan["tiles"] / multiprocessors, 2), "cluster": cluster, "blocks": blocks,
            "rounds": -(-groups * cluster // blocks), "shared_bytes": nbytes, "bytes_under_way": WARPS * SLOTS * slot,
        })  # fmt: skip
    return found


def many_launches(
    multiprocessors: int, keep: float | None = 0.5, rows: Sequence[int] = MANY, shapes: Shapes = LAYER
) -> list[dict[str, Any]]:
    """The same with more rows: whether eight blocks divide the columns, blocks, shared memory, and what a multiprocessor
    may have under way. items: what a cluster takes at a time, a group of eight tiles by `rows_of_block` rows of x where
    eight blocks divide the columns, else two by two of these."""
    found = []
    for plan, (cluster, blocks, groups, nbytes, stage, stages, runs, high) in _plans(
        multiprocessors, keep, rows, shapes
    ):
        found.append(plan | {
            "split": cluster == PARTS, "blocks": blocks, "items": groups * runs, "rows_of_block": high,
            "shared_bytes": nbytes, "bytes_under_way": stage * stages,
        })  # fmt: skip
    return found


def _plans(
    multiprocessors: int, keep: float | None, rows: Sequence[int], shapes: Shapes
) -> list[tuple[dict[str, Any], list[int]]]:  # fmt: skip
    """Of every launch what it is, and what the library's plan says of it."""
    wanted, lines = [], []
    for store, numbers in STORES.items():
        for count in rows:
            for name, (inputs, outputs, prologue) in shapes.items():
                for stage, products in enumerate(_stages(inputs, outputs, keep)):
                    first = 0 if stage or (prologue == 2 and count > FUSED_GATES) else prologue
                    sizes = [n for p in products for n in p]
                    lines.append(
                        " ".join(map(str, (*numbers, 0, count, first, multiprocessors, len(products), *sizes)))
                    )
                    wanted.append({
                        "store": store, "rows": count, "launch": f"{name} {stage}", "prologue": first,
                        "tiles": sum(-(-n // 16) for n, _, _ in products), "columns": products[0][1],
                        "weights": sum(n * k for n, k, _ in products),
                    })  # fmt: skip
    return list(zip(wanted, _cut(lines), strict=True))


def _stages(inputs: int, outputs: Sequence[int], keep: float | None) -> list[list[tuple[int, int, int]]]:
    """Rows, columns and first column of x of the products of each stage."""
    if keep is None:
        return [[(out, inputs, 0) for out in outputs]]
    ranks = [rank(inputs, out, keep) for out in outputs]
    starts = [sum(-(-r // 32) * 32 for r in ranks[:i]) for i in range(len(ranks))]
    second = [(out - r, r, at) for out, r, at in zip(outputs, ranks, starts, strict=True)]
    return [[(r, inputs, 0) for r in ranks], second]


def _cut(lines: list[str]) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "cut"
        source = ROOT / "benchmarks/gpu/cut.cu"
        command = [
            "nvcc",
            "-std=c++17",
            "--expt-relaxed-constexpr",
            f"-I{ROOT / 'csrc'}",
            str(source),
            "-o",
            str(program),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"nvcc failed:\n{done.stderr}")
        answer = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    return [[int(n) for n in line.split()] for line in answer.stdout.splitlines()]


def table_of_launches(found: list[dict[str, Any]]) -> str:
    lines = [
        f"{'store':<10}{'rows':>5}  {'launch':<10}{'tiles':>6}{'a multiproc.':>13}{'cluster':>8}{'blocks':>7}{'rounds':>7}"
        f"{'shared KiB':>11}{'under way KiB':>14}"
    ]
    lines += [
        f"{f['store']:<10}{f['rows']:>5}  {f['launch']:<10}{f['tiles']:>6}{f['tiles_a_multiprocessor']:>13}"
        f"{f['cluster']:>8}{f['blocks']:>7}{f['rounds']:>7}{f['shared_bytes'] / 1024:>11.1f}"
        f"{f['bytes_under_way'] / 1024:>14.1f}"
        for f in found
    ]
    return "\n".join(lines)
