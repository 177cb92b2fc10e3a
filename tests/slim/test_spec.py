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
from cai_runtime.slim.spec import STORES, ModuleSpec, SlimConfig

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
    size = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "I32": 4}
    tensors = spec.tensors("m")
    assert spec.nbytes == sum(math.prod(shape) * size[dtype] for dtype, shape in tensors.values())
    cores = [shape for name, (_, shape) in tensors.items() if not name.endswith(("_scale", "pivot"))]
    assert spec.parameters == sum(map(math.prod, cores))
    out, inp, r = spec.out_features, spec.in_features, spec.rank
    if spec.kind == "lowrank":
        assert isinstance(r, int) and spec.parameters == r * (out + inp)
    if spec.kind == "interpolative":
        assert isinstance(r, int) and spec.parameters == r * (out + inp - r) <= out * inp
    assert spec.keep_parameters == spec.parameters / (out * inp)
    assert spec.keep_bytes == spec.nbytes / (2 * out * inp)


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
