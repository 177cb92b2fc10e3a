"""Slim linear: y = W x for W stored as one to n factors, alone or as a group of projections that share their input.

The reference in any float dtype (float64 judges the others) and the CPU backend. `gpu.py` has the Triton and CUDA backends,
`prepare.py` chooses among them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.activation import gelu_cpu, gelu_reference, swiglu_cpu, swiglu_reference
from cai_runtime.kernels.cpu_library import EMPTY_MATRIX, QUADS_CODE, Arena, PackedMatrix, check_rows
from cai_runtime.kernels.norm import (
    LayerNorm,
    RmsNorm,
    checked_weight,
    layer_norm_cpu,
    layer_norm_reference,
    layer_norm_torch,
    rms_norm_cpu,
    rms_norm_reference,
)
from cai_runtime.kernels.program import NotRecordable, Value
from cai_runtime.kernels.quantized_rows import CODE_GROUP, core_codes, rounded_groups, rounded_rows
from cai_runtime.kernels.weights import Core, LinearWeights


class PreparedLinear(Protocol):
    """A group of projections made ready for one backend."""

    in_features: int
    out_features: int  # of all members together

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        norm: RmsNorm | LayerNorm | None = None,
        swiglu: bool = False,
        gelu: bool = False,
    ) -> torch.Tensor:
        """x [M, in_features] -> [M, out_features], the members side by side, plus `residual` of the same shape.

        norm: apply it to x first. swiglu: x is [M, 2 in_features], gate and up side by side, and silu(gate) * up goes in.
        gelu: apply the exact GELU to x first. At most one of them. A backend may fuse them: the bits are
        the same for every number of rows.
        """
        ...


@dataclass(frozen=True)
class Prologue:
    """What a linear does to its input first: a norm, silu(gate) * up of rows that hold both, GELU, or nothing."""

    norm: RmsNorm | LayerNorm | None = None
    swiglu: bool = False
    gelu: bool = False

    def __post_init__(self) -> None:
        if (self.norm is not None) + self.swiglu + self.gelu > 1:
            raise KernelError("a linear's input is normed or gated (swiglu, gelu), not both")

    def apply(
        self,
        x: Any,
        norm_op: Callable[[Any, torch.Tensor, float], Any],
        swiglu_op: Callable[[Any], Any],
        layer_norm_op: Callable[[Any, torch.Tensor, torch.Tensor, float], Any] = layer_norm_reference,
        gelu_op: Callable[[Any], Any] = gelu_reference,
    ) -> Any:
        """Run the prologue as an operation of its own, for backends that don't fuse it."""
        if isinstance(self.norm, LayerNorm):
            return layer_norm_op(x, self.norm.weight, self.norm.bias, self.norm.eps)
        if self.norm is not None:
            return norm_op(x, self.norm.weight, self.norm.eps)
        return swiglu_op(x) if self.swiglu else gelu_op(x) if self.gelu else x

    def by_torch(self, x: torch.Tensor) -> tuple[torch.Tensor, Prologue]:
        """Run LayerNorm or GELU by torch's functions: (x after it, the prologue that is left).

        For backends whose kernels have RMSNorm and SwiGLU alone. Raises KernelError for a norm of another width than x.
        """
        if isinstance(self.norm, LayerNorm):
            for vector in (self.norm.weight, self.norm.bias):
                if x.dim() != 2 or tuple(vector.shape) != (x.shape[1],):
                    raise KernelError(f"slim_linear: a norm of {list(vector.shape)} for x {list(x.shape)}")
            return layer_norm_torch(x, self.norm.weight, self.norm.bias, self.norm.eps), Prologue()
        return (torch.nn.functional.gelu(x), Prologue()) if self.gelu else (x, self)


class Linear(ABC):
    """A `PreparedLinear` whose backend fills in `_run`. On the CPU, x and residual may be Values of a recorded pass.

    takes_every_prologue: whether `_run` takes LayerNorm and GELU too; if not, torch's functions run before it.
    """

    in_features: int
    out_features: int
    takes_every_prologue = False

    def __call__(
        self,
        x: Any,
        residual: Any = None,
        *,
        norm: RmsNorm | LayerNorm | None = None,
        swiglu: bool = False,
        gelu: bool = False,
    ) -> Any:
        """See `PreparedLinear.__call__`. Raises KernelError for two of norm, swiglu and gelu, and as the backend's class
        says."""
        prologue = Prologue(norm, swiglu, gelu)
        if not self.takes_every_prologue:
            x, prologue = prologue.by_torch(x)
        return self._run(x, prologue, residual)

    @abstractmethod
    def _run(self, x: Any, prologue: Prologue, residual: Any) -> Any:
        """x [M, in_features], twice as wide with swiglu -> [M, out_features], plus the residual if there is one."""


# ------------------------------------------------------------------------------------------------------ reference


def reference(
    x: torch.Tensor,
    w: LinearWeights,
    residual: torch.Tensor | None = None,
    *,
    int8_activations: bool = False,
    scale_rows: bool = False,
) -> torch.Tensor:
    """y [M, out] in x's dtype, computed as the factors say. int8_activations: the input of every int8 core is rounded to
    int8, see `quantized_rows`, with a scale for each group of columns as on the CPU, or with scale_rows for each row as on a
    GPU."""
    dtype = x.dtype

    def multiply(number: int, core: Core, rows: torch.Tensor) -> torch.Tensor:
        if int8_activations and core.store == "int8":
            rows = rounded_rows(rows) if scale_rows else rounded_groups(rows, core_codes(number))
        return rows @ core.values(dtype).T

    steps = [partial(multiply, number, core) for number, core in enumerate(w.cores)]
    match w.kind:
        case "dense":
            y = steps[0](x)
        case "lowrank":
            y = steps[1](steps[0](x))
        case "interpolative":
            assert w.pivot is not None
            z = steps[0](x)
            y = torch.empty(x.shape[0], w.out_features, dtype=dtype, device=x.device)
            y[:, w.pivot.long()] = torch.cat([z, steps[1](z)], dim=1)
        case "mpo":
            y = contract_mpo(x, w, steps)
    if w.bias is not None:
        y = y + w.bias.to(dtype)
    return y if residual is None else y + residual


@dataclass(frozen=True)
class MpoShape:
    """What contracting a matrix product operator needs to know of it; see LinearWeights."""

    in_features: int
    out_features: int
    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    bonds: tuple[int, ...]


def contract_mpo(
    x: torch.Tensor, w: LinearWeights | MpoShape, apply: Sequence[Callable[[torch.Tensor], torch.Tensor]]
) -> torch.Tensor:
    """Contract x [M, in] with the cores of a matrix product operator (Oseledets 2011; Novikov et al. 2015), left to right.

    apply[k] multiplies rows [N, bond_{k-1} * in_k] by core k as a matrix, giving [N, out_k * bond_k]. Every step is a
    row-wise linear, so it runs on whichever kernel does those, with that kernel's order of reduction.
    """
    rows = x.shape[0]
    done, left = 1, list(w.in_dims)  # outputs finished; inputs still to contract
    state = x.reshape(rows, 1, 1, w.in_features)  # [M, outputs done, bond, inputs left]
    for k, multiply in enumerate(apply):
        i, right, bond = left.pop(0), w.bonds[k + 1], w.bonds[k]
        rest = state.shape[3] // i
        step = state.reshape(rows, done, bond, i, rest).permute(0, 1, 4, 2, 3).reshape(rows * done * rest, bond * i)
        out = multiply(step.contiguous()).reshape(rows, done, rest, w.out_dims[k], right)
        done *= w.out_dims[k]
        state = out.permute(0, 1, 3, 4, 2).reshape(rows, done, right, rest)
    return state.reshape(rows, w.out_features)


class ReferenceLinear(Linear):
    """The reference as a prepared group: plain torch, on any device."""

    takes_every_prologue = True

    def __init__(self, members: Sequence[LinearWeights], int8_activations: bool = False):
        self.members = tuple(members)
        self.in_features = members[0].in_features
        self.out_features = sum(w.out_features for w in members)
        self._int8_activations = int8_activations

    def _run(self, x: torch.Tensor, prologue: Prologue, residual: torch.Tensor | None) -> torch.Tensor:
        x = prologue.apply(x, rms_norm_reference, swiglu_reference)
        y = torch.cat([reference(x, w, int8_activations=self._int8_activations) for w in self.members], dim=1)
        return y if residual is None else y + residual


# ------------------------------------------------------------------------------------------------------------ cpu

# csrc/cpu/ops.h: Kind, Prologue, kMaxMembers
KIND_CODES = {"dense": 0, "lowrank": 1, "interpolative": 2}
NO_PROLOGUE, NORM, SWIGLU_INPUT, LAYER_NORM, GELU_INPUT = range(5)
MAX_MEMBERS = 64


def checked_pivot(pivot: torch.Tensor) -> torch.Tensor:
    """A copy as int32. C++ writes where it says, so it must be a permutation. Raises KernelError."""
    if not torch.equal(
        pivot.long().sort().values, torch.arange(pivot.shape[0], dtype=torch.int64, device=pivot.device)
    ):
        raise KernelError(f"the pivot is not a permutation of 0 to {pivot.shape[0] - 1}")
    return pivot.to(torch.int32).clone()


class CpuLinear(Linear):
    """Members packed for the C++ kernels; one call runs the prologue and every core of every member. fp32 in, fp32 out.

    The weights are copied into `arena` (or the heap): the tensors given may be dropped afterwards. int8_activations: see
    `prepare`. codes: of an element of x with them; 0: as `core_codes` says.
    """

    takes_every_prologue = True

    def __init__(
        self,
        members: Sequence[LinearWeights],
        arena: Arena | None = None,
        *,
        int8_activations: bool = False,
        codes: int = 0,
    ):
        if len(members) > MAX_MEMBERS:
            raise KernelError(f"a group on the CPU has up to {MAX_MEMBERS} members, not {len(members)}")
        self.in_features = members[0].in_features
        self.out_features = sum(w.out_features for w in members)
        self.matrices: list[PackedMatrix] = []  # with `vectors`: what the descriptor points to
        self.vectors: list[torch.Tensor | None] = []
        fields: list[int] = []
        out_offset = z_offset = 0
        for w in members:
            cores = [
                PackedMatrix(c, arena, codes=codes or core_codes(i) if int8_activations else 0)
                for i, c in enumerate(w.cores)
            ]
            self.matrices += cores
            pivot = None if w.pivot is None else checked_pivot(w.pivot)
            bias = None if w.bias is None else w.bias.to(torch.float32).contiguous().clone()
            # Where each output feature lies among both cores' rows, whose results then lie side by side in z.
            place = None
            if pivot is not None and all(m.fields[2] == QUADS_CODE for m in cores):
                place = pivot.long().argsort().to(torch.int32)
            self.vectors += [pivot, bias, place]
            rank = w.rank or 0
            fields += [KIND_CODES[w.kind], w.out_features, out_offset, rank, z_offset]
            fields += [0 if t is None else t.data_ptr() for t in (pivot, bias, place)]
            fields += cores[0].fields
            fields += cores[1].fields if len(cores) > 1 else EMPTY_MATRIX
            out_offset += w.out_features
            z_offset += -(-(rank if place is None else w.out_features) // 16) * 16
        # Floats of scratch for M rows: z; the input after its prologue; with int8 activations the codes and scales of both.
        # csrc/cpu/linear_ops.cpp: scratch_floats
        self.scratch_columns = z_offset + self.in_features
        if int8_activations:
            groups = (codes or core_codes(0)) * -(-self.in_features // CODE_GROUP)
            groups += sum(core_codes(1) * -(-(w.rank or 0) // CODE_GROUP) for w in members)
            self.scratch_columns += groups * (CODE_GROUP // 4 + 2)
        head = [len(members), self.in_features, z_offset]
        self.descriptor = cpu_library.integers([*head, *fields])
        self.native = cpu_library.operation("linear_group")

    def first_matrix(self) -> PackedMatrix:
        """The first core of the first member: of a dense linear, its weight."""
        return self.matrices[0]

    def _run(self, x: Any, prologue: Prologue, residual: Any) -> Any:
        norm, swiglu = prologue.norm, prologue.swiglu
        code = SWIGLU_INPUT if swiglu else GELU_INPUT if prologue.gelu else NO_PROLOGUE
        vectors, eps = {}, 0.0  # the norm's
        if norm is not None:
            code, eps = NORM, norm.eps
            vectors["weight"] = checked_weight(norm.weight, "slim_linear's norm")
            if isinstance(norm, LayerNorm):
                code, vectors["bias"] = LAYER_NORM, checked_weight(norm.bias, "slim_linear's norm's bias")
            for vector in vectors.values():
                if vector.shape[0] != self.in_features:
                    raise KernelError(f"slim_linear: a norm of {vector.shape[0]} for {self.in_features} features")
        if isinstance(x, Value):
            bindings = {"group": self.descriptor} | vectors
            return x.recorder.note(
                "linear", [x] if residual is None else [x, residual], self.out_features,
                attributes={"prologue": code, "eps": eps}, bindings=bindings, keep=self,
            )  # fmt: skip
        x = check_rows(x, self.in_features * (2 if swiglu else 1), "slim_linear")
        if norm is not None:
            x = x.contiguous()
        if residual is not None:
            residual = check_rows(residual, self.out_features, "slim_linear's residual")
        rows = x.shape[0]
        out = cpu_library.empty(rows, self.out_features)
        scratch = cpu_library.empty(rows, self.scratch_columns)
        weight, bias = vectors.get("weight"), vectors.get("bias")
        self.native(self.descriptor, x, code, weight, bias, eps, residual, out, scratch)
        return out


class MpoLinear(Linear):
    """A matrix product operator: each core is one row-wise linear. cores: prepared, one for each core of `w`.

    norm_op to gelu_op: the backend's. check: called with x and its columns, raises KernelError for an x that does not fit.
    """

    takes_every_prologue = True

    def __init__(
        self,
        w: LinearWeights,
        cores: Sequence[PreparedLinear],
        norm_op: Callable[[Any, torch.Tensor, float], Any],
        swiglu_op: Callable[[Any], Any],
        check: Callable[[torch.Tensor, int], object],
        layer_norm_op: Callable[[Any, torch.Tensor, torch.Tensor, float], Any] = layer_norm_torch,
        gelu_op: Callable[[Any], Any] = gelu_reference,
    ):
        self.in_features, self.out_features = w.in_features, w.out_features
        # Not `w` itself: its tensors may have been copied for the kernels.
        self.shape = MpoShape(w.in_features, w.out_features, w.out_dims, w.in_dims, w.bonds)
        self.cores, self.bias = tuple(cores), w.bias
        self._ops, self._check = (norm_op, swiglu_op, layer_norm_op, gelu_op), check

    def _run(self, x: Any, prologue: Prologue, residual: Any) -> Any:
        if isinstance(x, Value):
            raise NotRecordable("a matrix product operator permutes its input between cores")
        self._check(x, self.in_features * (2 if prologue.swiglu else 1))
        y = contract_mpo(prologue.apply(x, *self._ops), self.shape, self.cores)
        if residual is not None and (residual.shape, residual.dtype, residual.device) != (y.shape, y.dtype, y.device):
            raise KernelError(
                f"residual is {residual.dtype} {list(residual.shape)} on {residual.device}, expected {y.dtype} "
                f"{list(y.shape)} on {y.device}"
            )
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y if residual is None else y + residual


def as_dense(core: Core, bias: torch.Tensor | None = None) -> LinearWeights:
    """A single core as a projection of its own."""
    rows, cols = core.shape
    return LinearWeights("dense", cols, rows, (core,), bias=bias)


def side_by_side(
    parts: Iterable[Callable[..., torch.Tensor]], x: torch.Tensor, prologue: Prologue, residual: torch.Tensor | None
) -> torch.Tensor:
    """Call linears with one input, each with the prologue, and concatenate their outputs."""
    y = torch.cat([part(x, norm=prologue.norm, swiglu=prologue.swiglu, gelu=prologue.gelu) for part in parts], dim=1)
    return y if residual is None else y + residual


class SideBySide(Linear):
    """Prepared linears over one input whose outputs are concatenated; for members that no single call can serve."""

    takes_every_prologue = True

    def __init__(self, parts: Sequence[PreparedLinear]):
        self.parts = tuple(parts)
        self.in_features = parts[0].in_features
        self.out_features = sum(p.out_features for p in parts)

    def _run(self, x: torch.Tensor, prologue: Prologue, residual: torch.Tensor | None) -> torch.Tensor:
        return side_by_side(self.parts, x, prologue, residual)


def cpu_mpo(w: LinearWeights, arena: Arena | None = None, *, int8_activations: bool = False) -> MpoLinear:
    cores = [
        CpuLinear([as_dense(c)], arena, int8_activations=int8_activations, codes=core_codes(i))
        for i, c in enumerate(w.cores)
    ]
    return MpoLinear(
        w,
        cores,
        rms_norm_cpu,
        swiglu_cpu,
        lambda x, columns: check_rows(x, columns, "slim_linear"),
        layer_norm_cpu,
        gelu_cpu,
    )
