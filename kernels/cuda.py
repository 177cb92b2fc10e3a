"""The CUDA backend: slim linears at decode, 1 to 16 rows, in C++ (csrc/cuda).

The library is built by setup.py when nvcc finds a GPU or `CAI_CUDA_ARCHS` names architectures, and is loaded on first use.

A row's bits do not depend on how many rows there are, up to 16. They are not the bits of the Triton kernels, which sum by
matrix instructions: a caller that promises batch invariance takes a sequence's prompt and its decode through the same one.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.errors import KernelError

if TYPE_CHECKING:
    import torch

    from cai_runtime.kernels.weights import LinearWeights

MAX_ROWS = 16


def library_path() -> Path:
    """Where the build puts the library, whether it is there or not."""
    return Path(str(importlib.resources.files("cai_runtime") / "_lib" / "libcai_cuda.so"))


def available() -> bool:
    """Whether the library is built and torch sees an NVIDIA GPU."""
    if not library_path().exists():
        return False
    import torch

    return torch.cuda.is_available() and torch.version.hip is None


@functools.cache
def library() -> Any:
    """The loaded library. Raises KernelError when it is not built or can't be loaded."""
    path = library_path()
    if not path.exists():
        raise KernelError(
            f"the CUDA kernels are not built ({path} is missing): install the CUDA toolkit and reinstall cai-runtime, with "
            "CAI_CUDA_ARCHS set where no GPU is visible"
        )
    import tvm_ffi

    try:
        return tvm_ffi.load_module(str(path))
    except (OSError, RuntimeError) as error:
        raise KernelError(f"the CUDA kernels in {path} can't be loaded: {error}") from error


class CudaLinear:
    """A group of linears over one input, ready to run: their tensors are handed to the library once.

    members: dense, lowrank or interpolative, on one CUDA device, biases float32. The tensors are kept alive.
    Raises KernelError when the library is missing or a tensor does not fit.
    """

    def __init__(self, members: Sequence[LinearWeights]):
        import torch

        from cai_runtime.kernels.triton.checks import check_weights, require

        require(len(members) > 0, "a group of linears needs at least one member")
        self.device = members[0].cores[0].data.device
        require(
            self.device.type == "cuda", f"the CUDA kernels need weights on a CUDA device, these are on {self.device}"
        )
        self.in_features = members[0].in_features
        self.out_features = sum(w.out_features for w in members)
        tensors: list[torch.Tensor | None] = []
        self._z_columns = 0
        for i, w in enumerate(members):
            name = f"members[{i}]"
            require(w.in_features == self.in_features, f"{name} takes {w.in_features} features, not {self.in_features}")
            check_weights(w, self.device, name)
            require(w.bias is None or w.bias.dtype == torch.float32, f"{name}.bias must be float32")
            for core in (*w.cores, None)[:2]:
                tensors += [None, None] if core is None else [core.data, core.scale]
            tensors += [w.pivot if w.kind == "interpolative" else None, w.bias]
            if w.kind != "dense":
                self._z_columns += -(-(w.rank or 0) // 16) * 16
        self._run = library().decode_linear
        self._members = _as_ffi_array(tensors)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [M, in_features] -> [M, out_features], the members side by side, plus `residual` of the same shape and dtype.

        M is 0 to 16; x is float32, bfloat16 or float16. The result is newly allocated, in x's dtype; the launches go to
        torch's current stream. Raises KernelError for any other argument.
        """
        import torch

        from cai_runtime.kernels.triton.checks import check_activation, check_tensor, require, rows_contiguous

        check_activation("x", x, self.in_features)
        require(x.device == self.device, f"x is on {x.device}, the weights on {self.device}")
        rows = x.shape[0]
        require(
            rows <= MAX_ROWS, f"x has {rows} rows; the CUDA decode kernel takes up to {MAX_ROWS}: use triton for more"
        )
        y = torch.empty((rows, self.out_features), dtype=x.dtype, device=x.device)
        if residual is not None:
            check_tensor("residual", residual, shape=tuple(y.shape), device=x.device, dtypes=(x.dtype,))
        if rows == 0:
            return y
        z = torch.empty((rows, self._z_columns), dtype=x.dtype, device=x.device) if self._z_columns else None
        self._run(rows_contiguous(x), residual, y, z, self._members)
        return y


def _as_ffi_array(tensors: Sequence[torch.Tensor | None]) -> Any:
    """The tensors as one object of the FFI, which shares their memory and keeps it alive."""
    import tvm_ffi

    return tvm_ffi.convert([None if t is None else tvm_ffi.from_dlpack(t.detach()) for t in tensors])


def slim_linear(x: torch.Tensor, w: LinearWeights, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`w` applied to x [M, in_features], M up to 16, plus bias and residual. Prepares the weights on every call: for tests
    and one-offs; elsewhere keep a `CudaLinear`. Raises KernelError as `CudaLinear` does."""
    return CudaLinear((w,))(x, residual)


def grouped_linear(x: torch.Tensor, ws: Sequence[LinearWeights], residual: torch.Tensor | None = None) -> torch.Tensor:
    """Several linears of one input, side by side; as `slim_linear`."""
    return CudaLinear(ws)(x, residual)
