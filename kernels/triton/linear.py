"""Slim linear layers: dense, lowrank and interpolative, alone or grouped over one input.

A linear is at most two stages, and every member of a group takes part in the same launches:

    stage 1   core_0 x      lowrank: to the intermediate z. interpolative: to z, and by pivot to y. dense: to y
    stage 2   core_1 z      lowrank: to y. interpolative: by pivot to the rest of y

Bias, residual and the scatter by pivot happen in the epilogue of the stage that owns the element of y. Products are
accumulated in float32 along one ascending chain over the input features. Quantized cores are dequantized in registers:
int8 integers are exact in every activation dtype, their row scale multiplies the accumulator. z is rounded to the
activation dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from cai_runtime.kernels.triton.checks import check_activation, check_tensor, check_weights, require, rows_contiguous
from cai_runtime.kernels.triton.launch import compile_options, operand_dtype

if TYPE_CHECKING:
    from cai_runtime.kernels.weights import Core, LinearWeights

GROUP = 3  # members per launch: q/k/v

# Where a product goes.
ABSENT, TO_Z, TO_Y, TO_BOTH = 0, 1, 2, 3


@triton.jit
def _product_tile(
    x, w, scale, index, bias, residual, z, y,
    M, N, K, ldx, ldw, ldr, ldz, ldy, z_col, y_col, first_row, first_col,
    TO: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of x [M, K] times w [N, K] transposed, and its epilogue."""
    rows = first_row + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    row_ok = rows < M
    col_ok = cols < N
    rows64 = rows.to(tl.int64)
    x_at = x + rows64[:, None] * ldx + ks[None, :]
    w_at = w + cols.to(tl.int64)[None, :] * ldw + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        k_ok = ks < K - k
        a = tl.load(x_at, mask=row_ok[:, None] & k_ok[None, :], other=0).to(COMPUTE)
        b = tl.load(w_at, mask=k_ok[:, None] & col_ok[None, :], other=0).to(COMPUTE)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K
    if scale is not None:
        acc = acc * tl.load(scale + cols, mask=col_ok, other=0.0)[None, :]
    ok = row_ok[:, None] & col_ok[None, :]
    if TO % 2 == 1:
        tl.store(z + rows64[:, None] * ldz + (z_col + cols)[None, :], acc.to(z.dtype.element_ty), mask=ok)
    if TO >= 2:
        if index is not None:
            out = tl.load(index + cols, mask=col_ok, other=0)
        else:
            out = cols
        if bias is not None:
            acc = acc + tl.load(bias + out, mask=col_ok, other=0).to(tl.float32)[None, :]
        if residual is not None:
            kept = residual + rows64[:, None] * ldr + (y_col + out)[None, :]
            acc = acc + tl.load(kept, mask=ok, other=0).to(tl.float32)
        tl.store(y + rows64[:, None] * ldy + (y_col + out)[None, :], acc.to(y.dtype.element_ty), mask=ok)


# Never specialized on M, so that a row's result can't depend on how many rows there are.
@triton.jit(do_not_specialize=["M"])
def products_kernel(
    x, residual, z, y, M, ldx, ldr, ldz, ldy,
    w0, scale0, index0, bias0, N0, K0, ldw0, x_col0, z_col0, y_col0,
    w1, scale1, index1, bias1, N1, K1, ldw1, x_col1, z_col1, y_col1,
    w2, scale2, index2, bias2, N2, K2, ldw2, x_col2, z_col2, y_col2,
    TO_0: tl.constexpr, TO_1: tl.constexpr, TO_2: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One stage of up to three members. Member g reads x[:, x_col_g : x_col_g + K_g] and w_g [N_g, K_g]; its columns
    of z start at z_col_g, those of y at y_col_g. Grid: (row tiles, column tiles of all members)."""
    first_row = tl.program_id(0) * BLOCK_M
    tile = tl.program_id(1)
    tiles0 = tl.cdiv(N0, BLOCK_N)
    if tile < tiles0:
        _product_tile(
            x + x_col0, w0, scale0, index0, bias0, residual, z, y,
            M, N0, K0, ldx, ldw0, ldr, ldz, ldy, z_col0, y_col0, first_row, tile * BLOCK_N,
            TO_0, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if TO_1 != 0:
        tile -= tiles0
        tiles1 = tl.cdiv(N1, BLOCK_N)
        if (tile >= 0) & (tile < tiles1):
            _product_tile(
                x + x_col1, w1, scale1, index1, bias1, residual, z, y,
                M, N1, K1, ldx, ldw1, ldr, ldz, ldy, z_col1, y_col1, first_row, tile * BLOCK_N,
                TO_1, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if TO_2 != 0:
            tile -= tiles1
            if tile >= 0:
                _product_tile(
                    x + x_col2, w2, scale2, index2, bias2, residual, z, y,
                    M, N2, K2, ldx, ldw2, ldr, ldz, ldy, z_col2, y_col2, first_row, tile * BLOCK_N,
                    TO_2, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """Shape of a program and how it is compiled. `block_k` depends on the compute dtype alone."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


DECODE_ROWS = 16  # up to here a launch is bound by reading the weights


def tile_for(rows: int, compute: torch.dtype) -> Tile:
    """Few rows: narrow tiles, so that many programs pull on memory. Many rows: wide tiles, for reuse, but of 32 rows only:
    64 would switch Hopper and Blackwell to wgmma and tcgen05, whose sums round differently."""
    if compute == torch.float32:
        return Tile(16, 32, 32, 4, 3) if rows <= DECODE_ROWS else Tile(32, 32, 32, 4, 3)
    return Tile(16, 16, 128, 2, 4) if rows <= DECODE_ROWS else Tile(32, 128, 128, 4, 2)


def compute_dtype(activation: torch.dtype, store: torch.dtype) -> torch.dtype:
    """The dtype that products are formed in: exact for both operands. Sums are always float32."""
    return activation if store in (activation, torch.int8) else torch.float32


@dataclass(frozen=True)
class _Product:
    """One member's part in one stage."""

    core: Core
    x_col: int
    to: int
    z_col: int = 0
    y_col: int = 0
    index: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def arguments(self) -> tuple[Any, ...]:
        data = self.core.data
        return (
            data, self.core.scale, self.index, self.bias,
            data.shape[0], data.shape[1], data.stride(0), self.x_col, self.z_col, self.y_col,
        )  # fmt: skip


_NO_MEMBER = (None, None, None, None, 0, 0, 0, 0, 0, 0)


def _launch(
    x: torch.Tensor,
    products: list[_Product],
    z: torch.Tensor | None,
    y: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """Run products that share a compute dtype, three to a launch."""
    products = [p for p in products if p.core.data.shape[0]]  # an interpolative core_1 is empty at full rank
    for compute in dict.fromkeys(compute_dtype(x.dtype, p.core.data.dtype) for p in products):
        alike = [p for p in products if compute_dtype(x.dtype, p.core.data.dtype) == compute]
        tile = tile_for(x.shape[0], compute)
        options = compile_options(tile.num_warps, tile.num_stages)
        for at in range(0, len(alike), GROUP):
            members = alike[at : at + GROUP]
            absent = GROUP - len(members)
            tiles = sum(triton.cdiv(p.core.data.shape[0], tile.block_n) for p in members)
            arguments = [a for p in members for a in p.arguments()]
            products_kernel[(triton.cdiv(x.shape[0], tile.block_m), tiles)](
                x, residual, z, y, x.shape[0], x.stride(0),
                residual.stride(0) if residual is not None else 0, z.stride(0) if z is not None else 0, y.stride(0),
                *arguments, *(_NO_MEMBER * absent),
                *(p.to for p in members), *((ABSENT,) * absent),
                operand_dtype(compute), tile.block_m, tile.block_n, tile.block_k, **options,
            )  # fmt: skip


def _run(x: torch.Tensor, ws: Sequence[LinearWeights], residual: torch.Tensor | None) -> torch.Tensor:
    y = torch.empty((x.shape[0], sum(w.out_features for w in ws)), dtype=x.dtype, device=x.device)
    if x.shape[0] == 0:
        return y
    x = rows_contiguous(x)
    first: list[_Product] = []
    second: list[_Product] = []
    z_col = y_col = 0
    for w in ws:
        if w.kind == "dense":
            first.append(_Product(w.cores[0], 0, TO_Y, y_col=y_col, bias=w.bias))
        elif w.kind == "lowrank":
            first.append(_Product(w.cores[0], 0, TO_Z, z_col))
            second.append(_Product(w.cores[1], z_col, TO_Y, y_col=y_col, bias=w.bias))
        else:
            assert w.pivot is not None and isinstance(w.rank, int)
            pivots, rest = w.pivot[: w.rank], w.pivot[w.rank :]
            first.append(_Product(w.cores[0], 0, TO_BOTH, z_col, y_col, pivots, w.bias))
            second.append(_Product(w.cores[1], z_col, TO_Y, y_col=y_col, index=rest, bias=w.bias))
        if w.kind != "dense":
            assert isinstance(w.rank, int)
            z_col += -(-w.rank // 16) * 16  # every member's z starts on 16 elements, for wide loads
        y_col += w.out_features
    z = torch.empty((x.shape[0], z_col), dtype=x.dtype, device=x.device) if z_col else None
    with torch.cuda.device_of(x):
        _launch(x, first, z, y, residual)
        if z is not None:
            _launch(z, second, None, y, residual)
    return y


def slim_linear(x: torch.Tensor, w: LinearWeights, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`w` applied to `x`, plus bias and residual.

    Args:
        x: [M, in_features], float32, bfloat16 or float16, any strides; M may be 0.
        w: dense, lowrank or interpolative, on x's device; cores float32, bfloat16, float16, or int8 with one scale per
            row; bias of any activation dtype.
        residual: [M, out_features] of x's dtype, added before the one rounding of the result.

    Returns:
        [M, out_features] in x's dtype, newly allocated. A row's bits do not depend on M.

    Raises:
        KernelError: a shape, dtype, device or kind is not as above; names the argument.
    """
    return grouped_linear(x, (w,), residual)


def grouped_linear(x: torch.Tensor, ws: Sequence[LinearWeights], residual: torch.Tensor | None = None) -> torch.Tensor:
    """Several linears of one input: q, k and v, or gate and up, in the launches of one.

    Args:
        x: [M, in_features], as for `slim_linear`.
        ws: one or more linears with x's in_features; kinds, ranks and stores may differ.
        residual: [M, sum of out_features] of x's dtype, added before the one rounding of the result.

    Returns:
        [M, sum of out_features], member after member; each member's part has the bits that `slim_linear` gives.

    Raises:
        KernelError: as `slim_linear`.
    """
    require(len(ws) > 0, "ws must hold at least one linear")
    for i, w in enumerate(ws):
        check_activation("x", x, w.in_features)
        check_weights(w, x.device, "w" if len(ws) == 1 else f"ws[{i}]")
    if residual is not None:
        wanted = (x.shape[0], sum(w.out_features for w in ws))
        check_tensor("residual", residual, shape=wanted, device=x.device, dtypes=(x.dtype,))
    return _run(x, ws, residual)
