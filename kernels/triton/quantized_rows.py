"""int8 activations: rows rounded to int8 with a scale of their own (`cai_runtime.kernels.quantized_rows` is the reference).

The peak of a row is exact in any order, so codes and scale depend on the row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cai_runtime.kernels.triton.checks import check_activation, require, rows_contiguous
from cai_runtime.kernels.triton.launch import on_device

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it to a small float32 rounds that to an integer, halves to even


@triton.jit
def peak_of(x):
    """max|x|, in float32; NaN if there is one."""
    wide = tl.abs(x.to(tl.float32))
    broken = tl.max((wide != wide).to(tl.int32), axis=0) > 0  # a reduction may leave NaN out
    return tl.where(broken, float("nan"), tl.max(wide, axis=0))


@triton.jit
def codes_in(peak):
    """127 / peak: codes in a unit of what has this peak; 0 where that is nothing."""
    return tl.where(peak > 0, tl.div_rn(127.0, tl.where(peak > 0, peak, 1.0)), 0.0)


@triton.jit
def quantize_rows_kernel(x, codes, scales, starts, widths, ldx, ldc, lds, BLOCK: tl.constexpr):
    """codes[r, c] = x[r, c] / scale, for each slice of columns; the slice that starts at column c has its scale at
    scales[r, c / 16]. Grid: (rows, slices). Compiled without fused multiply-add, which would round halves differently."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + tl.program_id(1))
    width = tl.load(widths + tl.program_id(1))
    x += row * ldx + start
    codes += row * ldc + start
    at = tl.arange(0, BLOCK)
    peaks = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, width, BLOCK):
        v = tl.load(x + begin + at, mask=begin + at < width, other=0).to(tl.float32)
        peaks = tl.maximum(peaks, tl.abs(v), propagate_nan=tl.PropagateNan.ALL)
    peak = peak_of(peaks)  # a NaN must not vanish in the rounding
    inverse = codes_in(peak)
    tl.store(scales + row * lds + start // 16, tl.div_rn(peak, 127.0))
    for begin in range(0, width, BLOCK):
        ok = begin + at < width
        v = tl.load(x + begin + at, mask=ok, other=0).to(tl.float32) * inverse
        tl.store(codes + begin + at, ((v + ROUND) - ROUND).to(tl.int8), mask=ok)


def quantize_slices(x: torch.Tensor, starts: torch.Tensor, widths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], contiguous rows, K a multiple of 16 unless one slice is all -> codes int8 [M, K to a multiple of 16] and
    scales fp32 [M, that / 16], slice by slice (int32 [n] each, starts multiples of 16). Not checked."""
    rows, columns = x.shape[0], -(-x.shape[1] // 16) * 16
    codes = torch.empty((rows, columns), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows, columns // 16), dtype=torch.float32, device=x.device)
    if rows:
        with on_device(x):
            quantize_rows_kernel[(rows, starts.shape[0])](
                x, codes, scales, starts, widths, x.stride(0), columns, columns // 16,
                BLOCK=min(1024, triton.next_power_of_2(columns)), num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return codes, scales


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> codes int8 [M, K] in -127 to 127 and scale fp32 [M], so that x is about codes * scale[:, None].

    x: float32, bfloat16 or float16, any strides, K at least 1; M may be 0. A row of zeros has scale 0 and codes 0. Raises
    KernelError for anything else.
    """
    check_activation("x", x)
    require(x.shape[1] > 0, "x must have at least one column")
    bounds = torch.tensor([0, x.shape[1]], dtype=torch.int32, device=x.device)
    codes, scales = quantize_slices(rows_contiguous(x), bounds[:1], bounds[1:])
    return codes[:, : x.shape[1]], scales[:, 0]
