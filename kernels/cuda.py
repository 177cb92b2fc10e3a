"""The CUDA backend: slim linears of bfloat16 or float16 activations, in C++ (csrc/cuda), on Hopper and later.

The library is built by setup.py when nvcc finds a GPU or `CAI_CUDA_ARCHS` names architectures, and is loaded on first use.

A group of linears is one launch for its first cores and one for its second. Two launches rather than one with a barrier
across the grid: every output of the second needs all of the first, so either way its blocks wait for the slowest of the
others, about a microsecond; programmatic dependent launch lets them wait with their weights already on the way, as a barrier
would, and needs no grid that fits the device at once. Up to 16 rows the norm or the gate is inside the first launch; with
more it is a launch ahead, which lays the rows out as the tensor cores read them.

Cores are packed when a `CudaLinear` is made (`cuda_packing.py`). A row's bits do not depend on how many rows there are: the
kernels of few and of many rows form the same sums in the same order. They are not the bits of the Triton kernels.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels.cuda_packing import BLOCK, STORES, pack
from cai_runtime.kernels.slim_linear import Linear, Prologue
from cai_runtime.kernels.weights import LinearWeights

FEW_ROWS = 16  # that the decode kernel takes, which reads the weights once for all
FUSED_SWIGLU_ROWS = 4  # more rows than this are gated once, by a launch of their own: every cluster gates them again
MOST_ROWS = 1 << 20
ACTIVATIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class CudaOptions:
    """How launches are made; for measurements: results do not depend on it.

    dependent_launch: programmatic dependent launch. fused_swiglu_rows: up to how many of FEW_ROWS the gate is applied inside
    the linear rather than by a launch before.
    """

    dependent_launch: bool = True
    fused_swiglu_rows: int = FUSED_SWIGLU_ROWS


default_options = CudaOptions()  # of every CudaLinear that is not given its own


def library_path() -> Path:
    """Where the build puts the library, whether it is there or not."""
    return Path(str(importlib.resources.files("cai_runtime") / "_lib" / "libcai_cuda.so"))


def available() -> bool:
    """Whether the library is built and torch sees an NVIDIA GPU that has what it needs: compute capability 9.0 or later."""
    if not library_path().exists() or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability()[0] >= 9


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


def takes(members: Sequence[LinearWeights], dtype: torch.dtype) -> bool:
    """Whether there are kernels for these weights and activations of this dtype: 16-bit cores must be of it."""
    stores = {c.store for w in members for c in w.cores}
    return dtype in ACTIVATIONS and stores <= {ACTIVATIONS[dtype], "int8", "int4"}


class CudaLinear(Linear):
    """A group of linears over one input, ready to run: their cores are packed, and handed to the library once.

    members: dense, lowrank or interpolative, on one CUDA device, cores bf16, fp16, int8 or int4, biases float32. Packed
    cores are copies; pivots, biases and scales are kept alive. options: None for `default_options` at each call.

    A call takes x [M, in_features] ([M, 2 in_features] with swiglu), any M, bfloat16 or float16: the dtype of the 16-bit
    cores, if there are any (`takes`). It gives a new tensor [M, out_features] in x's dtype; a row's bits do not depend on M.
    Scratch: of a row about x and the intermediate z. Its launches go to torch's current stream; a CUDA graph can capture
    them.

    Raises KernelError when the library is missing or a tensor does not fit; a call, for any other x, residual or norm.
    """

    device_type = "cuda"  # another where the tests put a library for another device

    def __init__(self, members: Sequence[LinearWeights], options: CudaOptions | None = None):
        from cai_runtime.kernels.triton.checks import require

        require(len(members) > 0, "a group of linears needs at least one member")
        self._options = options
        self.device = members[0].cores[0].data.device
        require(
            self.device.type == self.device_type,
            f"the CUDA kernels need weights on a CUDA device, these are on {self.device}",
        )
        self.in_features = members[0].in_features
        self.out_features = sum(w.out_features for w in members)
        self._takes = {dtype: takes(members, dtype) for dtype in ACTIVATIONS}
        tensors: list[torch.Tensor | None] = []
        numbers: list[int] = []
        self._z_columns = 0
        for i, w in enumerate(members):
            require(
                w.in_features == self.in_features,
                f"members[{i}] takes {w.in_features} features, not {self.in_features}",
            )
            _check_member(w, self.device, f"members[{i}]")
            w = _in_order_of_outputs(w)
            for core in (*w.cores, None)[:2]:
                packed = None if core is None else pack(core)
                tensors += [None, None] if packed is None else [packed.data, packed.scale]
                numbers += [0] * 5 if packed is None else packed.description
            tensors += [w.pivot if w.kind == "interpolative" else None, w.bias]
            if w.kind != "dense":
                self._z_columns += -(-(w.rank or 0) // BLOCK) * BLOCK
        found = library()
        self._linear, self._swiglu, self._scratch_bytes = found.linear, found.swiglu, found.scratch_bytes
        if self.device.type == "cuda":
            # A kernel asks for its weights before it waits for the kernel ahead of it, which might be one that packs them.
            torch.cuda.current_stream(self.device).synchronize()
        self._members, self._numbers = _as_ffi_arrays(tensors, numbers)

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether activations of this dtype go through these kernels."""
        return self._takes.get(dtype, False)

    def _run(self, x: torch.Tensor, prologue: Prologue, residual: torch.Tensor | None) -> torch.Tensor:
        from cai_runtime.kernels.triton.checks import check_activation, check_tensor, require, rows_contiguous

        norm, swiglu = prologue.norm, prologue.swiglu
        check_activation("x", x, self.in_features * (2 if swiglu else 1))
        require(x.device == self.device, f"x is on {x.device}, the weights on {self.device}")
        if not self.takes(x.dtype):
            taken = " or ".join(str(d) for d in ACTIVATIONS if self.takes(d)) or "none"
            raise KernelError(f"x is {x.dtype}; these CUDA linears take {taken}: use triton")
        rows = x.shape[0]
        require(rows <= MOST_ROWS, f"x has {rows} rows; the CUDA linears take up to {MOST_ROWS} at once")
        y = torch.empty((rows, self.out_features), dtype=x.dtype, device=x.device)
        if residual is not None:
            check_tensor("residual", residual, shape=tuple(y.shape), device=x.device, dtypes=(x.dtype,))
        if norm is not None:
            check_tensor(
                "norm.weight", norm.weight, shape=(self.in_features,), device=x.device,
                dtypes=(torch.float32, torch.bfloat16, torch.float16),
            )  # fmt: skip
        if rows == 0:
            return y
        x = rows_contiguous(x)
        options = self._options or default_options
        dependent = options.dependent_launch
        # The kernel multiplies x by the norm's weight before it knows the root mean square: a half could overflow.
        if norm is not None and not (x.dtype == norm.weight.dtype == torch.bfloat16):
            from cai_runtime.kernels.triton import rms_norm

            x, norm = rms_norm(x, norm.weight, norm.eps), None
        if swiglu and options.fused_swiglu_rows < rows <= FEW_ROWS:
            gated = torch.empty((rows, self.in_features), dtype=x.dtype, device=x.device)
            self._swiglu(x, gated, dependent)
            x, swiglu = gated, False
        nbytes = int(self._scratch_bytes(rows, self.in_features, self._z_columns))
        scratch = torch.empty(nbytes, dtype=torch.uint8, device=x.device)
        weight, eps = (None, 0.0) if norm is None else (norm.weight, float(norm.eps))
        self._linear(x, residual, y, scratch, weight, eps, swiglu, dependent, self._members, self._numbers)
        return y


def _in_order_of_outputs(w: LinearWeights) -> LinearWeights:
    """The same linear with the rows of core_1 in the order of the outputs they make: a warp's results lie together."""
    if w.kind != "interpolative":
        return w
    assert w.pivot is not None
    rank, second = w.cores[0].shape[0], w.cores[1]
    order = torch.argsort(w.pivot[rank:])
    scale, zero = (None if t is None else t[order] for t in (second.scale, second.zero))
    core = replace(second, data=second.data[order], scale=scale, zero=zero)
    return replace(w, cores=(w.cores[0], core), pivot=torch.cat([w.pivot[:rank], w.pivot[rank:][order]]))


def _check_member(w: LinearWeights, device: torch.device, name: str) -> None:
    """The library's own checks, with the member's name in the errors. LinearWeights and Core have checked the shapes."""
    from cai_runtime.kernels.triton.checks import check_tensor, require

    kinds = ("dense", "lowrank", "interpolative")
    require(w.kind in kinds, f"{name}.kind {w.kind!r} has no CUDA kernel: {', '.join(kinds)} have")
    require(w.in_features > 0 and w.out_features > 0, f"{name} has {w.in_features} inputs, {w.out_features} outputs")
    for i, c in enumerate(w.cores):
        at = f"{name}.cores[{i}]"
        require(c.store in STORES, f"{at} is stored as {c.store}, which has no CUDA kernel: {', '.join(STORES)} have")
        require(c.store != "int8" or c.scale is not None, f"{at} is int8 and has no scale: one fp32 scale per row")
        require(
            c.scale is None or c.store in ("int8", "int4"), f"{at} is {c.store} and has a scale: only int8 and int4 do"
        )
        shape = tuple(c.data.shape)
        check_tensor(f"{at}.data", c.data, shape=shape, device=device, dtypes=(c.data.dtype,))
        if c.scale is not None:
            dtype = torch.bfloat16 if c.is_int4 else torch.float32
            check_tensor(f"{at}.scale", c.scale, shape=tuple(c.scale.shape), device=device, dtypes=(dtype,))
        if c.zero is not None:
            check_tensor(f"{at}.zero", c.zero, shape=tuple(c.zero.shape), device=device, dtypes=(torch.uint8,))
    require(w.kind == "dense" or (w.rank or 0) > 0, f"{name}.rank must be positive, not {w.rank!r}")
    if w.kind == "interpolative":
        assert w.pivot is not None
        check_tensor(f"{name}.pivot", w.pivot, shape=(w.out_features,), device=device, dtypes=(torch.int32,))
    if w.bias is not None:
        check_tensor(f"{name}.bias", w.bias, shape=(w.out_features,), device=device, dtypes=(torch.float32,))


def _as_ffi_arrays(tensors: Sequence[torch.Tensor | None], numbers: Sequence[int]) -> tuple[Any, Any]:
    """As objects of the FFI, which share the tensors' memory and keep it alive."""
    import tvm_ffi

    shared = [None if t is None else tvm_ffi.from_dlpack(t.detach()) for t in tensors]
    return tvm_ffi.convert(shared), tvm_ffi.convert(list(numbers))


def slim_linear(x: torch.Tensor, w: LinearWeights, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`w` applied to x [M, in_features], plus bias and residual. Prepares the weights on every call: for tests
    and one-offs; elsewhere keep a `CudaLinear`. Raises KernelError as `CudaLinear` does."""
    return CudaLinear((w,))(x, residual)


def grouped_linear(x: torch.Tensor, ws: Sequence[LinearWeights], residual: torch.Tensor | None = None) -> torch.Tensor:
    """Several linears of one input, side by side; as `slim_linear`."""
    return CudaLinear(ws)(x, residual)
