"""Slim linear layers: dense, lowrank and interpolative, alone or grouped over one input.

A linear is at most two stages, and every member of a group takes part in the same launches:

    stage 1   core_0 x      lowrank: to the intermediate z. interpolative: to z, and by pivot to y. dense: to y
    stage 2   core_1 z      lowrank: to y. interpolative: by pivot to the rest of y

Bias, residual and the scatter by pivot happen in the epilogue of the stage that owns the element of y; a norm before the
linear happens where stage 1 reads x. z is rounded to the activation dtype. The sums are in `products.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from cai_runtime.errors import KernelError
from cai_runtime.kernels.norm import LayerNorm, RmsNorm
from cai_runtime.kernels.slim_linear import Linear, Prologue
from cai_runtime.kernels.triton import products as p
from cai_runtime.kernels.triton.checks import (
    ACTIVATIONS,
    check_activation,
    check_tensor,
    check_weights,
    require,
    rows_contiguous,
)
from cai_runtime.kernels.triton.dependent import dependent_options
from cai_runtime.kernels.triton.launch import compile_options, on_device, operand_dtype
from cai_runtime.kernels.triton.plan import Input, Member, Plan, TileChoice
from cai_runtime.kernels.triton.rows import rms_norm, swiglu
from cai_runtime.kernels.triton.tiles import DECODE_ROWS, Products, block_k, default_tile
from cai_runtime.kernels.triton.tuning import tile_for
from cai_runtime.kernels.weights import LinearWeights

# Stores whose decode loop has time for a norm between its reads. Compiled for sm_90, a step of it grows from 111
# instructions to 194 for bf16, from 198 to 334 for int8 and from 307 to 490 for int4: the latter would wait for that.
NORM_IN_LAUNCH = frozenset({"fp32", "bf16"})
INT8_FEATURES = (2**31 - 1) // 127**2  # a sum of so many products of int8 always fits in int32


class TritonLinear(Linear):
    """Linears that share their input, checked and made ready to run together.

    members: dense, lowrank or interpolative, on one device; cores float32, bfloat16, float16, int8 with one scale per row,
    or int4; biases of any activation dtype; kinds, ranks and stores may differ. Zero points, and tensors whose rows are
    not whole 16 bytes, are copied, others shared: they must not change. int8_activations: the input of every int8 core is
    rounded to int8 first, see `cai_runtime.kernels.quantized_rows`. tiles: chooses the shape of programs; no tile changes
    a bit.

    A call takes x [M, in_features] ([M, 2 in_features] with swiglu), float32, bfloat16 or float16, with any strides; M may
    be 0. residual: [M, out_features] of x's dtype, added before the one rounding of the result. norm: its weight is
    [in_features], of any activation dtype. swiglu: silu(gate) * up is rounded to x's dtype. The result is a new tensor in
    x's dtype. A row's bits do not depend on M.

    Raises KernelError for a shape, dtype, device or kind that is not as above; names the member or the argument.
    """

    def __init__(
        self, members: Sequence[LinearWeights], int8_activations: bool = False, *, tiles: TileChoice = tile_for
    ):
        require(len(members) > 0, "ws must hold at least one linear")
        self.device = members[0].cores[0].data.device
        self.in_features = members[0].in_features
        self.out_features = sum(w.out_features for w in members)
        for i, w in enumerate(members):
            name = "w" if len(members) == 1 else f"ws[{i}]"
            require(w.in_features == self.in_features, f"{name} takes {w.in_features} features, not {self.in_features}")
            check_weights(w, self.device, name)
            widest = max(c.shape[1] for c in w.cores)
            if int8_activations and widest > INT8_FEATURES:
                raise KernelError(f"{name}: int8 activations take up to {INT8_FEATURES} features, not {widest}")
        self._int8_activations, self._tiles = int8_activations, tiles
        self._members = [Member.of(w) for w in members]
        self._plans: dict[torch.dtype, Plan] = {}

    def _run(self, x: torch.Tensor, prologue: Prologue, residual: torch.Tensor | None) -> torch.Tensor:
        norm, swiglu = prologue.norm, prologue.swiglu
        assert not isinstance(norm, LayerNorm)  # torch's functions came before, see `Linear`
        check_activation("x", x, self.in_features * (2 if swiglu else 1))
        if x.device != self.device:
            raise KernelError(f"x is on {x.device}, expected {self.device}: the weights are there")
        rows = x.shape[0]
        if residual is not None:
            shape = (rows, self.out_features)
            check_tensor("residual", residual, shape=shape, device=x.device, dtypes=(x.dtype,), unit_stride=False)
            residual = rows_contiguous(residual)
        if norm is not None:
            check_tensor("norm.weight", norm.weight, shape=(self.in_features,), device=x.device, dtypes=ACTIVATIONS)
        y = torch.empty((rows, self.out_features), dtype=x.dtype, device=x.device)
        if rows == 0:
            return y
        plan = self._plans.get(x.dtype)
        if plan is None:
            plan = self._plans[x.dtype] = Plan(self._members, x.dtype, self._int8_activations, self._tiles)
        z = torch.empty((rows, plan.z_columns), dtype=x.dtype, device=x.device) if plan.z_columns else None
        with on_device(x):
            plan.first(_source(rows_contiguous(x), plan, norm, swiglu), z, y, residual)
            if z is not None:
                plan.second(Input(z), None, y, residual)
        return y


def _source(x: torch.Tensor, plan: Plan, norm: RmsNorm | None, gate: bool) -> Input:
    """x with its prologue, within the launch or by a kernel of its own; for a given linear, the same bits with any rows.

    RMSNorm: within the launch for the stores of NORM_IN_LAUNCH. Every column tile forms the sums of squares again, next to
    nothing while the time is that of reading the weights; with many rows, one kernel forms them for all. By a kernel of its
    own for the other stores; in float16, where x times the norm's weight could overflow before it is divided by the RMS;
    before int8 rounding, which needs a row's peak first; and where launches differ in compute dtype.

    SwiGLU: by a kernel of its own. Every column tile would form it again, in tiles of 16 rows whatever there are: compiled
    for sm_90, a step of the bf16 decode loop grows from 111 instructions to 631, and the time that takes is more than that
    of the launch it saves.
    """
    if gate:
        return Input(swiglu(x))
    if norm is None:
        return Input(x)
    eps = float(norm.eps)
    first = plan.first
    if first.computes != {x.dtype} or not first.stores <= NORM_IN_LAUNCH or x.dtype == torch.float16:
        return Input(rms_norm(x, norm.weight, eps))
    if x.shape[0] <= DECODE_ROWS:
        return Input(x, p.NORM.value, norm.weight, None, eps)
    return Input(x, p.FACTOR.value, norm.weight, inverse_rms(x, eps), eps)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row, fp32 [M], with the bits that a launch with few rows forms for itself. x [M, K]
    with contiguous rows. Not checked."""
    rows, width = x.shape
    factor = torch.empty(rows, dtype=torch.float32, device=x.device)
    tile = default_tile(Products(False, x.dtype, "", 0, width, width, x.device))
    p.factor_kernel[(triton.cdiv(rows, tile.block_m),)](
        x, factor, rows, width, x.stride(0), eps, operand_dtype(x.dtype), tile.block_m, block_k(x.dtype, 0),
        **compile_options(tile.num_warps, tile.num_stages), **dependent_options(x.device),
    )  # fmt: skip
    return factor


def slim_linear(x: torch.Tensor, w: LinearWeights, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`w` applied to `x` [M, in_features], plus bias and residual: a `TritonLinear` for one call, with its arguments and
    errors. Prepares the weights every time: for tests and one-offs."""
    return TritonLinear((w,))(x, residual)


def grouped_linear(x: torch.Tensor, ws: Sequence[LinearWeights], residual: torch.Tensor | None = None) -> torch.Tensor:
    """Several linears of one input, q, k and v, or gate and up, side by side; each member's part has the bits that
    `slim_linear` gives. As `slim_linear` otherwise."""
    return TritonLinear(ws)(x, residual)
