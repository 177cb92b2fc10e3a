"""Row-wise operations: RMSNorm (Zhang and Sennrich 2019), the same after a residual add, and SwiGLU (Shazeer 2020).

One program per row; the row is read in blocks whose width depends on the row's width alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cai_runtime.kernels.triton.checks import ACTIVATIONS, check_activation, check_tensor, require, rows_contiguous
from cai_runtime.kernels.triton.dependent import dependent_options, wait_for_previous_kernel
from cai_runtime.kernels.triton.launch import on_device

MAX_BLOCK = 8192


@triton.jit
def rms_norm_kernel(
    x, residual, weight, normed, total, width, ldx, ldr, ldn, ldt, eps,
    BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """normed = x * rsqrt(mean(x^2) + eps) * weight in float32; with a residual, of x + residual, rounded and kept in
    `total`."""
    wait_for_previous_kernel(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    x += row * ldx
    normed += row * ldn
    if residual is not None:
        residual += row * ldr
        total += row * ldt
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    at = tl.arange(0, BLOCK)
    if ONE_BLOCK:
        ok = at < width
        v = tl.load(x + at, mask=ok, other=0).to(tl.float32)
        if residual is not None:
            v += tl.load(residual + at, mask=ok, other=0).to(tl.float32)
            rounded = v.to(total.dtype.element_ty)
            tl.store(total + at, rounded, mask=ok)
            v = rounded.to(tl.float32)
        factor = tl.rsqrt(tl.sum(v * v, axis=0) / width + eps)
        g = tl.load(weight + at, mask=ok, other=0).to(tl.float32)
        tl.store(normed + at, (v * factor * g).to(normed.dtype.element_ty), mask=ok)
    else:
        for start in range(0, width, BLOCK):
            ok = start + at < width
            v = tl.load(x + start + at, mask=ok, other=0).to(tl.float32)
            if residual is not None:
                v += tl.load(residual + start + at, mask=ok, other=0).to(tl.float32)
                rounded = v.to(total.dtype.element_ty)
                tl.store(total + start + at, rounded, mask=ok)
                v = rounded.to(tl.float32)
            squares += v * v
        factor = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
        for start in range(0, width, BLOCK):
            ok = start + at < width
            v = tl.load(x + start + at, mask=ok, other=0).to(tl.float32)
            if residual is not None:
                # Formed anew rather than read back: another thread of the program may hold the stored element.
                v += tl.load(residual + start + at, mask=ok, other=0).to(tl.float32)
                v = v.to(total.dtype.element_ty).to(tl.float32)
            g = tl.load(weight + start + at, mask=ok, other=0).to(tl.float32)
            tl.store(normed + start + at, (v * factor * g).to(normed.dtype.element_ty), mask=ok)


@triton.jit
def swiglu_kernel(gate_up, out, width, ldg, ldo, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """out = silu(gate) * up in float32. Grid: (rows, blocks of the width)."""
    wait_for_previous_kernel(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = at < width
    gate = tl.load(gate_up + row * ldg + at, mask=ok, other=0).to(tl.float32)
    up = tl.load(gate_up + row * ldg + width + at, mask=ok, other=0).to(tl.float32)
    tl.store(out + row * ldo + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=ok)


def _norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    check_activation("x", x)
    rows, width = x.shape
    require(width > 0, "x must have at least one column")
    require(eps >= 0, f"eps must not be negative, is {eps}")
    check_tensor("weight", weight, shape=(width,), device=x.device, dtypes=ACTIVATIONS)
    x = rows_contiguous(x)
    total = None
    if residual is not None:
        check_tensor("residual", residual, shape=(rows, width), device=x.device, dtypes=(x.dtype,), unit_stride=False)
        residual = rows_contiguous(residual)
        total = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    normed = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows == 0:
        return normed, total
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    with on_device(x):
        rms_norm_kernel[(rows,)](
            x, residual, weight, normed, total, width,
            x.stride(0), residual.stride(0) if residual is not None else 0, width, width, float(eps),
            block, width <= block, num_warps=max(1, min(8, block // 512)), **dependent_options(x.device),
        )  # fmt: skip
    return normed, total


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded once.

    Args:
        x: [M, H], float32, bfloat16 or float16, any strides; M may be 0.
        weight: [H], any activation dtype.
        eps: added to the mean square.

    Returns:
        [M, H] in x's dtype.

    Raises:
        KernelError: a shape, dtype or device is not as above; names the argument.
    """
    return _norm(x, None, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual add and the norm that follows it, in one pass.

    Args:
        x: [M, H] as in `rms_norm`.
        residual: [M, H] of x's dtype.
        weight: [H], any activation dtype.
        eps: added to the mean square.

    Returns:
        (normed, sum), both [M, H] in x's dtype: sum = x + residual rounded, normed = rms_norm(sum).

    Raises:
        KernelError: a shape, dtype or device is not as above; names the argument.
    """
    require(isinstance(residual, torch.Tensor), "residual must be a tensor")
    normed, total = _norm(x, residual, weight, eps)
    assert total is not None
    return normed, total


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, in float32, rounded once.

    Args:
        gate_up: [M, 2 I], gate in the first half of the columns; float32, bfloat16 or float16; M may be 0.

    Returns:
        [M, I] in gate_up's dtype.

    Raises:
        KernelError: a shape or dtype is not as above.
    """
    check_activation("gate_up", gate_up)
    rows, width = gate_up.shape
    require(width > 0 and width % 2 == 0, f"gate_up must have an even number of columns, has {width}")
    gate_up = rows_contiguous(gate_up)
    width //= 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(triton.next_power_of_2(width), 1024)
        with on_device(gate_up):
            swiglu_kernel[(rows, triton.cdiv(width, block))](
                gate_up,
                out,
                width,
                gate_up.stride(0),
                width,
                block,
                num_warps=4,
                **dependent_options(gate_up.device),
            )
    return out
