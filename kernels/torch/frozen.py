"""Prepared linears as plain tensors and numbers, and back: how an operator of `ops` refers to one.

Nothing hides in a table of handles: whoever holds the tensors holds the linear. So a graph that captured them can be copied,
saved and loaded, and the memory is given back with the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.prepare import prepare
from cai_runtime.kernels.slim_linear import CpuLinear, PreparedLinear, ReferenceLinear
from cai_runtime.kernels.torch.relocation import strip_addresses, with_addresses
from cai_runtime.kernels.weights import Core, Kind, LinearWeights

KINDS: tuple[Kind, ...] = ("dense", "lowrank", "interpolative", "mpo")
NONE = -1  # an optional number that is absent


@dataclass(frozen=True)
class Frozen:
    """backend: as `prepare` takes it. tensors: the first is empty and stands for the linear, see `thaw`; the rest are the
    weights, packed if the backend packs them. layout: what the tensors are, as numbers in a text, which an operator's
    arguments carry faster than a list."""

    backend: str
    tensors: tuple[torch.Tensor, ...]
    layout: str
    in_features: int
    out_features: int


def freeze(prepared: PreparedLinear) -> Frozen:
    """A prepared group of the reference or the CPU kernels, over the same memory. Raises KernelError for another object."""
    if isinstance(prepared, ReferenceLinear):
        return freeze_members(prepared.members, "reference", prepared, int8_activations=prepared._int8_activations)
    if isinstance(prepared, CpuLinear):
        tensors, numbers = packed_state(prepared)
        return remembered("cpu", tensors, numbers, prepared)
    raise KernelError(
        f"a {type(prepared).__name__} is not a group that the reference or the CPU kernels run in one call; for a GPU see "
        "kernels.torch.modules.prepare_module"
    )


def freeze_members(
    members: Sequence[LinearWeights], backend: str, prepared: PreparedLinear, *, int8_activations: bool
) -> Frozen:
    """A group of a backend that takes the weights as they are. prepared: what `prepare` made of the other arguments."""
    tensors: list[torch.Tensor] = []
    numbers = [int(int8_activations), len(members)]
    for w in members:
        freeze_member(w, tensors, numbers)
    return remembered(backend, tensors, [len(tensors), *numbers], prepared)


def packed_state(linear: CpuLinear) -> tuple[list[torch.Tensor], list[int]]:
    """The packed tensors, and numbers that tell `packed_linear` what they are, wherever they lie then."""
    tensors = [t for m in linear.matrices for t in m.tensors] + [t for t in linear.vectors if t is not None]
    numbers = strip_addresses(linear.descriptor.tolist(), tensors)
    return tensors, [linear.in_features, linear.out_features, linear.scratch_columns, *numbers]


def packed_linear(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> CpuLinear:
    """A linear over the tensors of another's `packed_state`, or equal ones. Raises KernelError where they don't fit."""
    linear = CpuLinear.__new__(CpuLinear)
    linear.in_features, linear.out_features, linear.scratch_columns = numbers[:3]
    linear.matrices, linear.vectors = [], list(tensors)
    linear.descriptor = cpu_library.integers(with_addresses(numbers[3:], tensors))
    linear.native = cpu_library.operation("linear_group")
    return linear


def as_text(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))


def as_numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def freeze_member(w: LinearWeights, tensors: list[torch.Tensor], numbers: list[int]) -> None:
    numbers += [KINDS.index(w.kind), w.in_features, w.out_features, NONE if w.rank is None else w.rank]
    numbers += [len(w.out_dims), *w.out_dims, *w.in_dims, *w.bonds]
    numbers += [int(w.pivot is not None), int(w.bias is not None), len(w.cores)]
    tensors += [t for t in (w.pivot, w.bias) if t is not None]
    for core in w.cores:
        freeze_core(core, tensors, numbers)


def freeze_core(core: Core, tensors: list[torch.Tensor], numbers: list[int]) -> None:
    numbers += [int(core.scale is not None), int(core.zero is not None), core.group]
    numbers += [NONE if core.columns is None else core.columns]
    tensors += [t for t in (core.data, core.scale, core.zero) if t is not None]


# ------------------------------------------------------------------------------------------------------------- thaw


def thaw_core(tensors: Iterator[torch.Tensor], numbers: Iterator[int]) -> Core:
    has_scale, has_zero, group, columns = (next(numbers) for _ in range(4))
    data = next(tensors)
    scale = next(tensors) if has_scale else None
    zero = next(tensors) if has_zero else None
    return Core(data, scale, zero, group, None if columns == NONE else columns)


def thaw_member(tensors: Iterator[torch.Tensor], numbers: Iterator[int]) -> LinearWeights:
    kind, inp, out, rank, dims = (next(numbers) for _ in range(5))
    out_dims = tuple(next(numbers) for _ in range(dims))
    in_dims = tuple(next(numbers) for _ in range(dims))
    bonds = tuple(next(numbers) for _ in range(dims + 1 if dims else 0))
    has_pivot, has_bias, cores = (next(numbers) for _ in range(3))
    pivot = next(tensors) if has_pivot else None
    bias = next(tensors) if has_bias else None
    held = tuple(thaw_core(tensors, numbers) for _ in range(cores))
    return LinearWeights(
        KINDS[kind], inp, out, held, None if rank == NONE else rank, pivot, bias, out_dims, in_dims, bonds
    )


def build(backend: str, tensors: Sequence[torch.Tensor], layout: str) -> PreparedLinear:
    numbers = as_numbers(layout)
    if backend == "cpu":
        return packed_linear(tensors[1:], numbers)
    rest, held = iter(numbers), iter(tensors[1:])
    expected, int8_activations, count = (next(rest) for _ in range(3))
    if len(tensors) - 1 != expected:
        raise KernelError(f"the weights are {expected} tensors, not {len(tensors) - 1}")
    members = [thaw_member(held, rest) for _ in range(count)]
    return prepare(members, backend=backend, int8_activations=bool(int8_activations))


# What was frozen, and what `thaw` made, for as long as the first of its tensors lives: nobody else refers to that one.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remembered(
    backend: str, weights: Sequence[torch.Tensor], numbers: Sequence[int], prepared: PreparedLinear
) -> Frozen:
    tensors, layout = (weights[0].new_empty(0), *weights), as_text(numbers)
    _known[tensors[0]] = (prepared, [t.data_ptr() for t in tensors], layout)
    return Frozen(backend, tensors, layout, prepared.in_features, prepared.out_features)


def thaw(backend: str, tensors: Sequence[torch.Tensor], layout: str) -> PreparedLinear:
    """The linear that was frozen, or an equal one over the tensors as they are now.

    Remembered under the empty first tensor, which the linear itself does not hold: with it the memory goes too. A tensor
    that has moved since makes a new one. Raises KernelError where the tensors do not fit the layout.
    """
    pointers = [t.data_ptr() for t in tensors]
    known = _known.get(tensors[0])
    if known is not None and known[1] == pointers and known[2] == layout:
        return known[0]
    linear = build(backend, tensors, layout)
    _known[tensors[0]] = (linear, pointers, layout)
    return linear
