"""Prepared linears for a GPU: Triton for any number of rows, CUDA C++ for decode where it is built."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cai_runtime.kernels.norm import RmsNorm
from cai_runtime.kernels.slim_linear import MpoShape, PreparedLinear, SideBySide, as_dense, contract_mpo, transformed
from cai_runtime.kernels.weights import LinearWeights


class CudaOrTritonLinear:
    """Up to 16 rows by the CUDA kernels, more by Triton's.

    The two sum in different orders, so on a GPU a row's last bits may depend on which of them its batch took.
    """

    def __init__(self, members: Sequence[LinearWeights], int8_activations: bool = False):
        from cai_runtime.kernels.cuda import CudaLinear
        from cai_runtime.kernels.triton.linear import TritonLinear

        self.in_features = members[0].in_features
        self.out_features = sum(w.out_features for w in members)
        self._many = TritonLinear(members, int8_activations)
        # The CUDA kernels have no int8 activations: with them, all rows go through Triton.
        self._few = None if int8_activations else CudaLinear(members)

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        norm: RmsNorm | None = None,
        swiglu: bool = False,
    ) -> torch.Tensor:
        from cai_runtime.kernels.cuda import MAX_ROWS

        linear = self._many if self._few is None or x.shape[0] > MAX_ROWS else self._few
        return linear(x, residual, norm=norm, swiglu=swiglu)


class GpuMpo:
    """A matrix product operator: each core is one row-wise linear."""

    def __init__(self, w: LinearWeights, backend: str, int8_activations: bool = False):
        self.in_features, self.out_features = w.in_features, w.out_features
        # Not `w` itself: its tensors may have been copied for the kernels.
        self._shape = MpoShape(w.in_features, w.out_features, w.out_dims, w.in_dims, w.bonds)
        self._bias = w.bias
        self._cores = [prepare_linear([as_dense(c)], backend, int8_activations) for c in w.cores]

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        norm: RmsNorm | None = None,
        swiglu: bool = False,
    ) -> torch.Tensor:
        from cai_runtime.kernels.triton import rms_norm
        from cai_runtime.kernels.triton import swiglu as swiglu_op
        from cai_runtime.kernels.triton.checks import check_activation, check_tensor

        check_activation("x", x, self.in_features * (2 if swiglu else 1))
        x = transformed(x, norm, swiglu, rms_norm, swiglu_op)
        y = contract_mpo(x, self._shape, self._cores)
        if residual is not None:
            check_tensor(
                "residual", residual, shape=tuple(y.shape), device=y.device, dtypes=(y.dtype,), unit_stride=False
            )
        if self._bias is not None:
            y = y + self._bias.to(y.dtype)
        return y if residual is None else y + residual


def prepare_linear(members: Sequence[LinearWeights], backend: str, int8_activations: bool = False) -> PreparedLinear:
    """backend: "triton" or "cuda". int8_activations: the input of every int8 core is rounded to int8 first."""
    if any(w.kind == "mpo" for w in members):
        parts = [
            GpuMpo(w, backend, int8_activations) if w.kind == "mpo" else prepare_linear([w], backend, int8_activations)
            for w in members
        ]
        return parts[0] if len(parts) == 1 else SideBySide(parts)
    if backend == "cuda":
        return CudaOrTritonLinear(members, int8_activations)
    from cai_runtime.kernels.triton.linear import TritonLinear

    return TritonLinear(members, int8_activations)
