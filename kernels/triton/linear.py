"""Slim linear layers: dense, lowrank and interpolative, alone or grouped over one input.

A linear is at most two stages, and every member of a group takes part in the same launches:

    stage 1   core_0 x      lowrank: to the intermediate z. interpolative: to z, and by pivot to y. dense: to y
    stage 2   core_1 z      lowrank: to y. interpolative: by pivot to the rest of y

Bias, residual and the scatter by pivot happen in the epilogue of the stage that owns the element of y; a norm before the
linear happens where stage 1 reads x. z is rounded to the activation dtype. The sums are in `products.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton

from cai_runtime.errors import KernelError
from cai_runtime.kernels.triton import products as p
from cai_runtime.kernels.triton.checks import (
    ACTIVATIONS,
    check_activation,
    check_tensor,
    check_weights,
    require,
    rows_contiguous,
)
from cai_runtime.kernels.triton.launch import (
    Launcher,
    compile_options,
    number_class,
    on_device,
    operand_dtype,
    pointer_class,
)
from cai_runtime.kernels.triton.quantized_rows import quantize_slices
from cai_runtime.kernels.triton.rows import rms_norm, swiglu
from cai_runtime.kernels.triton.tiles import DECODE_ROWS, block_k, default_tile

if TYPE_CHECKING:
    from cai_runtime.kernels.norm import RmsNorm
    from cai_runtime.kernels.weights import Core, LinearWeights

MEMBERS = 3  # per launch: q/k/v
GATED_ROWS = (
    4  # up to here a product gates its own input; beyond, forming silu in every column tile costs more than a launch
)
INT8_FEATURES = (2**31 - 1) // 127**2  # a sum of so many products of int8 always fits in int32


def compute_dtype(activation: torch.dtype, store: str) -> torch.dtype:
    """The dtype that products are formed in: exact for both operands. Sums are always float32."""
    own = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[activation]
    return activation if store in (own, "int8", "int4") else torch.float32


def padded_rows(data: torch.Tensor) -> torch.Tensor:
    """`data` [rows, cols] if its rows lie end to end, each whole 16 bytes, as wide loads need; else a copy that does, with
    zeros at the ends of its rows."""
    cols, item = data.shape[1], data.element_size()
    if data.is_contiguous() and cols * item % 16 == 0 and data.data_ptr() % 16 == 0:
        return data
    wide = data.new_zeros((data.shape[0], -(-cols * item // 16) * 16 // item))
    wide[:, :cols] = data
    return wide


@dataclass(frozen=True)
class _Weights:
    """A core as the kernel takes it: rows of whole 16 bytes, int4 as 32-bit words."""

    data: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    rows: int
    columns: int
    group: int
    store: str

    @classmethod
    def of(cls, core: Core) -> _Weights:
        rows, columns = core.shape
        data = padded_rows(core.data)
        if core.is_int4:
            data = data.view(torch.int32)
        scale, zero = (None if t is None else t.contiguous() for t in (core.scale, core.zero))
        return cls(data, scale, zero, rows, columns, core.group, core.store)

    @property
    def pitch(self) -> int:
        """Of a row, in units of 16 bytes."""
        return self.data.shape[1] * self.data.element_size() // 16

    @property
    def groups(self) -> int:
        return self.scale.shape[1] if self.group and self.scale is not None else 0


@dataclass(frozen=True)
class _Product:
    """One member's part in one stage."""

    weights: _Weights
    to: int
    columns: int  # of the input: what there is, or with the zeros that fill up z
    x_col: int = 0
    z_col: int = 0
    y_col: int = 0
    index: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def arguments(self) -> list[Any]:
        w = self.weights
        return [
            w.data, w.scale, w.zero, self.index, self.bias,
            w.rows, self.columns, w.pitch, w.groups, self.x_col, self.z_col, self.y_col,
        ]  # fmt: skip


_ARGUMENTS = 12  # of a member


@dataclass(frozen=True)
class _Input:
    """What a stage multiplies, and how it is read."""

    x: torch.Tensor
    prologue: int = p.PLAIN.value
    gain: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    eps: float = 0.0


class _Launch:
    """Up to three products of one compute dtype and one store: everything but the activations stands ready."""

    def __init__(self, products: Sequence[_Product], compute: torch.dtype):
        self.compute = compute
        self._compute = operand_dtype(compute)
        absent = MEMBERS - len(products)
        arguments = [a for product in products for a in product.arguments()]
        arguments += [None, None, None, None, None, 0, 0, 0, 0, 0, 0, 0] * absent
        constants = [product.to for product in products] + [p.ABSENT] * absent
        constants += [product.weights.group for product in products] + [0] * absent
        self._first = (*arguments, *constants)
        # Addresses are cheaper to launch with than tensors; `_first` keeps those alive.
        self._later = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in self._first)
        self._rows = [product.weights.rows for product in products]
        group, store = products[0].weights.group, products[0].weights.store
        self._block_k = block_k(compute, group)
        self._tiles = {decode: default_tile(decode, compute, store, group) for decode in (True, False)}
        self._options = {
            decode: compile_options(t.num_warps, t.num_stages, max_registers=t.max_registers)
            for decode, t in self._tiles.items()
        }
        self._grid = {d: sum(triton.cdiv(n, t.block_n) for n in self._rows) for d, t in self._tiles.items()}
        self._launcher = Launcher(p.products_kernel)

    def __call__(
        self,
        source: _Input,
        scales: torch.Tensor | None,
        z: torch.Tensor | None,
        y: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> None:
        x, rows = source.x, source.x.shape[0]
        decode = rows <= DECODE_ROWS
        tile = self._tiles[decode]
        ldr = 0 if residual is None else residual.stride(0)
        key = (
            decode, x.dtype, source.prologue, number_class(x.stride(0)), pointer_class(x), z is None,
            number_class(ldr), pointer_class(residual), pointer_class(source.gain),
            None if source.gain is None else source.gain.dtype,
        )  # fmt: skip
        self._launcher(
            key,
            (triton.cdiv(rows, tile.block_m), self._grid[decode], 1),
            (
                x, scales, source.gain, source.factor, residual, z, y, rows,
                x.stride(0), ldr, 0 if z is None else z.stride(0), y.stride(0), source.eps,
            ),
            (self._first, self._later),
            (source.prologue, self._compute, tile.block_m, tile.block_n, self._block_k),
            self._options[decode],
        )  # fmt: skip


@dataclass(frozen=True)
class _Slices:
    """The slices of a stage's input that int8 cores read, each rounded with a scale of its own: int32 on the device."""

    starts: torch.Tensor
    widths: torch.Tensor

    @classmethod
    def of(cls, products: Sequence[_Product]) -> _Slices:
        bounds = sorted({(product.x_col, product.columns) for product in products})
        starts, widths = torch.tensor(bounds, dtype=torch.int32, device=products[0].weights.data.device).T
        return cls(starts.contiguous(), widths.contiguous())


class _Stage:
    """The launches of one stage: products of a compute dtype and a store together, three at a time."""

    def __init__(self, products: Sequence[_Product], activation: torch.dtype, int8_activations: bool):
        self.launches: list[_Launch] = []
        kinds: dict[tuple[torch.dtype, str, int], list[_Product]] = {}
        for product in products:
            if product.weights.rows == 0:  # an interpolative core_1 at full rank
                continue
            w = product.weights
            rounded = int8_activations and w.store == "int8"
            compute = torch.int8 if rounded else compute_dtype(activation, w.store)
            kinds.setdefault((compute, w.store, w.group), []).append(product)
        for (compute, _, _), alike in kinds.items():
            self.launches += [_Launch(alike[at : at + MEMBERS], compute) for at in range(0, len(alike), MEMBERS)]
        rounded_products = [q for (compute, _, _), alike in kinds.items() if compute == torch.int8 for q in alike]
        self.slices = _Slices.of(rounded_products) if rounded_products else None

    def __call__(self, source: _Input, z: torch.Tensor | None, y: torch.Tensor, residual: torch.Tensor | None) -> None:
        rounded, scales = None, None
        if self.slices is not None:
            codes, scales = quantize_slices(source.x, self.slices.starts, self.slices.widths)
            rounded = _Input(codes)
        for launch in self.launches:
            if launch.compute == torch.int8:
                assert rounded is not None
                launch(rounded, scales, z, y, residual)
            else:
                launch(source, None, z, y, residual)


class _Plan:
    """A group for one activation dtype: both stages, and how wide z is."""

    def __init__(self, members: Sequence[_Member], activation: torch.dtype, int8_activations: bool):
        first: list[_Product] = []
        second: list[_Product] = []
        z_col = y_col = 0
        for m in members:
            if m.kind == "dense":
                first.append(_Product(m.cores[0], p.TO_Y, m.cores[0].columns, y_col=y_col, bias=m.bias))
            else:
                rank = m.cores[0].rows
                wide = (
                    -(-rank // 16) * 16
                )  # z's columns of a member start on 16 elements and end in zeros, for wide loads
                to = p.TO_Z if m.kind == "lowrank" else p.TO_BOTH
                pivots, rest = m.pivots
                core_0, core_1 = m.cores
                bias = m.bias if m.kind == "interpolative" else None
                first.append(_Product(core_0, to, core_0.columns, 0, z_col, y_col, pivots, bias))
                second.append(_Product(core_1, p.TO_Y, wide, z_col, 0, y_col, rest, m.bias))
                z_col += wide
            y_col += m.out_features
        self.z_columns = z_col
        self.first = _Stage(first, activation, int8_activations)
        self.second = _Stage(second, activation, int8_activations)


@dataclass(frozen=True)
class _Member:
    """A linear's tensors, made ready once for every activation dtype."""

    kind: str
    out_features: int
    cores: tuple[_Weights, ...]
    pivots: tuple[torch.Tensor | None, torch.Tensor | None]
    bias: torch.Tensor | None

    @classmethod
    def of(cls, w: LinearWeights) -> _Member:
        pivots = (None, None) if w.pivot is None else (w.pivot[: w.rank], w.pivot[w.rank :])
        return cls(w.kind, w.out_features, tuple(_Weights.of(c) for c in w.cores), pivots, w.bias)


class TritonLinear:
    """Linears that share their input, checked and made ready to run together.

    members: dense, lowrank or interpolative, on one device; cores float32, bfloat16, float16, int8 with one scale per row,
    or int4; biases of any activation dtype; kinds, ranks and stores may differ. Tensors whose rows are not whole 16 bytes
    are copied, others shared: they must not change. int8_activations: the input of every int8 core is rounded to int8
    first, see `cai_runtime.kernels.quantized_rows`.

    Raises KernelError for a shape, dtype, device or kind that is not as above; names the member.
    """

    def __init__(self, members: Sequence[LinearWeights], int8_activations: bool = False):
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
        self._int8_activations = int8_activations
        self._members = [_Member.of(w) for w in members]
        self._plans: dict[torch.dtype, _Plan] = {}

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        norm: RmsNorm | None = None,
        swiglu: bool = False,
    ) -> torch.Tensor:
        """The members applied to `x`, side by side, plus biases and residual.

        Args:
            x: [M, in_features], or [M, 2 in_features] with swiglu; float32, bfloat16 or float16, any strides; M may be 0.
            residual: [M, out_features] of x's dtype, added before the one rounding of the result.
            norm: RMSNorm of x first; its weight [in_features], of any activation dtype.
            swiglu: x holds gate and up side by side, and silu(gate) * up, rounded to x's dtype, goes in.

        Returns:
            [M, out_features] in x's dtype, newly allocated. A row's bits do not depend on M, nor on the group's members.

        Raises:
            KernelError: a shape, dtype or device is not as above, or both norm and swiglu; names the argument.
        """
        check_activation("x", x, self.in_features * (2 if swiglu else 1))
        require(x.device == self.device, f"x is on {x.device}, expected {self.device}: the weights are there")
        rows = x.shape[0]
        if residual is not None:
            shape = (rows, self.out_features)
            check_tensor("residual", residual, shape=shape, device=x.device, dtypes=(x.dtype,), unit_stride=False)
            residual = rows_contiguous(residual)
        if norm is not None:
            require(not swiglu, "a linear's input is normed or gated, not both")
            check_tensor("norm.weight", norm.weight, shape=(self.in_features,), device=x.device, dtypes=ACTIVATIONS)
        y = torch.empty((rows, self.out_features), dtype=x.dtype, device=x.device)
        if rows == 0:
            return y
        plan = self._plans.get(x.dtype)
        if plan is None:
            plan = self._plans[x.dtype] = _Plan(self._members, x.dtype, self._int8_activations)
        z = torch.empty((rows, plan.z_columns), dtype=x.dtype, device=x.device) if plan.z_columns else None
        with on_device(x):
            plan.first(_source(rows_contiguous(x), plan, norm, swiglu), z, y, residual)
            if z is not None:
                plan.second(_Input(z), None, y, residual)
        return y


def _source(x: torch.Tensor, plan: _Plan, norm: RmsNorm | None, gate: bool) -> _Input:
    """x with its prologue, within the launch or by a kernel of its own.

    RMSNorm: within the launch, where every column tile forms the sums of squares again, cheap next to the weights while
    those are all the time there is; with many rows, a kernel forms them once: the same bits. By a kernel of its own, for any
    number of rows, in float16, where x times the norm's weight could overflow before it is divided by the RMS; before int8
    rounding, which needs a row's peak first; and where launches differ in compute dtype.

    SwiGLU: by a kernel of its own, for any number of rows. Every column tile would form it again, in tiles of 16 rows
    whatever there are: compiled for sm_90, a step of the bf16 decode loop grows from 111 instructions to 631, and the time
    that takes is more than that of the launch it saves.
    """
    if gate:
        return _Input(swiglu(x))
    if norm is None:
        return _Input(x)
    eps = float(norm.eps)
    computes = {launch.compute for launch in plan.first.launches}
    if computes != {x.dtype} or x.dtype == torch.float16:
        return _Input(rms_norm(x, norm.weight, eps))
    if x.shape[0] <= DECODE_ROWS:
        return _Input(x, p.NORM.value, norm.weight, None, eps)
    return _Input(x, p.FACTOR.value, norm.weight, inverse_rms(x, eps), eps)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row, fp32 [M], with the bits that a launch with few rows forms for itself. x [M, K]
    with contiguous rows. Not checked."""
    rows, width = x.shape
    factor = torch.empty(rows, dtype=torch.float32, device=x.device)
    tile = default_tile(False, x.dtype, "", 0)
    p.factor_kernel[(triton.cdiv(rows, tile.block_m),)](
        x, factor, rows, width, x.stride(0), eps, operand_dtype(x.dtype), tile.block_m, block_k(x.dtype, 0),
        **compile_options(tile.num_warps, tile.num_stages),
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
