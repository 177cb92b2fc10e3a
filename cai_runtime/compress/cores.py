"""Factors at a chosen rank into the cores that are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cai_runtime.compress.decompose import Factors, interpolate
from cai_runtime.compress.rounding import round_with_feedback
from cai_runtime.slim.module import ModuleWeights
from cai_runtime.slim.spec import STORES, ModuleSpec
from cai_runtime.slim.stores import CoreData, quantize


@dataclass(frozen=True)
class StoredModule:
    """What `CheckpointWriter.add_module` takes."""

    spec: ModuleSpec
    cores: list[CoreData]
    pivot: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """The matrix that it stands for, fp32 [out, in]."""
        return ModuleWeights("", self.spec, self.cores, self.pivot).dense()


def dense_module(weight: torch.Tensor, store: str, input_gram: torch.Tensor) -> StoredModule:
    """The weight itself: to 4 bits rounded with feedback, otherwise to the nearest value of its store. Arguments as in
    `factorized_module`."""
    spec = ModuleSpec("dense", weight.shape[0], weight.shape[1], None, (store,))
    return StoredModule(spec, [_rounded_first(weight, store, input_gram)])


def factorized_module(
    kind: str, weight: torch.Tensor, factors: Factors, rank: int, store: str, input_gram: torch.Tensor
) -> StoredModule:
    """Cores of an interpolative or lowrank module. core_0 is rounded to its store (to 4 bits with feedback); core_1 is then
    fitted anew to what core_0 has become and, to 8 or 4 bits, rounded with feedback. On SmolLM2 that takes nine tenths off
    the error which plain rounding to 8 bits adds.

    weight: [out, in], any float dtype. input_gram: [in, in], the damped mean of x x^T that the factors were made with.
    """
    left, right = factors.left[:, :rank], factors.right[:rank]
    out, inp = weight.shape
    if kind == "interpolative":
        found = interpolate(left, right)
        core_0, core_1, pivot = found.core_0, found.core_1, found.pivot
        rest = weight[pivot[rank:]]
    else:
        core_0, core_1, pivot, rest = right, left, None, weight
    stored_0 = _rounded_first(core_0, store, input_gram)
    if store == "fp32":
        stored_1 = quantize(core_1, store)
    else:
        core_1, inner = refit(rest, stored_0.values(), input_gram)
        stored_1 = round_with_feedback(core_1, inner, store) if STORES[store].scale else quantize(core_1, store)
    spec = ModuleSpec("lowrank" if pivot is None else "interpolative", out, inp, rank, (store, store))
    return StoredModule(spec, [stored_0, stored_1], pivot)


def _rounded_first(matrix: torch.Tensor, store: str, input_gram: torch.Tensor) -> CoreData:
    """The core that the module's own input goes into. 8 bits are so fine that feedback gains nothing there."""
    return round_with_feedback(matrix, input_gram, store) if STORES[store].bits == 4 else quantize(matrix, store)


def refit(rows: torch.Tensor, core_0: torch.Tensor, input_gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The core_1 [rows, r] that, after the given core_0 C [r, in], comes closest to `rows` [rows, in] on the inputs:
    least squares, rows G C^T (C G C^T)^-1; and C G C^T [r, r], the mean of z z^T for z = C x. Both fp64.

    Best for any weighting of the outputs, too: given the row space, each row is fitted by itself.
    """
    c, gram = core_0.to(torch.float64), input_gram.to(torch.float64)
    projected = gram @ c.mT
    inner = c @ projected
    # The pivot rows are independent, but a caller may ask for more rank than the weight has.
    ridge = 1e-10 * float(inner.diagonal().mean()) + torch.finfo(torch.float64).tiny
    root = torch.linalg.cholesky(inner + ridge * torch.eye(inner.shape[0], dtype=torch.float64, device=inner.device))
    return torch.cholesky_solve((rows.to(torch.float64) @ projected).mT, root).mT, inner
