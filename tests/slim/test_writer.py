"""The destination is complete or untouched, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cai_runtime import errors
from cai_runtime.slim import publish
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import ModuleSpec
from cai_runtime.slim.stores import CoreData, quantize
from cai_runtime.slim.writer import CheckpointWriter

LOW = ModuleSpec("lowrank", 8, 6, 2, ("fp32", "fp32"))
INTER = ModuleSpec("interpolative", 8, 6, 2, ("int8", "int8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def cores(spec: ModuleSpec) -> list[torch.Tensor]:
    return [torch.randn(shape) for shape in spec.core_shapes]


def test_files_copied_from_the_source(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    wanted = ["tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"]
    wanted += ["additional_chat_templates/tool_use.jinja"]
    for name in [*wanted, "model.safetensors", "pytorch_model.bin", "modeling_x.py", "README.md", "slim_report.json"]:
        (source / name).write_text(name)
    (source / "vocab.json").symlink_to(source / "tokenizer.json")  # the hub's cache is made of links
    config = {"model_type": "llama", "quantization_config": {"quant_method": "old"}}
    path = write_checkpoint(tmp_path / "c", source_dir=source, config=config)
    found = contents(path)
    assert set(found) == {*wanted, "vocab.json", "config.json", "model.safetensors", "slim_report.json"}
    assert all(found[name] == name.encode() for name in wanted) and found["vocab.json"] == b"tokenizer.json"
    assert not (path / "vocab.json").is_symlink()
    assert json.loads(found["slim_report.json"]) == {"keep": 0.5}
    written = json.loads(found["config.json"])
    assert written["model_type"] == "llama" and written["quantization_config"]["quant_method"] == "cai"
    assert config["quantization_config"] == {"quant_method": "old"}  # the caller's own dict is left alone
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_taken_destination_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, overwrite in (("full", False), ("file", False), ("file", True)):
        with pytest.raises(errors.CheckpointWriteError) as caught:
            CheckpointWriter(tmp_path / name, config={}, overwrite=overwrite)
        assert caught.value.file == str(tmp_path / name)
    assert contents(tmp_path) == {"full/precious.txt": b"mine", "file": b"mine"}


def test_an_empty_destination_and_missing_parents_are_fine(
    tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a/b/c"):
        with Checkpoint.open(write_checkpoint(path)) as checkpoint:
            checkpoint.verify(progress=False)


def test_a_destination_taken_meanwhile_is_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "c", config={}) as writer:
        writer.add_tensor("a", torch.ones(2))
        (tmp_path / "c").mkdir()
        (tmp_path / "c/other").write_text("theirs")
        with pytest.raises(errors.CheckpointWriteError, match="not empty"):
            writer.finish()
    assert contents(tmp_path) == {"c/other": b"theirs"}


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_the_whole_directory(
    tmp_path: Path, write_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    path = write_checkpoint(tmp_path / "c", max_shard_bytes=200)
    (path / "stale.txt").write_text("old")
    with Checkpoint.open(path) as old:
        kept = old.tensor("embed.weight")
        expected = kept.clone()
        write_checkpoint(path, seed=1, overwrite=True)
        assert torch.equal(kept, expected)  # whoever has the old one open goes on reading the old one
    assert set(contents(path)) == {"config.json", "model.safetensors", "slim_report.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    with Checkpoint.open(path) as new:
        assert not torch.equal(new.tensor("embed.weight"), expected)


def test_overwrite_keeps_the_old_one_when_the_swap_fails(
    tmp_path: Path, write_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "c")
    before = contents(tmp_path)
    monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(errors.CheckpointWriteError, match="Input/output error"):
        write_checkpoint(path, seed=1, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_the_exchange_is_a_swap(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    if not publish._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system can't exchange names")
    assert contents(tmp_path) == {"a/f": b"b", "b/f": b"a"}
    assert not publish._exchange(tmp_path / "a", tmp_path / "none")


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, write_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    path = write_checkpoint(tmp_path / "c")
    before = contents(tmp_path)
    calls = 0

    def full(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:  # on the first shard, a later one, a JSON file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(errors.CheckpointWriteError, match="No space left") as caught:
        write_checkpoint(path, seed=1, overwrite=True, max_shard_bytes=400)
    assert caught.value.file == str(path) and isinstance(caught.value.__cause__, OSError)
    assert contents(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_a_real_refusal_of_the_system_leaves_nothing(tmp_path: Path) -> None:
    script = """
import resource, sys, torch
from cai_runtime.errors import CheckpointWriteError
from cai_runtime.slim.writer import CheckpointWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with CheckpointWriter(sys.argv[1], config={}, max_shard_bytes=5_000) as writer:
        writer.add_tensor("small", torch.ones(1_000))
        writer.add_tensor("large", torch.ones(100_000))
        writer.finish()
except CheckpointWriteError as e:
    print("typed:", e)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "c")], capture_output=True, text=True, cwd=Path.cwd()
    )
    assert "typed: can't be written: File too large" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finish_or_by_an_error_leaves_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "c", config={}, max_shard_bytes=1) as writer:
        writer.add_tensor("a", torch.ones(2))
        writer.add_tensor("b", torch.ones(2))
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "c", config={}):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_finished_writer_takes_no_more(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "c", config={}) as writer:
        writer.add_tensor("a", torch.ones(2))
        writer.finish()
        with pytest.raises(errors.CheckpointWriteError, match="finished"):
            writer.add_tensor("b", torch.ones(2))
        with pytest.raises(errors.CheckpointWriteError, match="finished"):
            writer.finish()
    assert (tmp_path / "c/model.safetensors").exists()


def test_an_empty_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointWriteError, match="nothing"), CheckpointWriter(tmp_path / "c", config={}) as w:
        w.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [{"a": float("nan")}, {"a": {1, 2}}])
def test_a_config_or_report_that_is_no_json(tmp_path: Path, bad: dict[str, Any]) -> None:
    for config, report in ((bad, {}), ({}, bad)):
        with pytest.raises(errors.InvalidConfigError), CheckpointWriter(tmp_path / "c", config=config) as writer:
            writer.add_tensor("a", torch.ones(2))
            writer.finish(report)
    assert list(tmp_path.iterdir()) == []


def test_what_was_added_may_change_afterwards(tmp_path: Path) -> None:
    tensor, parts = torch.ones(4, 4), cores(LOW)
    expected = parts[0].clone()
    with CheckpointWriter(tmp_path / "c", config={}) as writer:
        writer.add_tensor("transposed", tensor.t()[:2])
        writer.add_module("m", LOW, parts)
        tensor.zero_()
        parts[0].zero_()
        writer.finish()
    with Checkpoint.open(tmp_path / "c") as checkpoint:
        assert torch.equal(checkpoint.tensor("transposed"), torch.ones(2, 4))
        assert torch.equal(checkpoint.module("m").cores[0].data, expected)


INT4 = ModuleSpec("dense", 3, 35, None, ("int4-g32-zp",))
INT4_DAMAGE = [
    ("no scale", errors.TensorShapeError, "m.weight_scale"),
    ("no zero", errors.TensorShapeError, "m.weight_zero"),
    ("fp32 scale", errors.TensorDtypeError, "m.weight_scale"),
    ("int8 codes", errors.TensorDtypeError, "m.weight"),
    ("unpacked", errors.TensorShapeError, "m.weight"),
    ("one scale a row", errors.TensorShapeError, "m.weight_scale"),
    ("scale 0", errors.InvalidConfigError, "m.weight_scale"),
    ("zero 16", errors.InvalidConfigError, "m.weight_zero"),
    ("half byte", errors.InvalidConfigError, "m.weight"),
    ("another group", errors.TensorDtypeError, "m.weight"),
    ("another shape", errors.TensorShapeError, "m.weight"),
]


def damaged_int4(what: str) -> CoreData:
    """A core of `INT4` with one thing wrong."""
    good = quantize(torch.linspace(-1, 2, 105).view(3, 35), "int4-g32-zp")
    data, scale, zero = good.data.clone(), good.scale, good.zero
    assert scale is not None and zero is not None
    match what:
        case "no scale":
            return replace(good, scale=None)
        case "no zero":
            return replace(good, zero=None)
        case "fp32 scale":
            return replace(good, scale=scale.float())
        case "int8 codes":
            return replace(good, data=data.to(torch.int8))
        case "unpacked":
            return replace(good, data=torch.zeros(3, 35, dtype=torch.uint8))
        case "one scale a row":
            return replace(good, scale=scale[:, :1], zero=zero[:, :1])
        case "scale 0":
            return replace(good, scale=torch.zeros_like(scale))
        case "zero 16":
            return replace(good, zero=zero + 16)
        case "half byte":
            data[1, -1] |= 16
            return replace(good, data=data)
        case "another group":
            return quantize(torch.ones(3, 35), "int4-g64-zp")
        case "another shape":
            return quantize(torch.ones(3, 36), "int4-g32-zp")
    raise AssertionError(what)


@pytest.mark.parametrize(
    ("error", "tensor", "arguments"),
    [
        (errors.TensorShapeError, "m.core_1", (LOW, [torch.ones(2, 6), torch.ones(2, 8)])),
        (errors.InvalidConfigError, "m", (LOW, [torch.ones(2, 6)])),
        (errors.InvalidPivotError, "m", (LOW, [torch.ones(2, 6), torch.ones(8, 2)], torch.arange(8))),
        (errors.InvalidPivotError, "m", (INTER, [torch.ones(2, 6), torch.ones(6, 2)])),
        (errors.InvalidPivotError, "m.pivot", (INTER, [torch.ones(2, 6), torch.ones(6, 2)], torch.zeros(8))),
        (errors.InvalidPivotError, "m.pivot", (INTER, [torch.ones(2, 6), torch.ones(6, 2)], torch.arange(7))),
        (errors.TensorShapeError, "m.bias", (LOW, [torch.ones(2, 6), torch.ones(8, 2)], None, torch.ones(6))),
        (errors.TensorDtypeError, "m.bias", (LOW, [torch.ones(2, 6), torch.ones(8, 2)], None, torch.arange(8))),
        (errors.NonFiniteTensorError, "m.core_1", (LOW, [torch.ones(2, 6), torch.full((8, 2), torch.nan)])),
        (errors.NonFiniteTensorError, "m.bias", (LOW, cores(LOW), None, torch.full((8,), torch.inf))),
        (errors.TensorDtypeError, "m.core_0", (INTER, [CoreData(torch.ones(2, 6), None, "fp32")] * 2, torch.arange(8))),
        (
            errors.TensorShapeError,
            "m.core_0_scale",
            (INTER, [CoreData(torch.ones(2, 6).to(torch.int8), None, "int8"), torch.ones(6, 2)], torch.arange(8)),
        ),
        (
            errors.InvalidConfigError,
            "m.core_0_scale",
            (
                INTER,
                [CoreData(torch.ones(2, 6).to(torch.int8), torch.tensor([1.0, 0.0]), "int8"), torch.ones(6, 2)],
                torch.arange(8),
            ),
        ),
        *[(error, tensor, (INT4, [damaged_int4(what)])) for what, error, tensor in INT4_DAMAGE],
    ],
)
def test_modules_that_contradict_their_spec(
    tmp_path: Path, error: type[errors.CheckpointError], tensor: str, arguments: tuple[Any, ...]
) -> None:
    with CheckpointWriter(tmp_path / "c", config={}) as writer:
        with pytest.raises(errors.CheckpointError) as caught:
            writer.add_module("m", *arguments)
        assert type(caught.value) is error and caught.value.tensor == tensor
        writer.add_module("m", LOW, cores(LOW))  # nothing of the bad one was kept
        writer.finish()
    with Checkpoint.open(tmp_path / "c") as checkpoint:
        assert set(checkpoint.tensors()) == {"m.core_0", "m.core_1"}


def test_names_twice_and_tensors_without_a_type(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "c", config={}, max_shard_bytes=1) as writer:
        writer.add_tensor("a", torch.ones(2))
        writer.add_tensor("m.core_1", torch.ones(2))
        for act in (lambda: writer.add_tensor("a", torch.ones(2)), lambda: writer.add_module("m", LOW, cores(LOW))):
            with pytest.raises(errors.InvalidConfigError, match="already added"):
                act()
        with pytest.raises(errors.InvalidConfigError, match="name"):
            writer.add_tensor("__metadata__", torch.ones(2))
        with pytest.raises(errors.TensorDtypeError):
            writer.add_tensor("complex", torch.ones(2, dtype=torch.complex128))


def test_packing_is_quantize(tmp_path: Path) -> None:
    parts = cores(INTER)
    with CheckpointWriter(tmp_path / "c", config={}) as writer:
        writer.add_module("m", INTER, parts, pivot=torch.arange(8).flip(0))
        writer.finish()
    with Checkpoint.open(tmp_path / "c") as checkpoint:
        module = checkpoint.module("m")
        assert module.pivot is not None and module.pivot.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
        packed = quantize(parts[1], "int8").tensors
        assert packed.keys() == module.cores[1].tensors.keys() == {"", "_scale"}
        assert all(torch.equal(module.cores[1].tensors[suffix], tensor) for suffix, tensor in packed.items())
