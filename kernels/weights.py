"""The weights of one linear projection as the kernels take them: plain tensors and a kind, no model, no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cai_runtime.errors import KernelError

if TYPE_CHECKING:
    import torch

Kind = Literal["dense", "lowrank", "interpolative", "mpo"]


@dataclass(frozen=True)
class Core:
    """One factor as a matrix.

    data: [rows, cols], fp32, bf16, fp16 or int8, contiguous. scale: fp32 [rows] for int8, else None; the value of an
    element is data * scale[row].
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        scale = 0 if self.scale is None else self.scale.nbytes
        return self.data.nbytes + scale

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [rows, cols] in a float dtype: a copy, for the reference and for tests."""
        x = self.data.to(dtype)
        return x if self.scale is None else x * self.scale.to(dtype)[:, None]


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
        return sum(c.data.numel() for c in self.cores)

    def __post_init__(self) -> None:
        shapes = [tuple(c.data.shape) for c in self.cores]
        if shapes != self._expected_shapes():
            raise KernelError(
                f"a {self.kind} linear {self.in_features} -> {self.out_features} of rank {self.rank} has cores "
                f"{self._expected_shapes()}, not {shapes}"
            )
        for core in self.cores:
            if core.scale is not None and tuple(core.scale.shape) != (core.data.shape[0],):
                raise KernelError(f"scale {tuple(core.scale.shape)} does not fit a core of {tuple(core.data.shape)}")
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
