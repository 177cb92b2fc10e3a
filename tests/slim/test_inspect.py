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
from cai_runtime.errors import CompressionError, MissingFileError, NonFiniteTensorError
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


REPORT = {
    "source": "some-model",
    "source_sha256": {"model.safetensors": "ab" * 32},
    "calibration": {"source": "a book", "sequences": 4, "tokens": 2048},
    "options": {"keep": 0.5, "seed": 7},
    "versions": {"torch": "2.11"},
    "keep": {"parameters": 0.5, "bytes": 0.25},
    "modules": [{"name": f"layers.{k}.up", "relative_error": 0.01 * (k + 1)} for k in range(3)],
    "seconds": {"calibrate": 10.5, "round": 2.0},
    "quality": {
        "text": {"source": "another book", "tokens": 4096},
        "reference": {"perplexity": 18.25},
        "candidate": {"perplexity": 21.5},
        "divergence": {"ratio": 1.178, "ratio_error": 0.01, "kl": 0.2345, "kl_error": None, "top1": 0.875},
    },
}


def test_the_report_is_told(layered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (layered / "slim_report.json").write_text(json.dumps(REPORT))
    assert run(str(layered)) == 0
    text = capsys.readouterr().out
    for line in (
        "source: some-model",
        "weights: model.safetensors sha256 " + "ab" * 8,
        "calibration: a book, 2048 tokens in 4 sequences",
        "options: keep = 0.5, seed = 7",
        "versions: torch 2.11",
        "seconds: 12 in all: calibrate 10.5, round 2.0",
        "keep: parameters = 0.5, bytes = 0.25",
        "perplexity: 18.25 -> 21.50, 1.1780 x \u00b1 0.0100",
        "KL: 0.2345 nats per token",
        "top-1 agreement: 87.50%",
        "judged on: another book, 4,096 tokens",
    ):
        assert f"  {line}\n" in text
    row = next(line for line in text.splitlines() if line.startswith("layers.*.up"))
    assert row.endswith("0.01..0.03")


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"modules": 5, "seconds": [1], "quality": "good", "calibration": None, "keep": 3, "versions": "1"},
        {"modules": [None, {"name": 3}, {"name": "layers.0.up", "relative_error": "small"}], "seconds": {"a": None}},
        {"quality": {"reference": 1, "candidate": {"perplexity": "low"}, "divergence": [], "text": {"tokens": {}}}},
        {"elastic": [3, {"keep": {}}], "source_sha256": {"a": 1}, "options": {"x": {"y": 1}}},
        {"source": ["a"], "new": {"deep": [1, {"er": True}]}, "big": 10**400, "flag": True, "nothing": None},
        {"seconds": {"round": -1, "x": float("inf")}, "modules": [{"name": "layers.0.up", "relative_error": 1e999}]},
    ],
    ids=["empty", "types", "modules", "quality", "nested", "unknown", "infinite"],
)
def test_a_foreign_report_does_no_harm(layered: Path, report: dict, capsys: pytest.CaptureFixture[str]) -> None:
    (layered / "slim_report.json").write_text(json.dumps(report))
    assert run(str(layered)) == 0
    assert "layers.*.up" in capsys.readouterr().out
    assert run(str(layered), "--json") == 0
    assert json.loads(capsys.readouterr().out)["report"] is not None


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe"])
def test_a_broken_report_is_told_and_the_rest_is_shown(layered: Path, content: bytes) -> None:
    (layered / "slim_report.json").write_bytes(content)
    inspection = inspect_checkpoint(layered)
    assert inspection.report is None and inspection.kept is not None
    assert "slim_report.json" in (inspection.report_problem or "")
    assert "slim_report.json" in format_inspection(inspection)


def test_mixed_stores_are_summed(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "c", config={"model_type": "llama"}) as writer:
        for name, store in (("a", "int8"), ("b", "bf16")):
            writer.add_module(name, ModuleSpec("dense", 64, 32, None, (store,)), [torch.ones(64, 32)])
        writer.finish()
    inspection = inspect_checkpoint(tmp_path / "c")
    assert inspection.stores == {"bf16": 64 * 32 * 2, "int8": 64 * 32 + 4 * 64}
    assert "by bytes: bf16 64.0%, int8 36.0%" in format_inspection(inspection)


def test_an_elastic_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cai_runtime.slim.elastic import ElasticModule, ElasticTable

    spec = ModuleSpec("lowrank", 20, 20, 8, ("fp32", "fp32"))
    quality = ({"keep": 0.4, "perplexity": 30.5}, {"keep": 0.8, "perplexity": 20.25})
    table = ElasticTable((0.2, 0.8), (ElasticModule("up", least=2),), 2, (0, 0, 0), quality)
    with CheckpointWriter(tmp_path / "c", config={"model_type": "llama"}) as writer:
        writer.add_module("up", spec, [torch.ones(shape) for shape in spec.core_shapes])
        writer.set_elastic(table)
        writer.finish()
    whole, small = inspect_checkpoint(tmp_path / "c"), inspect_checkpoint(tmp_path / "c", keep=0.45)
    assert whole.elastic is not None and (whole.elastic["least"], whole.elastic["greatest"]) == (0.2, 0.8)
    assert [i.modules[0].spec.rank for i in (whole, small)] == [8, 4]
    assert small.elastic is not None and small.elastic["greatest"] == 0.8 and small.elastic["opened_at"] == 0.4
    assert run(str(tmp_path / "c"), "--keep", "0.45") == 0
    text = capsys.readouterr().out
    assert "elastic: opens at any keep from 0.2000 to 0.8000; shown at 0.4000" in text
    assert [line.split() for line in text.splitlines()[-3:]] == [
        ["keep", "perplexity"],
        ["0.4", "30.5"],
        ["0.8", "20.25"],
    ]


def test_picture(layered: Path, write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    import matplotlib.image

    (layered / "slim_report.json").write_text(json.dumps(REPORT))
    for name, path in (("layered", layered), ("kinds", write_checkpoint(tmp_path / "kinds"))):
        assert run(str(path), "--picture", str(tmp_path / f"{name}.png")) == 0
        assert matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3].std() > 0.05
    for wrong in ("p.svg", "no/where.png"):
        with pytest.raises(CompressionError, match="--picture"):
            run(str(layered), "--picture", str(tmp_path / wrong))
    with CheckpointWriter(tmp_path / "dense", config={"model_type": "llama"}) as writer:
        writer.add_tensor("up.weight", torch.ones(4, 3))
        writer.finish()
    with pytest.raises(CompressionError, match="dense"):
        run(str(tmp_path / "dense"), "--picture", str(tmp_path / "p.png"))


def test_a_picture_touches_no_global_state(layered: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    script = f"""
import sys
from cai_runtime.cli import main
assert main(["inspect", {str(layered)!r}]) == 0 and "matplotlib" not in sys.modules
import matplotlib
before = dict(dict.items(matplotlib.rcParams))  # its own items() imports pyplot
assert main(["inspect", {str(layered)!r}, "--picture", {str(tmp_path / "p.png")!r}]) == 0
assert dict(dict.items(matplotlib.rcParams)) == before
assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr


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
