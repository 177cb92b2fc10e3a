"""Prepared linears for a GPU: Triton's kernels, or CUDA C++ where it is built."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from cai_runtime.kernels.slim_linear import Linear, MpoLinear, PreparedLinear, Prologue, SideBySide, as_dense
from cai_runtime.kernels.weights import LinearWeights


class CudaOrTritonLinear(Linear):
    """16-bit activations by the CUDA kernels, others by Triton's, made ready when the first of them come: the two keep the
    weights in layouts of their own."""

    def __init__(self, members: Sequence[LinearWeights]):
        from cai_runtime.kernels.cuda import CudaLinear

        self.in_features = members[0].in_features
        self.out_features = sum(w.out_features for w in members)
        self._cuda = CudaLinear(members)
        self._others: Linear | None = None
        self._lock = threading.Lock()
        self._members = tuple(members)

    def _run(self, x: torch.Tensor, prologue: Prologue, residual: torch.Tensor | None) -> torch.Tensor:
        if self._cuda.takes(x.dtype):
            return self._cuda._run(x, prologue, residual)
        if self._others is None:
            from cai_runtime.kernels.triton.linear import TritonLinear

            with self._lock:
                if self._others is None:
                    self._others = TritonLinear(self._members)
        return self._others._run(x, prologue, residual)


def cuda_linear(members: Sequence[LinearWeights], activations: torch.dtype | None) -> Linear | None:
    """The members for the CUDA kernels; None where those can't take them at all. activations: of every x, None: of any, then
    others go to Triton."""
    from cai_runtime.kernels.cuda import CudaLinear, takes

    if activations is None:
        return CudaOrTritonLinear(members) if any(takes(members, d) for d in (torch.bfloat16, torch.float16)) else None
    return CudaLinear(members) if takes(members, activations) else None


def gpu_mpo(
    w: LinearWeights, backend: str, int8_activations: bool = False, activations: torch.dtype | None = None
) -> MpoLinear:
    from cai_runtime.kernels.triton import rms_norm, swiglu
    from cai_runtime.kernels.triton.checks import check_activation

    cores = [prepare_linear([as_dense(c)], backend, int8_activations, activations) for c in w.cores]
    return MpoLinear(w, cores, rms_norm, swiglu, lambda x, columns: check_activation("x", x, columns))


def prepare_linear(
    members: Sequence[LinearWeights],
    backend: str,
    int8_activations: bool = False,
    activations: torch.dtype | None = None,
) -> PreparedLinear:
    """backend: "triton" or "cuda". int8_activations: the input of every int8 core is rounded to int8 first. activations: the
    dtype of every x; None: any."""
    if any(w.kind == "mpo" for w in members):
        parts = [
            gpu_mpo(w, backend, int8_activations, activations)
            if w.kind == "mpo"
            else prepare_linear([w], backend, int8_activations, activations)
            for w in members
        ]
        return parts[0] if len(parts) == 1 else SideBySide(parts)
    # The CUDA kernels have no int8 activations, and no fp32 weights.
    if backend == "cuda" and not int8_activations:
        linear = cuda_linear(members, activations)
        if linear is not None:
            return linear
    from cai_runtime.kernels.triton.linear import TritonLinear

    return TritonLinear(members, int8_activations)
