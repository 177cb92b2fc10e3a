"""Rounds the lowrank cores of an elastic checkpoint so that they are accurate at every rank they open at.

A module opened at rank s uses the first s rows of core_0 (A) and the first s columns of core_1 (B). The truncated SVD is
optimal at every s. Cores rounded for the full rank are not: error feedback lets later columns compensate earlier ones, and
truncation removes the compensation. So the error minimized here sums over the ranks s:

    sum_s w_s || (W - B[:, :s] A[:s]) G^(1/2) ||^2,   w_s = 1 / (truncation error at s).

It is quadratic in B with the matrix H_ij = (A G A^T)_ij c_max(i, j), where c_k = sum of w_s over s > k. Column k is in use
at the ranks s > k. Least squares and error feedback (Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate post-training
quantization for generative pre-trained transformers", 2023) apply with H in place of A G A^T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cai_runtime.compressor.factor.cores import StoredModule
from cai_runtime.compressor.factor.decompose import Factors
from cai_runtime.compressor.factor.rounding import round_with_feedback, rounding_ridge
from cai_runtime.slim.spec import STORES, ModuleSpec
from cai_runtime.slim.stores import CoreData, quantize

# Column k of core_1 has the norm (singular value k)^GAUGE. A packed row shares one scale among many columns. GAUGE 0 spends
# as many bits on weak columns as on strong ones; 1/2 makes the scale too coarse for the weak ones.
GAUGE = 0.25
_RIDGE = 1e-10  # of the mean diagonal
_EXHAUSTED = 1e-6  # smallest relative truncation error in w_s, which is unbounded at full rank


def nested_module(
    weight: torch.Tensor,
    factors: Factors,
    store: str,
    input_gram: torch.Tensor,
    ranks: Sequence[int],
) -> StoredModule:
    """A lowrank module of rank max(ranks) that can be truncated to any of `ranks` (see `PlannedModule.ranks`).

    weight: [out, in], any float dtype. factors: of `weight` under `input_gram`. store: of both cores. input_gram: [in, in],
    the damped mean of x x^T.
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
    """Both factors at `rank`, fp64, with the column norms of the left one set by `GAUGE`."""
    left, right = factors.left[:, :rank].to(torch.float64), factors.right[:rank].to(torch.float64)
    energy = factors.energy[:rank].to(left)
    tiny = torch.finfo(torch.float64).tiny
    # A lower bound: a singular value that is rounding noise would make its row of core_0 huge.
    values = (energy / energy[0].clamp_min(tiny)).clamp_min(1e-12).sqrt()
    length = values**GAUGE / left.norm(dim=0).clamp_min(tiny)
    return left * length, right / length[:, None]


def _shares(energy: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """c_k / c_0 for each column k, [max(ranks)] fp64: the total weight w_s of the ranks that use it. Falls from 1."""
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
    """The least-squares core_1 behind the rounded core_0, and the matrix H of the error. Both fp64. At 4 bits with a ridge
    for core_1's own rounding (`rounding_ridge`)."""
    a = core_0.values(torch.float64)
    projected = gram @ a.mT
    inner = (a @ projected) * joint
    target = (weight @ projected) * share
    core_1 = _solve(inner, target)
    if STORES[store].bits == 4:
        core_1 = _solve(inner, target, rounding_ridge(core_1, inner, store))
    return core_1, inner


def _first_fitted(left: torch.Tensor, right: torch.Tensor, core_1: CoreData, joint: torch.Tensor) -> torch.Tensor:
    """The core_0, fp64, that with the rounded core_1 best reproduces the product of the factors over all ranks.

    The target is the product and not the weight, see `cores.refit_first`.
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
