"""Lowrank cores that are good at every rank at which they are opened, rounding included.

Cut off at rank s, a module is the first s rows of core_0 and columns of core_1. The truncated SVD is best at every s, but
cores that are rounded as if all columns were always there are not: fitting and error feedback let one column make up for
the error of another, and a column that is cut off takes with it what it made up for. So the error that is minimised here is
the mean over the ranks s, each relative to the error that the truncated SVD has there:

    sum over s of w_s || (W - B[:, :s] A[:s]) G^(1/2) ||^2,   w_s = 1 / (truncation error at s).

It is quadratic in B, as the error at one rank is; its matrix is A G A^T, each entry (i, j) times the weight of the ranks
that hold both columns, c_max(i, j) with c_k the sum of w_s over s > k. Least squares and error feedback (Frantar, Ashkboos,
Hoefler and Alistarh, "GPTQ: Accurate post-training quantization for generative pre-trained transformers", 2023) work on it
as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cai_runtime.compressor.factor.cores import StoredModule
from cai_runtime.compressor.factor.decompose import Factors
from cai_runtime.compressor.factor.rounding import round_with_feedback, rounding_ridge
from cai_runtime.slim.spec import STORES, ModuleSpec
from cai_runtime.slim.stores import CoreData, quantize

# The columns of core_1 are as long as their singular values to this power. A packed row has one scale for many columns:
# equal lengths (0) spend as many bits on the weak ones as on the strong, 1/2 lets the strong ones set too coarse a scale for
# the others.
GAUGE = 0.25
_RIDGE = 1e-10  # of the mean diagonal
_EXHAUSTED = 1e-6  # of the whole error: at full rank nothing is left, and no rank may count without bounds


def nested_module(
    weight: torch.Tensor,
    factors: Factors,
    store: str,
    input_gram: torch.Tensor,
    ranks: Sequence[int],
) -> StoredModule:
    """A lowrank module of rank max(ranks), made to be cut off at any of `ranks` (`PlannedModule.ranks`).

    weight: [out, in], any float dtype. factors: those of `weight` under `input_gram`, the damped mean of x x^T, [in, in].
    store: of both cores.
    """
    rank = max(ranks)
    left, right = _gauged(factors, rank)
    share = _shares(factors.energy, ranks)
    joint = torch.minimum(share[:, None], share[None])
    weight, gram = weight.to(torch.float64), input_gram.to(torch.float64)
    core_0 = right
    stored_0 = _rounded(core_0, gram, store)
    core_1, inner = _fitted(weight, stored_0, gram, share, joint, store)
    stored_1 = _rounded(core_1, inner, store)
    if STORES[store].bits == 4:
        core_0 = _first_fitted(left, right, stored_1, joint)
        stored_0 = _rounded(core_0, gram, store)
        core_1, inner = _fitted(weight, stored_0, gram, share, joint, store)
        stored_1 = _rounded(core_1, inner, store)
    spec = ModuleSpec("lowrank", weight.shape[0], weight.shape[1], rank, (store, store))
    return StoredModule(spec, [stored_0, stored_1], floats=[core_0.float(), core_1.float()])


def _gauged(factors: Factors, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors, fp64, with the columns of the left one as long as `GAUGE` says."""
    left, right = factors.left[:, :rank].to(torch.float64), factors.right[:rank].to(torch.float64)
    energy = factors.energy[:rank].to(left)
    tiny = torch.finfo(torch.float64).tiny
    # A singular value of rounding noise must not make its row of core_0 huge.
    values = (energy / energy[0].clamp_min(tiny)).clamp_min(1e-12).sqrt()
    length = values**GAUGE / left.norm(dim=0).clamp_min(tiny)
    return left * length, right / length[:, None]


def _shares(energy: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """[max(ranks)] fp64: for each column, the weight of the ranks that hold it; falls from 1."""
    energy = energy.to(torch.float64)
    tail = energy.flip(0).cumsum(0).flip(0)
    whole = float(tail[0]) or 1.0
    weights = torch.zeros(max(ranks), dtype=torch.float64, device=energy.device)
    for s in ranks:
        left_out = float(tail[s]) if s < tail.numel() else 0.0
        weights[s - 1] += whole / max(left_out, _EXHAUSTED * whole)
    shares = weights.flip(0).cumsum(0).flip(0)
    return shares / shares[0]


def _fitted(
    weight: torch.Tensor,
    core_0: CoreData,
    gram: torch.Tensor,
    share: torch.Tensor,
    joint: torch.Tensor,
    store: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best core_1, fp64, after the rounded core_0, and the matrix of the error that it minimises. To 4 bits it is fitted
    with its rounding in mind: smaller numbers are rounded with smaller errors."""
    a = core_0.values(torch.float64)
    projected = gram @ a.mT
    inner = (a @ projected) * joint
    target = (weight @ projected) * share
    core_1 = _solve(inner, target)
    if STORES[store].bits == 4:
        core_1 = _solve(inner, target, rounding_ridge(core_1, inner, store))
    return core_1, inner


def _first_fitted(left: torch.Tensor, right: torch.Tensor, core_1: CoreData, joint: torch.Tensor) -> torch.Tensor:
    """The core_0, fp64, that with the rounded core_1 comes closest to the product of the factors, at every rank.

    The product and not the weight is aimed at, see `cores.refit_first`.
    """
    b = core_1.values(torch.float64)
    return _solve((b.mT @ b) * joint, right.mT @ ((b.mT @ left) * joint).mT).mT


def _solve(matrix: torch.Tensor, target: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
    """X with X (matrix + ridge) = target, for a positive matrix [r, r] and a target [rows, r]."""
    ridge += _RIDGE * float(matrix.diagonal().mean()) + torch.finfo(torch.float64).tiny
    eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return torch.cholesky_solve(target.mT, torch.linalg.cholesky(matrix + ridge * eye)).mT


def _rounded(core: torch.Tensor, gram: torch.Tensor, store: str) -> CoreData:
    return round_with_feedback(core, gram, store) if STORES[store].scale else quantize(core, store)
