"""Whether a checkpoint's tensors are those that its modules' entries imply, from headers alone; and the pivots, whose values
decide where rows go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cai_runtime.errors import (
    InvalidConfigError,
    InvalidPivotError,
    MissingFileError,
    TensorDtypeError,
    TensorMissingError,
    TensorShapeError,
)
from cai_runtime.slim.shard import TensorInfo
from cai_runtime.slim.spec import FLOAT_STORE_OF_DTYPE, ModuleSpec


def check_modules(path: Path, forms: Mapping[str, Sequence[ModuleSpec]], tensors: Mapping[str, TensorInfo]) -> None:
    """Check every listed module. forms: by module name, its listed spec and, behind it, the second form of an elastic module
    that has two. tensors: all of the checkpoint in `path`, by name.

    Raises TensorMissingError, TensorShapeError, TensorDtypeError, InvalidConfigError, InvalidPivotError, MissingFileError.
    """
    for name, specs in forms.items():
        for spec in specs:
            _check_tensors(path, name, spec, tensors)
        _check_bias(name, specs[0], tensors)
        _check_nothing_else(name, specs, tensors)
    for name, specs in forms.items():
        if specs[0].has_pivot:
            _check_pivot(specs[0], tensors[f"{name}.pivot"])


def _check_tensors(path: Path, name: str, spec: ModuleSpec, tensors: Mapping[str, TensorInfo]) -> None:
    for tensor, (dtype, shape) in spec.tensors(name).items():
        info = tensors.get(tensor)
        if info is None:
            raise TensorMissingError(f"module {name} of kind {spec.kind} needs it", file=path, tensor=tensor)
        if info.dtype != dtype:
            raise TensorDtypeError(
                f"module {name} of kind {spec.kind}, store {list(spec.store)}, needs {dtype}, is {info.dtype}",
                file=info.file,
                tensor=tensor,
            )
        if info.shape != shape:
            raise TensorShapeError(
                f"module {name} of kind {spec.kind}, rank {spec.rank}, needs {list(shape)}, is {list(info.shape)}",
                file=info.file,
                tensor=tensor,
            )


def _check_bias(name: str, spec: ModuleSpec, tensors: Mapping[str, TensorInfo]) -> None:
    bias = tensors.get(f"{name}.bias")
    if bias is not None and bias.dtype not in FLOAT_STORE_OF_DTYPE:
        raise TensorDtypeError(
            f"a bias must be {', '.join(FLOAT_STORE_OF_DTYPE)}, is {bias.dtype}", file=bias.file, tensor=bias.name
        )
    if bias is not None and bias.shape != (spec.out_features,):
        raise TensorShapeError(
            f"a bias must be [{spec.out_features}], is {list(bias.shape)}", file=bias.file, tensor=bias.name
        )


def _check_nothing_else(name: str, specs: Sequence[ModuleSpec], tensors: Mapping[str, TensorInfo]) -> None:
    """What no entry explains, a left-over dense weight say, would make it a guess which of the two is the module."""
    wanted = {tensor for spec in specs for tensor in spec.tensors(name)}
    cores = ["weight", *(f"core_{k}" for k in range(len(specs[0].store) + 1))]
    for suffix in ("pivot", *cores, *(core + beside for core in cores for beside in ("_scale", "_zero"))):
        extra = f"{name}.{suffix}"
        if extra in tensors and extra not in wanted:
            raise InvalidConfigError(
                f"module {name} of kind {specs[0].kind}, store {list(specs[0].store)}, has no use for this tensor",
                file=tensors[extra].file,
                tensor=extra,
            )


def _check_pivot(spec: ModuleSpec, info: TensorInfo) -> None:
    import numpy as np

    try:
        pivot = np.fromfile(info.file, dtype="<i4", count=spec.out_features, offset=info.start)
    except OSError as e:
        raise MissingFileError(f"can't be read: {e.strerror or e}", file=info.file, tensor=info.name) from None
    if not np.array_equal(np.sort(pivot), np.arange(spec.out_features, dtype=np.int32)):
        raise InvalidPivotError(
            f"is not a permutation of 0..{spec.out_features - 1}; the file is damaged",
            file=info.file,
            tensor=info.name,
        )
