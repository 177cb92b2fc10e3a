"""The weights of one linear projection as the kernels take them: plain tensors and a kind, no model, no file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cai_runtime.errors import KernelError

if TYPE_CHECKING:
    import torch

STORE_NAMES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.int8": "int8"}
Kind = Literal["dense", "lowrank", "interpolative", "mpo"]


INT4_GROUPS = (32, 64, 128)  # columns that share a scale


@dataclass(frozen=True)
class Core:
    """One factor as a matrix [rows, cols].

    fp32, bf16, fp16: `data` [rows, cols]. int8: `data` [rows, cols] and `scale` fp32 [rows]; the value of an element is
    data * scale[row]. int4: `data` uint8 [rows, ceil(cols / 2)], column 2 j in the low half of a byte and 2 j + 1 in the
    high half (zero where cols is odd); `group` is 32, 64 or 128 columns, `scale` bf16 [rows, ceil(cols / group)], `zero`
    uint8 of scale's shape or None for 8 everywhere (symmetric); the value is (code - zero) * scale of the element's group.
    `columns` is needed for int4 alone, whose bytes don't tell.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    group: int = 0
    columns: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, cols] of the matrix."""
        rows, cols = self.data.shape
        return rows, cols if self.columns is None else self.columns

    @property
    def is_int4(self) -> bool:
        return self.group != 0

    @property
    def store(self) -> str:
        """fp32, bf16, fp16, int8 or int4; for messages and tables."""
        return "int4" if self.is_int4 else STORE_NAMES.get(str(self.data.dtype), str(self.data.dtype))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scale, self.zero) if t is not None)

    def map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> Core:
        """The core with every tensor replaced by f of it: moved, cloned."""
        scale, zero = (None if t is None else f(t) for t in (self.scale, self.zero))
        return Core(f(self.data), scale, zero, self.group, self.columns)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [rows, cols] in a float dtype: a copy, for the reference and for tests."""
        if not self.is_int4:
            x = self.data.to(dtype)
            return x if self.scale is None else x * self.scale.to(dtype)[:, None]
        import torch

        assert self.scale is not None
        cols = self.shape[1]
        codes = torch.stack([self.data & 15, self.data >> 4], dim=-1).flatten(1)[:, :cols].to(dtype)
        zero = 8 if self.zero is None else self.zero.to(dtype).repeat_interleave(self.group, 1)[:, :cols]
        return (codes - zero) * self.scale.to(dtype).repeat_interleave(self.group, 1)[:, :cols]

    def __post_init__(self) -> None:
        if self.data.dim() != 2:
            raise KernelError(f"a core is a matrix, not of shape {tuple(self.data.shape)}")
        if not self.is_int4:
            if self.scale is not None and tuple(self.scale.shape) != (self.data.shape[0],):
                raise KernelError(
                    f"scale {tuple(self.scale.shape)} does not fit a core of {tuple(self.data.shape)}: one number per row"
                )
            if self.zero is not None or self.columns is not None:
                raise KernelError("only an int4 core (group 32, 64 or 128) has zero points and columns")
            return
        self._check_int4()

    def _check_int4(self) -> None:
        rows, width = self.data.shape
        if self.group not in INT4_GROUPS or self.columns is None:
            raise KernelError(
                f"an int4 core has groups of 32, 64 or 128 and its columns, not {self.group}, {self.columns}"
            )
        if str(self.data.dtype) != "torch.uint8" or width != -(-self.columns // 2):
            raise KernelError(
                f"an int4 core of {self.columns} columns is uint8 [rows, {-(-self.columns // 2)}], not {self.data.dtype} "
                f"{list(self.data.shape)}"
            )
        groups = (rows, -(-self.columns // self.group))
        if self.scale is None or tuple(self.scale.shape) != groups or str(self.scale.dtype) != "torch.bfloat16":
            raise KernelError(f"an int4 core of {rows} rows in groups of {self.group} needs bf16 scales {list(groups)}")
        if self.zero is not None and (tuple(self.zero.shape) != groups or str(self.zero.dtype) != "torch.uint8"):
            raise KernelError(f"zero points are uint8 of the scales' shape {list(groups)}, or None")


@dataclass(frozen=True)
class LinearWeights:
    """y = W x with W [out_features, in_features] stored as `kind` says (docs/format.md).

    dense: cores = (W,). lowrank: (core_0 [r, in], core_1 [out, r]). interpolative: (core_0 [r, in], core_1 [out - r, r])
    and pivot int32 [out], a permutation. mpo: core k as the matrix [out_k * bond_k, bond_{k-1} * in_k], with `out_dims`,
    `in_dims` and `bonds` (bond_0 .. bond_n, the first and last 1). bias: fp32 [out_features] or None.
    """

    kind: Kind
    in_features: int
    out_features: int
    cores: tuple[Core, ...]
    rank: int | None = None
    pivot: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    out_dims: tuple[int, ...] = ()
    in_dims: tuple[int, ...] = ()
    bonds: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        extra = sum(t.nbytes for t in (self.pivot, self.bias) if t is not None)
        return sum(c.nbytes for c in self.cores) + extra

    @property
    def parameters(self) -> int:
        return sum(c.shape[0] * c.shape[1] for c in self.cores)

    def __post_init__(self) -> None:
        shapes = [c.shape for c in self.cores]
        if shapes != self._expected_shapes():
            raise KernelError(
                f"a {self.kind} linear {self.in_features} -> {self.out_features} of rank {self.rank} has cores "
                f"{self._expected_shapes()}, not {shapes}"
            )
        if self.kind == "interpolative" and (self.pivot is None or tuple(self.pivot.shape) != (self.out_features,)):
            raise KernelError(f"an interpolative linear needs a pivot of [{self.out_features}]")

    def _expected_shapes(self) -> list[tuple[int, int]]:
        out, inp, r = self.out_features, self.in_features, self.rank or 0
        match self.kind:
            case "dense":
                return [(out, inp)]
            case "lowrank":
                return [(r, inp), (out, r)]
            case "interpolative":
                return [(r, inp), (out - r, r)]
            case "mpo":
                dims = zip(self.out_dims, self.in_dims, self.bonds[:-1], self.bonds[1:], strict=True)
                return [(o * right, left * i) for o, i, left, right in dims]
        raise KernelError(f"unknown kind {self.kind!r}; known: dense, lowrank, interpolative, mpo")
