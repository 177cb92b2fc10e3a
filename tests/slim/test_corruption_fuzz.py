"""Arbitrary damage to a checkpoint's bytes or JSON: it is read, or the error is a typed one that names the file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai_runtime.errors import CheckpointError
from cai_runtime.slim.reader import Checkpoint

SHARD, CONFIG = "model.safetensors", "config.json"


def read_everything(path: Path) -> bool:
    """Whether it could be read. Any exception other than a CheckpointError goes through."""
    try:
        with Checkpoint.open(path) as checkpoint:
            checkpoint.verify(progress=False)
            for name in checkpoint.modules:
                assert bool(torch.isfinite(checkpoint.module(name).dense(torch.float64)).all())
    except CheckpointError as e:
        assert e.file is not None
        return False
    return True


@pytest.fixture(scope="module")
def good_files() -> dict[str, bytes]:
    from cai_runtime.slim.spec import ModuleSpec
    from cai_runtime.slim.writer import CheckpointWriter

    with tempfile.TemporaryDirectory() as folder:
        with CheckpointWriter(Path(folder) / "c", config={"model_type": "x"}) as writer:
            generator = torch.Generator().manual_seed(3)
            for k, spec in enumerate(
                [
                    ModuleSpec("interpolative", 6, 4, 3, ("int8", "bf16")),
                    ModuleSpec("mpo", 4, 6, (3,), ("int8", "int4-g32-zp"), (2, 2), (2, 3)),
                ]
            ):
                cores = [torch.randn(shape, generator=generator) for shape in spec.core_shapes]
                writer.add_module(f"m{k}", spec, cores, pivot=torch.randperm(6) if spec.has_pivot else None)
            writer.finish()
        return {name: (Path(folder) / "c" / name).read_bytes() for name in (CONFIG, SHARD)}


def write_files(folder: str, files: dict[str, bytes]) -> Path:
    for name, raw in files.items():
        (Path(folder) / name).write_bytes(raw)
    return Path(folder)


FUZZ = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_flipped_and_cut_bytes(good_files: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([SHARD, SHARD, CONFIG]))
    raw = bytearray(good_files[name])
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    with tempfile.TemporaryDirectory() as folder:
        read_everything(write_files(folder, good_files | {name: bytes(raw)}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def replaced(value: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """`value` with one node of it, at any depth, replaced or dropped."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    copy = value.copy()
    if draw(st.integers(0, 4)) == 0:
        del copy[key]
    else:
        copy[key] = replaced(value[key], draw)
    return copy


@FUZZ
@given(data=st.data())
def test_any_json_in_config_and_header(good_files: dict[str, bytes], data: st.DataObject) -> None:
    files = dict(good_files)
    if data.draw(st.booleans()):
        config = replaced(json.loads(files[CONFIG]), data.draw)
        files[CONFIG] = json.dumps(config).encode()
    else:
        length = int.from_bytes(files[SHARD][:8], "little")
        header = json.dumps(replaced(json.loads(files[SHARD][8 : 8 + length]), data.draw)).encode()
        files[SHARD] = len(header).to_bytes(8, "little") + header + files[SHARD][8 + length :]
    with tempfile.TemporaryDirectory() as folder:
        read_everything(write_files(folder, files))


def test_the_untouched_files_are_read(good_files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert read_everything(write_files(folder, good_files))
