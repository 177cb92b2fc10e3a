import json

import pytest

from cai_runtime.bench.child import run_child
from cai_runtime.bench.prefill import bench_prefill, format_prefill, linear_parameters, prefill_json
from cai_runtime.cli import main
from cai_runtime.errors import BenchmarkError
from cai_runtime.slim.reader import Checkpoint


@pytest.fixture
def quick_roofs(monkeypatch):
    def child(job, *, threads):
        if job["do"] == "roofs.both":
            return {"device": "cpu", "gpu": None, "read": 1e10, "matmul": {"float32": 1e11, "bfloat16": 4e11}}
        from cai_runtime.bench.child import perform  # in this process: starting one takes seconds

        return perform({**job, "threads": threads})

    monkeypatch.setattr("cai_runtime.bench.prefill.run_child", child)


def test_the_engine_beside_transformers(tiny_dir, quick_roofs):
    report = bench_prefill(tiny_dir, prompts=(24, 40), repeats=2, threads=1, device="cpu", peer=tiny_dir)
    assert [(r.engine, r.weights, r.prompt_tokens) for r in report.results] == [
        (engine, weights, prompt)
        for prompt in (24, 40)
        for engine, weights in (("cai_runtime", "F32"), ("transformers", "float32"), ("transformers", "bfloat16"))
    ]
    parameters = 2 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128)
    for r, figures in zip(report.results, prefill_json(report)["results"], strict=True):
        assert len(r.seconds) == 2
        assert r.linear_parameters == parameters
        assert figures["tokens_per_s"] == pytest.approx(r.prompt_tokens / r.median_s)
        rate = 4e11 if r.weights == "bfloat16" else 1e11
        assert figures["floor_fraction"] == pytest.approx(2 * parameters * r.prompt_tokens / rate / r.median_s)
    ours, theirs = report.results[:2]
    assert report.speedup(ours, "float32") == pytest.approx(theirs.median_s / ours.median_s)
    assert "vs fp32" in format_prefill(report)
    assert json.dumps(prefill_json(report))


def test_a_child_measures_the_roofs():
    found = run_child({"do": "roofs.both", "device": "cpu"}, threads=1)
    assert found["device"] == "cpu"
    assert found["read"] > 1e8 and found["matmul"]["float32"] > 1e8


def test_stored_parameters_leave_out_the_embedding_and_the_head(tmp_path):
    import torch

    from cai_runtime.slim.spec import ModuleSpec
    from cai_runtime.slim.writer import CheckpointWriter

    with CheckpointWriter(tmp_path / "slim", config={"model_type": "llama"}) as writer:
        slim = ModuleSpec("lowrank", 32, 16, 4, ("int8", "int8"))  # 4 * (32 + 16) parameters
        writer.add_module("model.layers.0.self_attn.q_proj", slim, [torch.randn(s) for s in slim.core_shapes])
        head = ModuleSpec("dense", 16, 100, None, ("int8",))
        writer.add_module("lm_head", head, [torch.randn(s) for s in head.core_shapes])
        writer.add_tensor("model.embed_tokens.weight", torch.randn(100, 16))
        writer.add_tensor("model.layers.0.mlp.down_proj.weight", torch.randn(16, 8))
        writer.add_tensor("model.norm.weight", torch.ones(16))
        writer.finish({"keep": 0.5})
    with Checkpoint.open(tmp_path / "slim") as slim_checkpoint:
        assert linear_parameters(slim_checkpoint) == 4 * (32 + 16) + 16 * 8


def test_prompts_that_don_t_fit_and_other_models_are_refused(tiny_dir, quick_roofs, tmp_path):
    with pytest.raises(BenchmarkError, match="65536 tokens and one more don't fit"):
        bench_prefill(tiny_dir, prompts=(65536,))
    with pytest.raises(BenchmarkError, match="repeats is 0"):
        bench_prefill(tiny_dir, prompts=(8,), repeats=0)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 32}))
    with pytest.raises(BenchmarkError, match="another one: hidden_size is 32"):
        bench_prefill(tiny_dir, prompts=(8,), peer=tmp_path)


def test_the_command_with_a_checkpoint(tiny_dir, quick_roofs, tmp_path, capsys):
    out = tmp_path / "figures.json"
    arguments = ["bench", "prefill", str(tiny_dir), "--batch", "16", "--rounds", "1", "--threads", "1"]
    assert main([*arguments, "--device", "cpu", "--no-peers", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [r["engine"] for r in found["results"]] == ["cai_runtime"]
    assert f"{found['results'][0]['tokens_per_s']:,.1f}" in capsys.readouterr().out
    assert main([*arguments, "--kind", "lowrank"]) == 1
    assert "--kind is for linears" in capsys.readouterr().err


def test_the_command_without_one_measures_linears(monkeypatch, capsys):
    asked = {}

    def fake(groups, settings, **more):
        asked.update(groups=groups, settings=settings, **more)
        raise BenchmarkError("enough")

    monkeypatch.setattr("cai_runtime.bench.linear.bench_linear", fake)
    assert main(["bench", "prefill", "--model", "smollm2-135m", "--device", "cpu"]) == 1
    assert (asked["benchmark"], asked["subject"], asked["of_model"]) == ("prefill", "smollm2-135m", True)
    assert asked["settings"].batches == (128, 512, 2048)
    assert [group.name for group in asked["groups"]] == ["qkv", "o", "gate_up", "down", "head"]
