"""Module specs: derived shapes and counts, JSON there and back, and strictness."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_runtime.errors import (
    CheckpointError,
    InvalidConfigError,
    UnknownKindError,
    UnknownStoreError,
    UnknownVersionError,
)
from cai_runtime.slim.config import SlimConfig
from cai_runtime.slim.spec import STORE_ALIASES, STORES, ModuleSpec, canonical_store

STORE = st.sampled_from(sorted(STORES))


@st.composite
def specs(draw: st.DrawFn) -> ModuleSpec:
    kind = draw(st.sampled_from(["dense", "lowrank", "interpolative", "mpo"]))
    if kind == "mpo":
        n = draw(st.integers(1, 4))
        out_dims, in_dims = (tuple(draw(st.lists(st.integers(1, 5), min_size=n, max_size=n))) for _ in range(2))
        rank = tuple(draw(st.lists(st.integers(1, 6), min_size=n - 1, max_size=n - 1)))
        store = tuple(draw(st.lists(STORE, min_size=n, max_size=n)))
        return ModuleSpec("mpo", math.prod(out_dims), math.prod(in_dims), rank, store, out_dims, in_dims)
    out, inp = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    if kind == "dense":
        return ModuleSpec("dense", out, inp, None, (draw(STORE),))
    return ModuleSpec(kind, out, inp, draw(st.integers(1, min(out, inp))), (draw(STORE), draw(STORE)))  # pyright: ignore[reportArgumentType]


@settings(deadline=None)
@given(spec=specs())
def test_json_round_trip(spec: ModuleSpec) -> None:
    config = {"quantization_config": SlimConfig({"m": spec}).to_json()}
    again = SlimConfig.from_config(json.loads(json.dumps(config)))
    assert again is not None and again.modules == {"m": spec}


@settings(deadline=None)
@given(spec=specs())
def test_counts_are_those_of_the_tensors(spec: ModuleSpec) -> None:
    size = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "I32": 4, "U8": 1}
    tensors = spec.tensors("m")
    assert spec.nbytes == sum(math.prod(shape) * size[dtype] for dtype, shape in tensors.values())
    assert spec.parameters == sum(map(math.prod, spec.core_shapes))
    for name, shape, store in zip(spec.core_names, spec.core_shapes, spec.store, strict=True):
        assert store.startswith("int4") or tensors[f"m.{name}"][1] == shape
    out, inp, r = spec.out_features, spec.in_features, spec.rank
    if spec.kind == "lowrank":
        assert isinstance(r, int) and spec.parameters == r * (out + inp)
    if spec.kind == "interpolative":
        assert isinstance(r, int) and spec.parameters == r * (out + inp - r) <= out * inp
    assert spec.keep_parameters == spec.parameters / (out * inp)
    assert spec.keep_bytes == spec.nbytes / (2 * out * inp)


@pytest.mark.parametrize(
    ("store", "shape", "nbytes"),
    [
        ("int8", (10, 64), 10 * 64 + 10 * 4),
        ("int4-g32", (10, 64), 10 * 32 + 10 * 2 * 2),
        ("int4-g64", (10, 64), 10 * 32 + 10 * 1 * 2),
        ("int4-g128", (10, 64), 10 * 32 + 10 * 1 * 2),
        ("int4-g32-zp", (10, 65), 10 * 33 + 10 * 3 * 3),
        ("int4-g64-zp", (10, 129), 10 * 65 + 10 * 3 * 3),
        ("int4-g128-zp", (10, 257), 10 * 129 + 10 * 3 * 3),
        ("int4-g64", (1, 1), 1 + 2),
    ],
)
def test_bytes_of_packed_stores(store: str, shape: tuple[int, int], nbytes: int) -> None:
    assert ModuleSpec("dense", *shape, None, (store,)).nbytes == nbytes


def test_int4_of_an_mpo_lies_as_its_cores_matrices() -> None:
    spec = ModuleSpec("mpo", 24, 40, (5,), ("int4-g32-zp", "int8"), (4, 6), (5, 8))
    assert spec.core_shapes == ((1, 4, 5, 5), (5, 6, 8, 1)) and spec.parameters == 100 + 240
    assert spec.tensors("m") == {
        "m.core_0": ("U8", (20, 3)),  # 5 columns
        "m.core_0_scale": ("BF16", (20, 1)),
        "m.core_0_zero": ("U8", (20, 1)),
        "m.core_1": ("I8", (5, 6, 8, 1)),
        "m.core_1_scale": ("F32", (6,)),
    }


def test_a_short_name_is_for_people_alone() -> None:
    assert canonical_store("int4") == "int4-g64" and canonical_store("int4-g128") == "int4-g128"
    assert set(STORE_ALIASES).isdisjoint(STORES) and set(STORE_ALIASES.values()) <= set(STORES)
    with pytest.raises(UnknownStoreError, match=r"'int4' is unknown.*int8, int4-g32, .*int4-g128-zp"):
        ModuleSpec.from_json("m", {"kind": "dense", "store": ["int4"], "shape": [4, 6]})


def entry(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"kind": "lowrank", "rank": 2, "store": ["int8", "int8"], "shape": [4, 6]}
    return {k: v for k, v in (base | changes).items() if v != "absent"}


MPO = {"kind": "mpo", "out_dims": [2, 2], "in_dims": [2, 3]}


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (entry(kind="tucker"), UnknownKindError),
        (entry(kind=["lowrank"]), UnknownKindError),
        (entry(kind="absent"), InvalidConfigError),
        (entry(store=["int8", "int2"]), UnknownStoreError),
        (entry(store=["int8"]), InvalidConfigError),
        (entry(store="int8"), InvalidConfigError),
        (entry(store=[8, 8]), InvalidConfigError),
        (entry(rank="absent"), InvalidConfigError),
        (entry(rank=0), InvalidConfigError),
        (entry(rank=True), InvalidConfigError),
        (entry(rank=2.0), InvalidConfigError),
        (entry(rank=5), InvalidConfigError),
        (entry(rank=[2]), InvalidConfigError),
        (entry(shape=[4]), InvalidConfigError),
        (entry(shape=[4, -6]), InvalidConfigError),
        (entry(shape=[4, 10**30]), InvalidConfigError),
        (entry(shape="4x6"), InvalidConfigError),
        (entry(group_size=32), InvalidConfigError),
        (entry(out_dims=[2, 2]), InvalidConfigError),
        (entry(kind="dense", store=["bf16"]), InvalidConfigError),  # a rank that means nothing
        (entry(**MPO, rank=[2], store=["int8"]), InvalidConfigError),
        (entry(**MPO, rank=[2, 2]), InvalidConfigError),
        (entry(**MPO, rank=2), InvalidConfigError),
        (entry(**(MPO | {"out_dims": [2, 3]}), rank=[2]), InvalidConfigError),
        (entry(**(MPO | {"in_dims": [6]}), rank=[2]), InvalidConfigError),
        (["lowrank"], InvalidConfigError),
        (None, InvalidConfigError),
    ],
)
def test_bad_entries(bad: Any, error: type[CheckpointError]) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModuleSpec.from_json("layers.3.q", bad, "dir/config.json")
    assert type(caught.value) is error
    assert caught.value.file == "dir/config.json" and caught.value.tensor == "layers.3.q"


def test_good_entries() -> None:
    assert ModuleSpec.from_json("m", entry()).core_shapes == ((2, 6), (4, 2))
    assert ModuleSpec.from_json("m", entry(**MPO, rank=[5])).core_shapes == ((1, 2, 2, 5), (5, 2, 3, 1))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"format_version": 2}, UnknownVersionError),
        ({"format_version": 2, "groups": {}}, UnknownVersionError),  # the version goes before what it may explain
        ({"format_version": "1"}, UnknownVersionError),
        ({"format_version": True}, UnknownVersionError),
        ({"format_version": 1.0}, UnknownVersionError),
        ({"quant_method": "gptq"}, InvalidConfigError),
        ({"modules": []}, InvalidConfigError),
        ({"bits": 4}, InvalidConfigError),
    ],
)
def test_bad_quantization_config(changes: dict[str, Any], error: type[CheckpointError]) -> None:
    raw = {"quant_method": "cai", "format_version": 1, "modules": {}} | changes
    with pytest.raises(CheckpointError) as caught:
        SlimConfig.from_config({"quantization_config": raw}, "config.json")
    assert type(caught.value) is error


@pytest.mark.parametrize("key", ["quant_method", "format_version", "modules"])
def test_missing_key_of_quantization_config(key: str) -> None:
    raw = {"quant_method": "cai", "format_version": 1, "modules": {}}
    del raw[key]
    with pytest.raises(InvalidConfigError):
        SlimConfig.from_config({"quantization_config": raw})


def test_a_config_without_quantization_is_dense() -> None:
    assert SlimConfig.from_config({"model_type": "llama"}) is None


def test_specs_made_in_python_are_checked_too() -> None:
    with pytest.raises(InvalidConfigError):
        ModuleSpec("interpolative", 4, 8, 5, ("int8", "int8"))
    with pytest.raises(UnknownStoreError):
        ModuleSpec("dense", 4, 8, None, ("int4",))
