"""The weights of one linear module as they are stored, and the plain reconstruction of its matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cai_runtime.slim.spec import ModuleSpec
from cai_runtime.slim.stores import CoreData


@dataclass(frozen=True)
class ModuleWeights:
    """One module read from a checkpoint. `pivot`: int32 [out], interpolative only; `bias`: float [out] or None."""

    name: str
    spec: ModuleSpec
    cores: list[CoreData]
    pivot: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix W, [out, in], computed in `dtype`: the definition that every faster way is held against."""
        cores = [core.values(dtype) for core in self.cores]
        if self.spec.kind == "dense":
            return cores[0]
        if self.spec.kind == "lowrank":
            return cores[1] @ cores[0]
        if self.spec.kind == "interpolative":
            assert self.pivot is not None
            rank, order = cores[0].shape[0], self.pivot.long()
            weight = cores[0].new_empty(self.spec.out_features, self.spec.in_features)
            weight[order[:rank]] = cores[0]
            weight[order[rank:]] = cores[1] @ cores[0]
            return weight
        # mpo: contract bond by bond; `left` is [out so far, in so far, chi].
        left = cores[0].new_ones(1, 1, 1)
        for core in cores:
            out, inp = left.shape[0] * core.shape[1], left.shape[1] * core.shape[2]
            left = torch.einsum("aic,cbjd->abijd", left, core).reshape(out, inp, core.shape[3])
        return left[:, :, 0]
