"""Prepared linears for a GPU: Triton for any number of rows, CUDA C++ for decode where it is built."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cai_runtime.kernels.slim_linear import Linear, MpoLinear, PreparedLinear, Prologue, SideBySide, as_dense
from cai_runtime.kernels.weights import LinearWeights


class CudaOrTritonLinear(Linear):
    """Up to 16 rows of 16-bit activations by the CUDA kernels, all else by Triton's.

    The two sum in different orders, so on a GPU a row's last bits may depend on which of them its batch took. Each keeps the
    weights in a layout of its own, so that they take twice the memory.
    """

    def __init__(self, members: Sequence[LinearWeights], int8_activations: bool = False):
        from cai_runtime.kernels.cuda import CudaLinear
        from cai_runtime.kernels.cuda_packing import STORES
        from cai_runtime.kernels.triton.linear import TritonLinear

        self.in_features = members[0].in_features
        self.out_features = sum(w.out_features for w in members)
        self._many = TritonLinear(members, int8_activations)
        # The CUDA kernels have no int8 activations, and no fp32 weights: with them, all rows go through Triton.
        fits = not int8_activations and all(c.store in STORES for w in members for c in w.cores)
        self._few = CudaLinear(members) if fits else None

    def _run(self, x: torch.Tensor, prologue: Prologue, residual: torch.Tensor | None) -> torch.Tensor:
        from cai_runtime.kernels.cuda import MAX_ROWS

        few = self._few is not None and x.shape[0] <= MAX_ROWS and self._few.takes(x.dtype)
        linear = self._few if few and self._few is not None else self._many
        return linear._run(x, prologue, residual)


def gpu_mpo(w: LinearWeights, backend: str, int8_activations: bool = False) -> MpoLinear:
    from cai_runtime.kernels.triton import rms_norm, swiglu
    from cai_runtime.kernels.triton.checks import check_activation

    cores = [prepare_linear([as_dense(c)], backend, int8_activations) for c in w.cores]
    return MpoLinear(w, cores, rms_norm, swiglu, lambda x, columns: check_activation("x", x, columns))


def prepare_linear(members: Sequence[LinearWeights], backend: str, int8_activations: bool = False) -> PreparedLinear:
    """backend: "triton" or "cuda". int8_activations: the input of every int8 core is rounded to int8 first."""
    if any(w.kind == "mpo" for w in members):
        parts = [
            gpu_mpo(w, backend, int8_activations) if w.kind == "mpo" else prepare_linear([w], backend, int8_activations)
            for w in members
        ]
        return parts[0] if len(parts) == 1 else SideBySide(parts)
    if backend == "cuda":
        return CudaOrTritonLinear(members, int8_activations)
    from cai_runtime.kernels.triton.linear import TritonLinear

    return TritonLinear(members, int8_activations)
