"""Written and read again: every kind, store and odd shape, against definitions written out by hand."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from cai_runtime.slim.module import ModuleWeights
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import STORES, ModuleSpec
from cai_runtime.slim.stores import quantize
from cai_runtime.slim.writer import CheckpointWriter

STORE = st.sampled_from(sorted(STORES))


@st.composite
def specs(draw: st.DrawFn) -> ModuleSpec:
    kind = draw(st.sampled_from(["dense", "lowrank", "interpolative", "mpo"]))
    if kind == "mpo":
        n = draw(st.integers(1, 3))
        out_dims, in_dims = (tuple(draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))) for _ in range(2))
        rank = tuple(draw(st.lists(st.integers(1, 4), min_size=n - 1, max_size=n - 1)))
        store = tuple(draw(st.lists(STORE, min_size=n, max_size=n)))
        return ModuleSpec("mpo", math.prod(out_dims), math.prod(in_dims), rank, store, out_dims, in_dims)
    out, inp = draw(st.integers(1, 23)), draw(st.integers(1, 23))
    if kind == "dense":
        return ModuleSpec("dense", out, inp, None, (draw(STORE),))
    return ModuleSpec(kind, out, inp, draw(st.integers(1, min(out, inp))), (draw(STORE), draw(STORE)))  # pyright: ignore[reportArgumentType]


def by_hand(spec: ModuleSpec, cores: list[torch.Tensor], pivot: torch.Tensor | None) -> torch.Tensor:
    """W element by element, as docs/format.md defines it; `cores` in float64."""
    weight = torch.zeros(spec.out_features, spec.in_features, dtype=torch.float64)
    if spec.kind == "dense":
        return cores[0]
    if spec.kind == "mpo":
        outs = list(itertools.product(*map(range, spec.out_dims)))
        ins = list(itertools.product(*map(range, spec.in_dims)))
        for (row, o), (col, i) in itertools.product(enumerate(outs), enumerate(ins)):
            chain = torch.ones(1, 1, dtype=torch.float64)
            for k, core in enumerate(cores):
                chain = chain @ core[:, o[k], i[k], :]
            weight[row, col] = chain.item()
        return weight
    for row in range(spec.out_features):
        if spec.kind == "lowrank":
            weight[row] = cores[1][row] @ cores[0]
        else:
            assert pivot is not None
            place, rank = pivot.tolist().index(row), cores[0].shape[0]
            weight[row] = cores[0][place] if place < rank else cores[1][place - rank] @ cores[0]
    return weight


def random_parts(spec: ModuleSpec, seed: int) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    cores = [torch.randn(shape, generator=generator) for shape in spec.core_shapes]
    return cores, torch.randperm(spec.out_features, generator=generator) if spec.has_pivot else None


@settings(deadline=None, max_examples=60)
@given(spec=specs(), seed=st.integers(0, 2**31), biased=st.booleans())
def test_every_module_comes_back(spec: ModuleSpec, seed: int, biased: bool) -> None:
    cores, pivot = random_parts(spec, seed)
    bias = torch.randn(spec.out_features).half() if biased else None
    with tempfile.TemporaryDirectory() as folder:
        with CheckpointWriter(Path(folder) / "c", config={"model_type": "x"}) as writer:
            writer.add_module("a.b", spec, cores, pivot=pivot, bias=bias)
            writer.finish()
        with Checkpoint.open(Path(folder) / "c") as checkpoint:
            assert checkpoint.modules == {"a.b": spec} and checkpoint.is_slim
            module = checkpoint.module("a.b")
            checkpoint.verify(progress=False)
        assert (module.bias is None) == (bias is None)
        assert bias is None or (module.bias is not None and torch.equal(module.bias, bias))
        for core, given_core, store in zip(module.cores, cores, spec.store, strict=True):
            packed = quantize(given_core, store)
            assert core.store == store and core.shape == given_core.shape
            assert core.tensors.keys() == packed.tensors.keys()
            assert all(torch.equal(core.tensors[suffix], tensor) for suffix, tensor in packed.tensors.items())
        expected = by_hand(spec, [core.values(torch.float64) for core in module.cores], pivot)
        assert torch.allclose(module.dense(torch.float64), expected, rtol=1e-12, atol=1e-12)
        assert torch.allclose(module.dense().double(), expected, rtol=1e-4, atol=1e-4)
        assert checkpoint.nbytes == spec.nbytes + (0 if bias is None else bias.nbytes)


def test_mpo_core_matrices_applied_in_turn_are_the_dense_product() -> None:
    """The rows and columns that `CoreData.matrix` and the int8 scales use are those a runtime can apply one by one."""
    spec = ModuleSpec("mpo", 24, 30, (5, 4), ("int8", "int8", "int8"), (2, 3, 4), (5, 3, 2))
    cores, _ = random_parts(spec, 1)
    packed = [quantize(core, "int8") for core in cores]
    x = torch.randn(30, dtype=torch.float64)
    state, bond = x.reshape(1, 1, 30), 1  # [outputs so far, bond, inputs left]
    for core, out, inp, right in zip(packed, spec.out_dims, spec.in_dims, (5, 4, 1), strict=True):
        assert core.scale is not None
        matrix = core.matrix().double() * core.scale.double()[:, None]
        done, _, left = state.shape
        y = matrix @ state.reshape(done, bond * inp, left // inp)  # rows (out, right)
        state, bond = y.reshape(done * out, right, left // inp), right
    dense = ModuleWeights("m", spec, packed).dense(torch.float64)
    assert torch.allclose(state.flatten(), dense @ x, rtol=1e-10, atol=1e-10)


def test_modules_already_packed_are_stored_as_they_are(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> None:
    with (
        Checkpoint.open(write_checkpoint(tmp_path / "a")) as a,
        CheckpointWriter(tmp_path / "b", config=a.config) as writer,
    ):
        for name, spec in a.modules.items():
            module = a.module(name)
            writer.add_module(name, spec, module.cores, pivot=module.pivot, bias=module.bias)
        for name in ("embed.weight", "norm.weight"):
            writer.add_tensor(name, a.tensor(name))
        writer.finish(a.report())
        with Checkpoint.open(tmp_path / "b") as b:
            assert a.tensors().keys() == b.tensors().keys() and a.config == b.config
            assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in a.tensors())


@pytest.mark.parametrize("shard_bytes", [1, 200, 1 << 30])
def test_safetensors_reads_the_shards(tmp_path: Path, write_checkpoint: Callable[..., Path], shard_bytes: int) -> None:
    path = write_checkpoint(tmp_path / "c", max_shard_bytes=shard_bytes)
    files = sorted(path.glob("*.safetensors"))
    with Checkpoint.open(path) as checkpoint:
        seen = set()
        for file in files:
            with safe_open(file, "pt") as f:  # the reference implementation checks the layout as it opens
                assert f.metadata() == {"format": "pt"}
                for name in f.keys():  # noqa: SIM118
                    assert torch.equal(f.get_tensor(name), checkpoint.tensor(name)), name
                    seen.add(name)
        assert seen == set(checkpoint.tensors())
        if len(files) == 1:
            assert files[0].name == "model.safetensors" and not (path / "model.safetensors.index.json").exists()
        else:
            index = json.loads((path / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == checkpoint.nbytes
            assert index["weight_map"] == {name: info.file.name for name, info in checkpoint.tensors().items()}
            assert {f.name for f in files} == {
                f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, 1 + len(files))
            }
        if shard_bytes == 200:
            largest = max(info.nbytes for info in checkpoint.tensors().values())
            per_file = {f: sum(i.nbytes for i in checkpoint.tensors().values() if i.file == f) for f in files}
            assert all(size <= max(200, largest) for size in per_file.values()) and 1 < len(files) < len(seen)


def test_layout_is_aligned(tmp_path: Path) -> None:
    shapes = [(3, 5), (64, 2), (7, 1), (16, 16), (1, 1)]
    with CheckpointWriter(tmp_path / "c", config={}) as writer:
        for k, (shape, dtype) in enumerate(
            itertools.product(shapes, (torch.int8, torch.float32, torch.float16, torch.int64))
        ):
            writer.add_tensor(f"t{k}", torch.ones(shape).to(dtype))
        writer.finish()
    raw = (tmp_path / "c/model.safetensors").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0
    with Checkpoint.open(tmp_path / "c") as checkpoint:
        for name, info in checkpoint.tensors().items():
            aligned = 64 if info.nbytes % 64 == 0 else checkpoint.tensor(name).itemsize
            assert info.start % aligned == 0 and checkpoint.tensor(name).data_ptr() % aligned == 0


def test_misaligned_tensors_of_other_writers_are_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2, 1], "data_offsets": [3, 11]},
    }
    raw = json.dumps(header).encode()
    values = torch.tensor([[1.5], [-2.0]])
    data = bytes([1, 2, 255]) + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.tensor("b"), values) and checkpoint.tensor("b").data_ptr() % 4 == 0
        assert checkpoint.tensor("a").tolist() == [1, 2, -1]


def test_tensors_stay_valid_after_release_and_close(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "c"))
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensors()}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    checkpoint.release(checkpoint.module_tensors("layers.0.low"))
    checkpoint.release("norm.weight")
    assert all(torch.equal(tensors[name], copies[name]) for name in tensors)
    checkpoint.close()
    checkpoint.close()
    assert all(torch.equal(tensors[name], copies[name]) for name in tensors)
    file = tmp_path / "c/model.safetensors"
    before = file.read_bytes()
    tensors["norm.weight"].zero_()  # against the contract, but it must not reach the file
    assert file.read_bytes() == before


def test_a_directory_saved_by_transformers_with_a_tied_head(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=33, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert not checkpoint.is_slim and checkpoint.modules == {} and checkpoint.format_version is None
        assert not checkpoint.has_module("lm_head") and "lm_head.weight" not in checkpoint
        state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
        assert checkpoint.tensors().keys() == state.keys()
        assert all(torch.equal(checkpoint.tensor(name), value) for name, value in state.items())
        module = checkpoint.module("model.layers.1.mlp.up_proj")
        assert module.spec == ModuleSpec("dense", 24, 16, None, ("bf16",))
        assert torch.equal(module.dense(), state["model.layers.1.mlp.up_proj.weight"].float())


def test_a_dense_directory_we_wrote_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=33, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    with CheckpointWriter(tmp_path / "c", config=config.to_dict(), max_shard_bytes=4000) as writer:
        for name, tensor in model.state_dict().items():
            writer.add_tensor(name, tensor)
        writer.finish()
    assert "quantization_config" not in json.loads((tmp_path / "c/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
