"""`export_dense` and `cai export --dense`."""

import json
import os

import pytest
import torch

from cai_runtime.cli import main
from cai_runtime.errors import (
    CheckpointWriteError,
    InvalidConfigError,
    MissingFileError,
    NonFiniteTensorError,
)
from cai_runtime.slim.export import export_dense
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import ModuleSpec
from cai_runtime.slim.writer import CheckpointWriter

NAME = "model.layers.0.mlp."


@pytest.fixture
def source(tmp_path):
    """Modules of every kind, a bias, a packed embedding, an integer tensor, a tokenizer."""
    torch.manual_seed(0)
    stock = tmp_path / "stock"
    stock.mkdir()
    (stock / "tokenizer.json").write_text("{}")
    (stock / "chat_template.jinja").write_text("hello")
    config = {"model_type": "llama", "dtype": "float32", "hidden_size": 16}
    with CheckpointWriter(tmp_path / "src", config=config, source_dir=stock) as writer:
        specs = [
            ModuleSpec("dense", 24, 16, None, ("int8",)),
            ModuleSpec("lowrank", 24, 16, 4, ("bf16", "int8")),
            ModuleSpec("interpolative", 24, 16, 8, ("int8", "int4-g32")),
            ModuleSpec("mpo", 24, 16, (3,), ("int8", "fp32"), (4, 6), (4, 4)),
        ]
        for spec in specs:
            cores = [torch.randn(shape) for shape in spec.core_shapes]
            pivot = torch.randperm(24) if spec.has_pivot else None
            writer.add_module(NAME + spec.kind, spec, cores, pivot, torch.randn(24) if spec.kind == "mpo" else None)
        writer.add_module(
            "model.embed_tokens", ModuleSpec("dense", 30, 16, None, ("int4-g64-zp",)), [torch.randn(30, 16)]
        )
        writer.add_tensor("model.norm.weight", torch.ones(16))
        writer.add_tensor("model.steps", torch.arange(3))
        writer.finish({"keep": 0.5})
    return tmp_path / "src"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_module_is_multiplied_out(source, tmp_path, dtype):
    path = export_dense(source, tmp_path / "out", dtype=dtype)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    with Checkpoint.open(source) as slim, Checkpoint.open(path) as dense:
        assert not dense.is_slim and not dense.modules
        assert dense.tensors().keys() == {
            *(f"{name}.weight" for name in slim.modules), f"{NAME}mpo.bias", "model.norm.weight", "model.steps",
        }  # fmt: skip
        for name in slim.modules:
            assert torch.equal(dense.tensor(f"{name}.weight"), slim.module(name).dense().to(torch_dtype))
        assert torch.equal(dense.tensor(f"{NAME}mpo.bias"), slim.tensor(f"{NAME}mpo.bias").to(torch_dtype))
        assert torch.equal(dense.tensor("model.steps"), torch.arange(3))
        assert dense.tensor("model.norm.weight").dtype == torch_dtype
    config = json.loads((path / "config.json").read_text())
    assert config == {"model_type": "llama", "dtype": str(torch_dtype).removeprefix("torch."), "hidden_size": 16}
    assert (path / "tokenizer.json").read_text() == "{}" and (path / "chat_template.jinja").read_text() == "hello"
    assert not (path / "slim_report.json").exists()


def test_in_shards(source, tmp_path):
    path = export_dense(source, tmp_path / "out", max_shard_bytes=2000)
    assert len(list(path.glob("*.safetensors"))) >= 3
    with Checkpoint.open(path) as dense, Checkpoint.open(export_dense(source, tmp_path / "whole")) as whole:
        assert all(torch.equal(dense.tensor(name), whole.tensor(name)) for name in whole.tensors())


def test_a_dense_source_changes_its_dtype(source, tmp_path):
    first = export_dense(source, tmp_path / "fp32", dtype="fp32")
    second = export_dense(first, tmp_path / "bf16")
    with Checkpoint.open(second) as dense, Checkpoint.open(export_dense(source, tmp_path / "direct")) as direct:
        assert all(torch.equal(dense.tensor(name), direct.tensor(name)) for name in direct.tensors())


def test_existing_destination(source, tmp_path):
    path = export_dense(source, tmp_path / "out")
    with pytest.raises(CheckpointWriteError, match="overwrite"):
        export_dense(source, path, dtype="fp32")
    export_dense(source, path, dtype="fp32", overwrite=True)
    assert json.loads((path / "config.json").read_text())["dtype"] == "float32"
    with pytest.raises(CheckpointWriteError, match="is the source itself"):
        export_dense(source, source, overwrite=True)


def test_bad_sources(source, tmp_path):
    with pytest.raises(MissingFileError):
        export_dense(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(InvalidConfigError, match="int8"):
        export_dense(source, tmp_path / "out", dtype="int8")
    with CheckpointWriter(tmp_path / "large", config={"model_type": "llama"}) as writer:
        writer.add_module("m", ModuleSpec("lowrank", 8, 8, 2, ("fp32", "fp32")), [torch.full((2, 8), 1e3)] * 1 + [
            torch.full((8, 2), 1e3)])  # fmt: skip
        writer.finish()
    with pytest.raises(NonFiniteTensorError, match="fp16") as caught:
        export_dense(tmp_path / "large", tmp_path / "out", dtype="fp16")
    assert caught.value.tensor == "m.weight"
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_full_disk(source, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, os.strerror(28))

    path = export_dense(source, tmp_path / "out")
    before = (path / "model.safetensors").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointWriteError, match="No space left"):
        export_dense(source, path, dtype="fp32", overwrite=True)
    monkeypatch.undo()
    assert (path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".out*"))


def test_one_dense_tensor_at_a_time(tmp_path, monkeypatch):
    """At most a shard and what is being made are held: counted in what the writer gets and has not written."""
    import gc

    spec = ModuleSpec("lowrank", 256, 256, 8, ("int8", "int8"))
    with CheckpointWriter(tmp_path / "src", config={"model_type": "llama"}) as writer:
        for k in range(6):
            writer.add_module(f"m{k}", spec, [torch.randn(shape) for shape in spec.core_shapes])
        writer.finish()
    held = []
    add = CheckpointWriter.add_tensor

    def counted(self, name, tensor):
        add(self, name, tensor)
        gc.collect()
        held.append(sum(type(o) is torch.Tensor and tuple(o.shape) == (256, 256) for o in gc.get_objects()))

    monkeypatch.setattr(CheckpointWriter, "add_tensor", counted)
    export_dense(tmp_path / "src", tmp_path / "out", max_shard_bytes=2 * 256 * 256)
    assert max(held) <= 4  # two of one moment (fp32 and rounded), one in the shard, one before


def test_command(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", "--dense", str(source), str(out), "--dtype", "fp32"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert main(["export", "--dense", str(source), str(out)]) == 1
    assert "overwrite" in capsys.readouterr().err
    assert main(["export", "--dense", str(source), str(out), "--overwrite"]) == 0
    with pytest.raises(SystemExit):
        main(["export", str(source), str(tmp_path / "other")])
    assert "--dense" in capsys.readouterr().err
