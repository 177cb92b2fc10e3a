"""Prepared linears as plain tensors and numbers, and back: how an operator of `torch_ops` refers to one.

Nothing hides in a table of handles: whoever holds the tensors holds the linear. So a graph that captured them can be copied,
saved and loaded, and the memory is given back with the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from cai_runtime.errors import KernelError
from cai_runtime.kernels.slim_linear import CpuLinear, PreparedLinear, ReferenceLinear, prepare
from cai_runtime.kernels.weights import Core, Kind, LinearWeights

KINDS: tuple[Kind, ...] = ("dense", "lowrank", "interpolative", "mpo")
NONE = -1  # an optional number that is absent


@dataclass(frozen=True)
class Frozen:
    """backend: as `prepare` takes it. tensors: the first is empty and stands for the linear, see `thaw`; the rest are the
    weights, packed if the backend packs them. layout: out_features, in_features, then what the tensors are."""

    backend: str
    tensors: tuple[torch.Tensor, ...]
    layout: tuple[int, ...]


def freeze(prepared: PreparedLinear) -> Frozen:
    """A prepared group that one call runs, of any backend, over the same memory. Raises KernelError for other objects."""
    if isinstance(prepared, CpuLinear):
        sizes = (prepared.out_features, prepared.in_features)
        tensors, numbers = prepared.state()
        return Frozen("cpu", (tensors[0].new_empty(0), *tensors), (*sizes, *numbers))
    if isinstance(prepared, ReferenceLinear):
        backend = "reference"
    else:
        backend = gpu_backend(prepared)
    members = cast(ReferenceLinear, prepared).members  # the others have it too
    tensors, numbers = [], [int(getattr(prepared, "_int8_activations", False)), len(members)]
    for w in members:
        freeze_member(w, tensors, numbers)
    sizes = (prepared.out_features, prepared.in_features)
    return Frozen(backend, (tensors[0].new_empty(0), *tensors), (*sizes, *numbers))


def gpu_backend(prepared: PreparedLinear) -> str:
    """ "triton" or "cuda". Raises KernelError for what is no such linear."""
    try:
        from cai_runtime.kernels.gpu import CudaOrTritonLinear, TritonLinear
    except ImportError:  # no triton here, so it is none of its linears either
        raise KernelError(f"a {type(prepared).__name__} is not a prepared group of linears") from None
    if isinstance(prepared, CudaOrTritonLinear):
        return "cuda"
    if isinstance(prepared, TritonLinear):
        return "triton"
    raise KernelError(f"a {type(prepared).__name__} is not a group that one call runs")


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


def build(backend: str, tensors: Sequence[torch.Tensor], layout: Sequence[int]) -> PreparedLinear:
    if backend == "cpu":
        return CpuLinear.from_state(tensors[1:], layout[2:])
    numbers, held = iter(layout[2:]), iter(tensors[1:])
    int8_activations, count = next(numbers), next(numbers)
    members = [thaw_member(held, numbers) for _ in range(count)]
    return prepare(members, backend=backend, int8_activations=bool(int8_activations))


# What `thaw` made, for as long as the first of its tensors lives: nobody else refers to that one.
_thawed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def thaw(backend: str, tensors: Sequence[torch.Tensor], layout: Sequence[int]) -> PreparedLinear:
    """The linear that was frozen, or an equal one over the tensors as they are now.

    Remembered under the empty first tensor, which the linear itself does not hold: with it the memory goes too. A tensor
    that has moved since makes a new one. Raises KernelError where the tensors do not fit the layout.
    """
    pointers = [t.data_ptr() for t in tensors]
    known = _thawed.get(tensors[0])
    if known is not None:
        linear, at, name, numbers = known
        if at == pointers and name == backend and numbers == layout:
            return linear
    linear = build(backend, tensors, layout)
    _thawed[tensors[0]] = (linear, pointers, backend, list(layout))
    return linear
