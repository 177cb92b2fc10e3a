"""`cai inspect`: the numbers are those of the files, and keep is told in parameters and in bytes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cai_runtime.cli import inspect as command
from cai_runtime.errors import MissingFileError, NonFiniteTensorError
from cai_runtime.slim.inspect import format_inspection, inspect_checkpoint
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import ModuleSpec
from cai_runtime.slim.writer import CheckpointWriter


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


@pytest.fixture
def layered(tmp_path: Path) -> Path:
    with CheckpointWriter(tmp_path / "c", config={"model_type": "llama"}) as writer:
        for layer in range(3):
            spec = ModuleSpec("interpolative", 20, 10, 4 + layer, ("int8", "bf16"))
            cores = [torch.ones(shape) for shape in spec.core_shapes]
            writer.add_module(f"layers.{layer}.up", spec, cores, pivot=torch.arange(20), bias=torch.ones(20))
            writer.add_tensor(f"layers.{layer}.norm.weight", torch.ones(10))
        writer.add_tensor("embed.weight", torch.ones(30, 10).half())
        writer.finish({"perplexity": 18.5, "ranks": [1, 2]})
    return tmp_path / "c"


def test_numbers(layered: Path) -> None:
    inspection = inspect_checkpoint(layered)
    assert [row.name for row in inspection.modules] == ["layers.0.up", "layers.1.up", "layers.2.up", "embed"]
    assert [row.listed for row in inspection.modules] == [True, True, True, False]
    parameters = sum(r * (20 + 10 - r) for r in (4, 5, 6))
    # int8 [r, 10] and its scales, bf16 [20 - r, r], int32 pivot
    nbytes = sum(r * 10 + 4 * r + 2 * (20 - r) * r + 4 * 20 for r in (4, 5, 6))
    kept = inspection.kept
    assert kept is not None and (kept.modules, kept.parameters, kept.nbytes) == (3, parameters, nbytes)
    assert kept.keep_parameters == parameters / 600 and kept.keep_bytes == nbytes / 1200
    # three biases and three norms, fp32
    assert (inspection.other_tensors, inspection.other_parameters, inspection.other_nbytes) == (6, 90, 360)
    assert inspection.parameters == parameters + 300 + 90
    assert inspection.nbytes == nbytes + 600 + 360
    with Checkpoint.open(layered) as checkpoint:
        assert inspection.nbytes == sum(checkpoint.tensor(name).nbytes for name in checkpoint.tensors())


def test_table(layered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(layered)) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("layers.*.up"))
    assert {"x3", "interpolative", "[20,", "10]", "4..6", "int8+bf16", "373", "0.622"} <= set(row.split())
    assert "layers.0.up" not in text and "perplexity: 18.5" in text and "ranks" not in text
    assert run(str(layered), "--all") == 0
    text = capsys.readouterr().out
    assert all(f"layers.{k}.up" in text for k in range(3)) and "layers.*" not in text


def test_json(layered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(layered), "--json") == 0
    value = json.loads(capsys.readouterr().out)
    first = value["modules"][0]
    assert first["name"] == "layers.0.up" and first["rank"] == 4 and first["store"] == ["int8", "bf16"]
    assert first["keep_parameters"] == 104 / 200 and first["keep_bytes"] == (40 + 16 + 128 + 80) / 400
    assert value["format_version"] == 1 and value["report"]["ranks"] == [1, 2]
    assert value["listed"]["parameters"] == sum(m["parameters"] for m in value["modules"] if m["listed"])
    assert value["parameters"] == sum(m["parameters"] for m in value["modules"]) + value["other"]["parameters"]
    assert value["bytes"] == sum(m["bytes"] for m in value["modules"]) + value["other"]["bytes"]


def test_every_kind(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> None:
    inspection = inspect_checkpoint(write_checkpoint(tmp_path / "c", max_shard_bytes=200))
    text = format_inspection(inspection)
    assert all(kind in text for kind in ("dense", "lowrank", "interpolative", "mpo"))
    assert len(inspection.files) > 1
    with Checkpoint.open(tmp_path / "c") as checkpoint:
        cores = [core for name in checkpoint.modules for core in checkpoint.module(name).cores]
        rest = [
            checkpoint.tensor(name)
            for name in ("embed.weight", "norm.weight", "layers.0.low.bias", "layers.0.four.bias")
        ]
        assert inspection.parameters == sum(core.values().numel() for core in cores) + sum(t.numel() for t in rest)
        assert inspection.nbytes == sum(info.nbytes for info in checkpoint.tensors().values())
    four = next(row for row in inspection.to_json()["modules"] if row["name"] == "layers.0.four")
    # [5, 35] in groups of 32 with zero points, [8, 5] in groups of 64 without
    assert four["store"] == ["int4-g32-zp", "int4-g64"] and four["parameters"] == 5 * 35 + 8 * 5
    assert four["bytes"] == 5 * (18 + 2 * 2 + 2) + 8 * (3 + 2)
    assert "int4-g32-zp+int4-g64" in text


def test_a_plain_dense_directory(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "c", config={"model_type": "llama"}) as writer:
        writer.add_tensor("layers.0.up.weight", torch.ones(4, 3))
        writer.add_tensor("mask", torch.ones(2, 2, dtype=torch.bool))
        writer.finish()
    inspection = inspect_checkpoint(tmp_path / "c")
    assert inspection.format_version is None and inspection.kept is None and inspection.report is None
    assert [(row.name, row.spec.store, row.listed) for row in inspection.modules] == [("layers.0.up", ("fp32",), False)]
    assert "plain dense" in format_inspection(inspection) and inspection.to_json()["listed"] is None


def test_verify_and_errors(layered: Path, tmp_path: Path) -> None:
    assert run(str(layered), "--verify") == 0
    with Checkpoint.open(layered) as checkpoint:
        info = checkpoint.tensors()["layers.1.norm.weight"]
    with info.file.open("r+b") as f:
        f.seek(info.start)
        f.write(b"\x00\x00\xc0\x7f")
    assert run(str(layered)) == 0
    with pytest.raises(NonFiniteTensorError, match=r"layers\.1\.norm\.weight"):
        run(str(layered), "--verify")
    with pytest.raises(MissingFileError):
        run(str(tmp_path / "none"))


def test_inspecting_loads_no_torch(layered: Path) -> None:
    script = f"""
import sys
from cai_runtime.slim.inspect import format_inspection, inspect_checkpoint
format_inspection(inspect_checkpoint({str(layered)!r}))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
