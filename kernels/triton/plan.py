"""A group of linears made ready to launch: what can be known before the activations come is known here.

A `Plan` is for one activation dtype: two stages, each of a few launches of `products_kernel`, with the tensors laid out as
it reads them, the tiles chosen and the arguments in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cai_runtime.kernels.triton import products as p
from cai_runtime.kernels.triton.dependent import launches_dependently
from cai_runtime.kernels.triton.launch import Launcher, compile_options, number_class, operand_dtype, pointer_class
from cai_runtime.kernels.triton.quantized_rows import quantize_slices
from cai_runtime.kernels.triton.tiles import DECODE_ROWS, Products, Tile, block_k

if TYPE_CHECKING:
    from cai_runtime.kernels.weights import Core, LinearWeights

TileChoice = Callable[[Products], Tile]

MEMBERS = 3  # per launch: q/k/v


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
class Weights:
    """A core as the kernel takes it: rows of whole 16 bytes, int4 as 32-bit words, zero points as bfloat16."""

    data: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    rows: int
    columns: int
    group: int
    store: str

    @classmethod
    def of(cls, core: Core) -> Weights:
        rows, columns = core.shape
        data = padded_rows(core.data)
        if core.is_int4:
            data = data.view(torch.int32)
        scale, zero = (None if t is None else t.contiguous() for t in (core.scale, core.zero))
        if zero is not None:
            # Exact up to 256. As bytes they would be the narrowest input of the dot's operand, from which Triton derives
            # how many columns a thread holds (kWidth): 8, while a dot over the 16 columns of a group of 32 has room for 4,
            # and Triton 3.6 to 3.8 then multiply half of the columns twice and the others never.
            zero = zero.to(torch.bfloat16)
        return cls(data, scale, zero, rows, columns, core.group, core.store)

    @property
    def pitch(self) -> int:
        """Of a row, in units of 16 bytes."""
        return self.data.shape[1] * self.data.element_size() // 16

    @property
    def groups(self) -> int:
        return self.scale.shape[1] if self.group and self.scale is not None else 0


@dataclass(frozen=True)
class Product:
    """One member's part in one stage."""

    weights: Weights
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


class Input(NamedTuple):
    """What a stage multiplies, and how it is read."""

    x: torch.Tensor
    prologue: int = p.PLAIN.value
    gain: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    eps: float = 0.0


class Launch:
    """Up to three products of one compute dtype and one store: everything but the activations stands ready."""

    def __init__(self, products: Sequence[Product], compute: torch.dtype, tiles: TileChoice):
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
        first = products[0].weights
        self._block_k = block_k(compute, first.group)
        kind = (compute, first.store, first.group, sum(self._rows), products[0].columns, first.data.device)
        self._tiles = {decode: tiles(Products(decode, *kind)) for decode in (True, False)}
        self._dependent = launches_dependently(first.data.device)
        more = {"launch_pdl": True} if self._dependent else {}
        self._options = {
            decode: compile_options(t.num_warps, t.num_stages, max_registers=t.max_registers) | more
            for decode, t in self._tiles.items()
        }
        self._grid = {d: sum(-(-n // t.block_n) for n in self._rows) for d, t in self._tiles.items()}
        self._launcher = Launcher(p.products_kernel)

    def __call__(
        self,
        source: Input,
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
            decode, source.prologue, number_class(x.stride(0)), pointer_class(x),
            number_class(ldr), pointer_class(residual), pointer_class(source.gain),
            None if source.gain is None else source.gain.dtype,
        )  # fmt: skip
        self._launcher(
            key,
            (-(-rows // tile.block_m), self._grid[decode], 1),
            (
                x, scales, source.gain, source.factor, residual, z, y, rows,
                x.stride(0), ldr, 0 if z is None else z.stride(0), y.stride(0), source.eps,
            ),
            (self._first, self._later),
            (source.prologue, self._compute, tile.block_m, tile.block_n, self._block_k, self._dependent),
            self._options[decode],
        )  # fmt: skip


@dataclass(frozen=True)
class Slices:
    """The slices of a stage's input that int8 cores read, each rounded with a scale of its own: int32 on the device."""

    starts: torch.Tensor
    widths: torch.Tensor

    @classmethod
    def of(cls, products: Sequence[Product]) -> Slices:
        bounds = sorted({(product.x_col, product.columns) for product in products})
        starts, widths = torch.tensor(bounds, dtype=torch.int32, device=products[0].weights.data.device).T
        return cls(starts.contiguous(), widths.contiguous())


class Stage:
    """The launches of one stage: products of a compute dtype and a store together, three at a time."""

    def __init__(self, products: Sequence[Product], activation: torch.dtype, int8_activations: bool, tiles: TileChoice):
        self.launches: list[Launch] = []
        kinds: dict[tuple[torch.dtype, str, int], list[Product]] = {}
        for product in products:
            if product.weights.rows == 0:  # an interpolative core_1 at full rank
                continue
            w = product.weights
            rounded = int8_activations and w.store == "int8"
            compute = torch.int8 if rounded else compute_dtype(activation, w.store)
            kinds.setdefault((compute, w.store, w.group), []).append(product)
        for (compute, _, _), alike in kinds.items():
            self.launches += [Launch(alike[at : at + MEMBERS], compute, tiles) for at in range(0, len(alike), MEMBERS)]
        self.computes = {compute for compute, _, _ in kinds}
        self.stores = {store for _, store, _ in kinds}
        rounded_products = [q for (compute, _, _), alike in kinds.items() if compute == torch.int8 for q in alike]
        self.slices = Slices.of(rounded_products) if rounded_products else None

    def __call__(self, source: Input, z: torch.Tensor | None, y: torch.Tensor, residual: torch.Tensor | None) -> None:
        rounded, scales = None, None
        if self.slices is not None:
            codes, scales = quantize_slices(source.x, self.slices.starts, self.slices.widths)
            rounded = Input(codes)
        for launch in self.launches:
            if launch.compute == torch.int8:
                assert rounded is not None
                launch(rounded, scales, z, y, residual)
            else:
                launch(source, None, z, y, residual)


@dataclass(frozen=True)
class Member:
    """A linear's tensors, made ready once for every activation dtype."""

    kind: str
    out_features: int
    cores: tuple[Weights, ...]
    pivots: tuple[torch.Tensor | None, torch.Tensor | None]
    bias: torch.Tensor | None

    @classmethod
    def of(cls, w: LinearWeights) -> Member:
        pivots = (None, None) if w.pivot is None else (w.pivot[: w.rank], w.pivot[w.rank :])
        return cls(w.kind, w.out_features, tuple(Weights.of(c) for c in w.cores), pivots, w.bias)


class Plan:
    """A group for one activation dtype: both stages, and how wide z is."""

    def __init__(self, members: Sequence[Member], activation: torch.dtype, int8_activations: bool, tiles: TileChoice):
        first: list[Product] = []
        second: list[Product] = []
        z_col = y_col = 0
        for m in members:
            if m.kind == "dense":
                first.append(Product(m.cores[0], p.TO_Y, m.cores[0].columns, y_col=y_col, bias=m.bias))
            else:
                rank = m.cores[0].rows
                # A member's columns of z start at a multiple of 16 and end in zeros, so that they are read in wide loads.
                wide = -(-rank // 16) * 16
                to = p.TO_Z if m.kind == "lowrank" else p.TO_BOTH
                pivots, rest = m.pivots
                core_0, core_1 = m.cores
                bias = m.bias if m.kind == "interpolative" else None
                first.append(Product(core_0, to, core_0.columns, 0, z_col, y_col, pivots, bias))
                second.append(Product(core_1, p.TO_Y, wide, z_col, 0, y_col, rest, m.bias))
                z_col += wide
            y_col += m.out_features
        self.z_columns = z_col
        self.first = Stage(first, activation, int8_activations, tiles)
        self.second = Stage(second, activation, int8_activations, tiles)
