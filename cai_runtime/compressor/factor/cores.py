"""Factors at a chosen rank into the cores that are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cai_runtime.compressor.factor.decompose import Factors, interpolate
from cai_runtime.compressor.factor.mpo import MpoTrain
from cai_runtime.compressor.factor.rounding import round_with_feedback, rounding_ridge
from cai_runtime.slim.module import ModuleWeights
from cai_runtime.slim.spec import STORES, ModuleSpec
from cai_runtime.slim.stores import CoreData, quantize


@dataclass(frozen=True)
class StoredModule:
    """What `CheckpointWriter.add_module` takes. floats: the cores before they were rounded, where they are known."""

    spec: ModuleSpec
    cores: list[CoreData]
    pivot: torch.Tensor | None = None
    floats: list[torch.Tensor] | None = None

    def dense(self) -> torch.Tensor:
        """The matrix that it stands for, fp32 [out, in]."""
        return ModuleWeights("", self.spec, self.cores, self.pivot).dense()


def dense_module(weight: torch.Tensor, store: str, input_gram: torch.Tensor) -> StoredModule:
    """The weight itself: to 4 bits rounded with feedback, otherwise to the nearest value of its store. Arguments as in
    `factorized_module`."""
    spec = ModuleSpec("dense", weight.shape[0], weight.shape[1], None, (store,))
    return StoredModule(spec, [_rounded_first(weight, store, input_gram)], floats=[weight.float()])


def factorized_module(
    kind: str, weight: torch.Tensor, factors: Factors, rank: int, store: str, input_gram: torch.Tensor
) -> StoredModule:
    """Cores of an interpolative or lowrank module. core_0 is rounded to its store (to 4 bits with feedback); core_1 is
    then fitted anew to what core_0 has become and, to 8 or 4 bits, rounded with feedback. On SmolLM2 that takes nine
    tenths off the error which plain rounding to 8 bits adds. For 4 bits core_1 is fitted with its own rounding in mind:
    smaller numbers are rounded with smaller errors (`rounding_ridge`). Then core_0 is fitted to the rounded core_1, and
    both are rounded once more. Together that takes a third to a half off the error which 4 bits add.

    weight: [out, in], any float dtype. input_gram: [in, in], the damped mean of x x^T that the factors were made with.
    """
    left, right = factors.left[:, :rank], factors.right[:rank]
    out, inp = weight.shape
    if kind == "interpolative":
        found = interpolate(left, right)
        core_0, core_1, pivot = found.core_0, found.core_1, found.pivot
        if STORES[store].bits == 4:
            # Any order of the pivot rows gives the same module. The strongest inputs of core_1 first: their errors can
            # still be made up for by many others.
            strength = ((core_0.to(torch.float64) @ input_gram.to(torch.float64)) * core_0).sum(dim=1)
            order = strength.argsort(descending=True, stable=True)
            core_0, core_1, pivot = core_0[order], core_1[:, order], torch.cat([pivot[:rank][order], pivot[rank:]])
        rest = weight[pivot[rank:]]
    else:
        core_0, core_1, pivot, rest = right, left, None, weight
    stored_0 = _rounded_first(core_0, store, input_gram)
    if store == "fp32":
        stored_1, fitted = quantize(core_1, store), core_1
    else:
        stored_1, fitted = _rounded_second(rest, stored_0, store, input_gram)
    if STORES[store].bits == 4:
        core_0 = refit_first(core_0, core_1, stored_1.values(), pivoted=pivot is not None)
        stored_0 = _rounded_first(core_0, store, input_gram)
        stored_1, fitted = _rounded_second(rest, stored_0, store, input_gram)
    spec = ModuleSpec("lowrank" if pivot is None else "interpolative", out, inp, rank, (store, store))
    return StoredModule(spec, [stored_0, stored_1], pivot, [core_0.float(), fitted.float()])


def mpo_module(train: MpoTrain, widest: int, store: str) -> StoredModule:
    """Cores of a matrix product operator, each number rounded to the nearest of its store. widest: bond dimension."""
    cores = train.cores(widest)
    return StoredModule(train.reshape.spec(widest, store), [quantize(core, store) for core in cores], None, cores)


def _rounded_first(matrix: torch.Tensor, store: str, input_gram: torch.Tensor) -> CoreData:
    """The core that the module's own input goes into. 8 bits are so fine that feedback gains nothing there."""
    return round_with_feedback(matrix, input_gram, store) if STORES[store].bits == 4 else quantize(matrix, store)


def _rounded_second(
    rows: torch.Tensor, core_0: CoreData, store: str, input_gram: torch.Tensor
) -> tuple[CoreData, torch.Tensor]:
    """core_1 fitted to what core_0 has become, rounded, and as it was before. rows: see `refit`."""
    core_1, inner = refit(rows, core_0.values(), input_gram)
    if STORES[store].bits == 4:
        core_1, _ = refit(rows, core_0.values(), input_gram, rounding_ridge(core_1, inner, store))
    stored = round_with_feedback(core_1, inner, store) if STORES[store].scale else quantize(core_1, store)
    return stored, core_1


def refit_first(core_0: torch.Tensor, core_1: torch.Tensor, rounded: torch.Tensor, *, pivoted: bool) -> torch.Tensor:
    """The core_0 [r, in], fp64, that with core_1 rounded comes closest to the product of the two as they were: least
    squares in A, the rounded core_1 with the identity above it when the module is `pivoted`.

    The product and not the weight is aimed at: it is best in a metric of the outputs that is not known here, and what
    the product leaves out of the weight must not come back in another metric.
    """
    before, after = core_1.to(torch.float64), rounded.to(torch.float64)
    normal, mixed = after.mT @ after, after.mT @ before
    if pivoted:
        eye = torch.eye(normal.shape[0], dtype=torch.float64, device=normal.device)
        normal, mixed = normal + eye, mixed + eye
    ridge = 1e-10 * float(normal.diagonal().mean()) + torch.finfo(torch.float64).tiny
    normal.diagonal().add_(ridge)
    return torch.cholesky_solve(mixed @ core_0.to(torch.float64), torch.linalg.cholesky(normal))


def refit(
    rows: torch.Tensor, core_0: torch.Tensor, input_gram: torch.Tensor, penalty: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The core_1 [rows, r] that, after the given core_0 C [r, in], comes closest to `rows` [rows, in] on the inputs:
    least squares, rows G C^T (C G C^T + penalty)^-1; and C G C^T [r, r], the mean of z z^T for z = C x. Both fp64.
    penalty: what a unit of core_1's sum of squares counts, beside the squared error.

    Best for any weighting of the outputs, too: given the row space, each row is fitted by itself.
    """
    c, gram = core_0.to(torch.float64), input_gram.to(torch.float64)
    projected = gram @ c.mT
    inner = c @ projected
    # The pivot rows are independent, but a caller may ask for more rank than the weight has.
    ridge = penalty + 1e-10 * float(inner.diagonal().mean()) + torch.finfo(torch.float64).tiny
    root = torch.linalg.cholesky(inner + ridge * torch.eye(inner.shape[0], dtype=torch.float64, device=inner.device))
    return torch.cholesky_solve((rows.to(torch.float64) @ projected).mT, root).mT, inner
