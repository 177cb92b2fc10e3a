"""What a slim checkpoint declares of its modules: kinds, stores, the shapes of their cores, and an entry as JSON.

`docs/format.md` is the specification in words; `config.py` has the whole `quantization_config`. No torch here: `cai inspect`
and the strict parsing need only the standard library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from cai_runtime.errors import (
    CheckpointError,
    InvalidConfigError,
    UnknownKindError,
    UnknownStoreError,
)
from cai_runtime.slim.shard import DTYPES

Kind = Literal["dense", "lowrank", "interpolative", "mpo"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_FEATURES = (1 << 31) - 1  # a pivot is int32
DENSE_REFERENCE_BYTES = 2  # `keep` in bytes is against the same module dense in bf16


class StoreType(NamedTuple):
    """How one core's numbers lie on disk; dtypes by safetensors' names."""

    dtype: str  # of the core's tensor
    bits: int  # per number
    scale: str | None = None  # dtype of `<core>_scale`, which has one number for each group of columns of each row
    group: int = 0  # columns of the core's matrix in a group; 0: all of them, the scale is [rows]
    zeros: bool = False  # whether `<core>_zero`, U8 of the scale's shape, holds the codes of 0

    @property
    def bytes_per_number(self) -> float:
        """Of a long row: with the scales and zero points of its groups, without what there is once a row."""
        per_group = (DTYPES[self.scale][1] if self.scale else 0) + self.zeros
        return self.bits / 8 + (per_group / self.group if self.group else 0)

    def tensors(self, core_shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """A core's tensors: what follows the core's name ("", "_scale", "_zero") -> (dtype, shape on disk)."""
        rows, columns = matrix_shape(core_shape)
        packed = (rows, -(-columns // 2)) if self.bits == 4 else core_shape
        found: dict[str, tuple[str, tuple[int, ...]]] = {"": (self.dtype, packed)}
        groups = (rows, -(-columns // self.group)) if self.group else (rows,)
        if self.scale is not None:
            found["_scale"] = (self.scale, groups)
        if self.zeros:
            found["_zero"] = ("U8", groups)
        return found


INT4_GROUPS = (32, 64, 128)
STORES: dict[str, StoreType] = {
    "fp32": StoreType("F32", 32),
    "bf16": StoreType("BF16", 16),
    "fp16": StoreType("F16", 16),
    "int8": StoreType("I8", 8, "F32"),
    **{f"int4-g{group}": StoreType("U8", 4, "BF16", group) for group in INT4_GROUPS},
    **{f"int4-g{group}-zp": StoreType("U8", 4, "BF16", group, True) for group in INT4_GROUPS},
}
STORE_ALIASES = {"int4": "int4-g64"}  # for people; a file holds the names of `STORES` alone
FLOAT_STORE_OF_DTYPE = {s.dtype: name for name, s in STORES.items() if s.scale is None}


def canonical_store(name: str) -> str:
    """The name that a file uses for what a person may call "int4"; any other name as it is."""
    return STORE_ALIASES.get(name, name)


_MODULE_KEYS = {
    "dense": {"kind", "store", "shape"},
    "lowrank": {"kind", "rank", "store", "shape"},
    "interpolative": {"kind", "rank", "store", "shape"},
    "mpo": {"kind", "rank", "store", "shape", "out_dims", "in_dims"},
}


@dataclass(frozen=True)
class ModuleSpec:
    """One linear module y = W x (+ bias) as it is stored; W is [out_features, in_features].

    Checked when made; a contradiction raises `InvalidConfigError`, `UnknownKindError` or `UnknownStoreError`.

    `rank`: None for dense; r for lowrank and interpolative; the inner bond dimensions (chi_1 .. chi_{n-1}) for an
    mpo of n cores (chi_0 = chi_n = 1). `store`: one name of `STORES` per core.
    """

    kind: Kind
    out_features: int
    in_features: int
    rank: int | tuple[int, ...] | None
    store: tuple[str, ...]
    out_dims: tuple[int, ...] = ()  # mpo only: product is out_features
    in_dims: tuple[int, ...] = ()  # mpo only: product is in_features

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem is not None:
            error, message = problem
            raise error(message)

    @property
    def core_names(self) -> tuple[str, ...]:
        """Names of the cores' tensors below the module's name: ("weight",) or ("core_0", "core_1", ...)."""
        if self.kind == "dense":
            return ("weight",)
        return tuple(f"core_{k}" for k in range(len(self.core_shapes)))

    @property
    def core_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the cores: 2-D, or [chi_{k-1}, out_k, in_k, chi_k] for mpo. Those on disk, except that int4 packs the
        core's matrix (`tensors`)."""
        out, inp, rank = self.out_features, self.in_features, self.rank
        if self.kind == "dense":
            return ((out, inp),)
        if self.kind == "mpo":
            assert isinstance(rank, tuple)
            bonds = (1, *rank, 1)
            return tuple(
                (bonds[k], o, i, bonds[k + 1]) for k, (o, i) in enumerate(zip(self.out_dims, self.in_dims, strict=True))
            )
        assert isinstance(rank, int)
        return ((rank, inp), (out if self.kind == "lowrank" else out - rank, rank))

    @property
    def matrix_shapes(self) -> tuple[tuple[int, int], ...]:
        """[rows, columns] of each core as the matrix that the runtime applies; scales go by its rows (and columns).

        For mpo the rows are (out_k, chi_k) and the columns (chi_{k-1}, in_k); elsewhere the core is the matrix.
        """
        return tuple(matrix_shape(shape) for shape in self.core_shapes)

    @property
    def has_pivot(self) -> bool:
        return self.kind == "interpolative"

    @property
    def parameters(self) -> int:
        """Stored weights: elements of all cores. Scales, zero points, pivot and bias are not parameters."""
        return sum(math.prod(shape) for shape in self.core_shapes)

    @property
    def nbytes(self) -> int:
        """Bytes on disk of cores, scales, zero points and pivot, without the bias (a dense module has the same one)."""
        return sum(math.prod(shape) * DTYPES[dtype][1] for dtype, shape in self.tensors("").values())

    @property
    def dense_parameters(self) -> int:
        return self.out_features * self.in_features

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same module dense in bf16."""
        return self.dense_parameters * DENSE_REFERENCE_BYTES

    @property
    def keep_parameters(self) -> float:
        """Stored parameters over dense parameters."""
        return self.parameters / self.dense_parameters

    @property
    def keep_bytes(self) -> float:
        """Stored bytes over the bytes of the same module dense in bf16."""
        return self.nbytes / self.dense_nbytes

    def tensors(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor that module `name` must have: full name -> (safetensors dtype, shape). The bias is optional."""
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
        for core, shape, store_name in zip(self.core_names, self.core_shapes, self.store, strict=True):
            stored = STORES[store_name].tensors(shape)
            wanted.update((f"{name}.{core}{suffix}", tensor) for suffix, tensor in stored.items())
        if self.has_pivot:
            wanted[f"{name}.pivot"] = ("I32", (self.out_features,))
        return wanted

    def to_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"kind": self.kind}
        if self.rank is not None:
            entry["rank"] = list(self.rank) if isinstance(self.rank, tuple) else self.rank
        entry |= {"store": list(self.store), "shape": [self.out_features, self.in_features]}
        if self.kind == "mpo":
            entry |= {"out_dims": list(self.out_dims), "in_dims": list(self.in_dims)}
        return entry

    @classmethod
    def from_json(cls, name: str, entry: object, file: str | Path | None = None) -> ModuleSpec:
        """Parse one entry of `modules`, strictly. Errors carry `file`, and the module's name as `.tensor`.

        Raises:
            InvalidConfigError: a key is unknown, missing, of the wrong type, or contradicts another.
            UnknownKindError, UnknownStoreError: the kind, or a core's store, is not one of this version.
        """

        def fail(message: str, error: type[CheckpointError] = InvalidConfigError) -> CheckpointError:
            return error(f"quantization_config: module {name!r}: {message}", file=file, tensor=name)

        if not isinstance(entry, dict):
            raise fail(f"must be an object, is {type(entry).__name__}")
        kind = entry.get("kind")
        if "kind" not in entry:
            raise fail("has no 'kind'")
        if not isinstance(kind, str) or kind not in KINDS:
            raise fail(f"kind {kind!r} is unknown; this version reads {', '.join(KINDS)}", UnknownKindError)
        unknown, missing = sorted(set(entry) - _MODULE_KEYS[kind]), sorted(_MODULE_KEYS[kind] - set(entry))
        if unknown:
            raise fail(f"has unknown keys {unknown} for kind {kind}; a newer version may have written it")
        if missing:
            raise fail(f"lacks {missing}, which kind {kind} needs")
        store, shape, rank = entry["store"], entry["shape"], entry.get("rank")
        if not isinstance(store, list) or not all(isinstance(s, str) for s in store):
            raise fail(f"'store' must be a list of names, is {store!r}")
        for key in ("shape", "out_dims", "in_dims"):
            if key in entry and not _is_int_list(entry[key]):
                raise fail(f"{key!r} must be a list of integers, is {entry[key]!r}")
        if len(shape) != 2:
            raise fail(f"'shape' must be [out, in], is {shape!r}")
        if kind == "mpo":
            if not _is_int_list(rank):
                raise fail(f"'rank' of an mpo must be the list of its inner bond dimensions, is {rank!r}")
            rank = tuple(rank or ())
        try:
            return cls(
                kind=kind,  # pyright: ignore[reportArgumentType]
                out_features=shape[0],
                in_features=shape[1],
                rank=rank,
                store=tuple(store),
                out_dims=tuple(entry.get("out_dims", ())),
                in_dims=tuple(entry.get("in_dims", ())),
            )
        except CheckpointError as e:
            raise fail(str(e), type(e)) from None


def matrix_shape(core_shape: tuple[int, ...]) -> tuple[int, int]:
    """[rows, columns] of a core's matrix; see `ModuleSpec.matrix_shapes`."""
    if len(core_shape) == 4:
        left, out, inp, right = core_shape
        return (out * right, left * inp)
    rows, cols = core_shape
    return (rows, cols)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_FEATURES


def _is_int_list(value: object) -> bool:
    return isinstance(value, list) and all(_is_int(v) for v in value)


def _problem(spec: ModuleSpec) -> tuple[type[CheckpointError], str] | None:
    """What is wrong with a spec, as (error class, message), or None."""
    bad = InvalidConfigError
    if spec.kind not in KINDS:
        return UnknownKindError, f"kind {spec.kind!r} is unknown; this version reads {', '.join(KINDS)}"
    if not (_is_size(spec.out_features) and _is_size(spec.in_features)):
        return bad, f"shape [{spec.out_features!r}, {spec.in_features!r}] must be two positive 32-bit integers"
    out, inp, rank = spec.out_features, spec.in_features, spec.rank
    cores = {"dense": 1, "lowrank": 2, "interpolative": 2}.get(spec.kind, len(spec.out_dims))
    if spec.kind == "dense" and rank is not None:
        return bad, f"a dense module has no rank, but rank is {rank!r}"
    if spec.kind in ("lowrank", "interpolative") and not _is_size(rank):
        return bad, f"rank must be a positive integer, is {rank!r}"
    if isinstance(rank, int) and rank > min(out, inp):
        return bad, f"rank {rank} exceeds the smaller side of [{out}, {inp}]"
    if spec.kind == "mpo":
        dims = (*spec.out_dims, *spec.in_dims)
        if cores < 1 or len(spec.in_dims) != cores or not all(map(_is_size, dims)):
            return bad, f"out_dims {spec.out_dims} and in_dims {spec.in_dims} must be equally many positive integers"
        if math.prod(spec.out_dims) != out or math.prod(spec.in_dims) != inp:
            return bad, f"the products of out_dims {spec.out_dims} and in_dims {spec.in_dims} are not [{out}, {inp}]"
        if not isinstance(rank, tuple) or len(rank) != cores - 1 or not all(map(_is_size, rank)):
            return bad, f"rank must be the {cores - 1} positive inner bond dimensions of {cores} cores, is {rank!r}"
    elif spec.out_dims or spec.in_dims:
        return bad, f"out_dims and in_dims belong to mpo modules, not to {spec.kind}"
    if not isinstance(spec.store, tuple) or len(spec.store) != cores:
        return bad, f"store {spec.store!r} must name one store for each of the {cores} cores"
    for name in spec.store:
        if name not in STORES:
            return UnknownStoreError, f"store {name!r} is unknown; this version reads {', '.join(STORES)}"
    return None
