"""The whole way on tiny random models: dense directory in, slim directory out, judged by stock transformers."""

import json
import subprocess
import sys

import pytest
import torch

from cai_runtime.compressor import compress
from cai_runtime.engine.open import load_runner
from cai_runtime.engine.runner import ScheduledSequence
from cai_runtime.errors import CheckpointWriteError, CompressionError, SourceError, UnsupportedModelError
from cai_runtime.kernels.slim_linear import reference
from cai_runtime.layers.linear import kernel_weights
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.stores import quantize
from cai_runtime.stock.load import dense_reference, slim_as_transformers

IDS = torch.randint(2, 62, (2, 40), generator=torch.Generator().manual_seed(3))


def run(src, dst, text_file, **options):
    settings = {
        "calibration": text_file,
        "samples": 8,
        "sequence_length": 64,
        "rank_multiple": 1,
        "refine_epochs": 0,
        "heal_tokens": 0,
        "evaluate": False,
        "progress": False,
    }
    return compress(src, dst, **{**settings, **options})


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def engine_logits(path, ids, backend="reference"):
    """[tokens, vocabulary] of a kernel backend, one token at a time."""
    runner, _ = load_runner(
        path, kv_cache="1MiB", backend=backend, dtype="fp32", activations="fp32", device="cpu", progress=False
    )
    pages = list(range(1, 2 + len(ids) // runner.page_size))
    return torch.cat([runner.run([ScheduledSequence([token], at, pages, True)]) for at, token in enumerate(ids)])


def distance(a, b):
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"bias": True}])
def test_keep_1_in_fp32_is_the_same_model(make_tiny, text_file, tmp_path, options):
    src = make_tiny(**options)
    run(src, tmp_path / "slim", text_file, keep=1.0, store="fp32")
    torch.testing.assert_close(logits(slim_as_transformers(tmp_path / "slim")), logits(dense_reference(src)))


@pytest.mark.parametrize("kind", ["interpolative", "lowrank"])
@pytest.mark.parametrize("allocation", ["uniform", "pooled"])
@pytest.mark.parametrize("curvature", [True, False])
def test_less_kept_is_more_error_and_the_budget_holds(tiny, text_file, tmp_path, kind, allocation, curvature):
    reference = logits(dense_reference(tiny))
    errors = []
    for keep in (0.95, 0.75, 0.4):
        report = run(
            tiny,
            tmp_path / f"{keep}",
            text_file,
            keep=keep,
            store="fp32",
            kind=kind,
            allocation=allocation,
            curvature=curvature,
        )
        assert keep - 0.05 < report.keep_parameters <= keep
        with Checkpoint.open(tmp_path / f"{keep}") as slim:
            assert sum(spec.parameters for name, spec in slim.modules.items() if "layers" in name) == report.parameters
        errors.append(distance(reference, logits(slim_as_transformers(tmp_path / f"{keep}"))))
    assert 0 < errors[0] < errors[1] < errors[2]


def test_interpolative_beats_lowrank_at_the_same_keep(tiny, text_file, tmp_path):
    reference = logits(dense_reference(tiny))
    found = {}
    for kind in ("interpolative", "lowrank"):
        run(tiny, tmp_path / kind, text_file, keep=0.8, store="fp32", kind=kind, allocation="uniform")
        found[kind] = distance(reference, logits(slim_as_transformers(tmp_path / kind)))
    assert found["interpolative"] < found["lowrank"]


def test_int8_adds_little_error(tiny, text_file, tmp_path):
    run(tiny, tmp_path / "fp32", text_file, keep=0.8, store="fp32")
    run(tiny, tmp_path / "int8", text_file, keep=0.8, store="int8")
    a, b = (logits(slim_as_transformers(tmp_path / store)) for store in ("fp32", "int8"))
    assert 0 < distance(a, b) < 0.05
    with Checkpoint.open(tmp_path / "int8") as slim:
        assert slim.modules["model.embed_tokens"].store == ("int8",)
        assert slim.modules["model.layers.0.mlp.up_proj"].store == ("int8", "int8")
        assert slim.tensors()["model.norm.weight"].dtype == "F32"


@pytest.mark.parametrize(
    ("store", "stored", "embedding"),
    [("int4", "int4-g64", "int8"), ("int4-g32-zp", "int4-g32-zp", "int8"), ("int4-g128", "int4-g128", "int4-g32")],
)
def test_int4_runs_as_its_dense_reconstruction(tiny, text_file, tmp_path, store, stored, embedding):
    """The kernels on the packed cores against stock transformers on the matrices that they stand for."""
    options = {"embedding_store": "int4-g32"} if embedding != "int8" else {}
    report = run(tiny, tmp_path / "slim", text_file, keep=0.9, store=store, **options)
    with Checkpoint.open(tmp_path / "slim") as slim:
        assert slim.modules["model.embed_tokens"].store == (embedding,)
        assert {s for name, spec in slim.modules.items() if "layers" in name for s in spec.store} == {stored}
        assert report.total_bytes == slim.nbytes and report.options["stores"] == (stored,)
        assert report.options["embedding_store"] == embedding
        slim.verify(progress=False)
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).double()
        for name in slim.modules:
            module = slim.module(name)
            rows = x if module.spec.in_features == 32 else torch.cat([x, x], 1)[:, : module.spec.in_features]
            y = reference(rows, kernel_weights(module, dtype=None, device=torch.device("cpu")))
            torch.testing.assert_close(y, rows @ module.dense(torch.float64).mT, rtol=1e-9, atol=1e-9)
    for backend in ("reference", "cpu"):
        found = engine_logits(tmp_path / "slim", IDS[0].tolist(), backend)
        torch.testing.assert_close(found, logits(slim_as_transformers(tmp_path / "slim"))[0], rtol=1e-3, atol=1e-3)


def test_int4_with_feedback_is_closer_to_the_original_than_without(tiny, text_file, tmp_path, monkeypatch):
    reference_logits = logits(dense_reference(tiny))
    settings = {"keep": 1.0, "store": "int4-g32"}
    run(tiny, tmp_path / "feedback", text_file, **settings)
    monkeypatch.setattr(
        "cai_runtime.compressor.factor.cores.round_with_feedback", lambda core, gram, store: quantize(core, store)
    )
    run(tiny, tmp_path / "plain", text_file, **settings)
    found = {
        name: distance(reference_logits, logits(slim_as_transformers(tmp_path / name)))
        for name in ("feedback", "plain")
    }
    assert found["feedback"] < found["plain"]


def test_the_embedding_may_have_another_store(make_tiny, text_file, tmp_path):
    run(make_tiny(tied=False), tmp_path / "slim", text_file, store="int8", embedding_store="bf16")
    with Checkpoint.open(tmp_path / "slim") as slim:
        assert slim.modules["model.embed_tokens"].store == slim.modules["lm_head"].store == ("bf16",)


def test_the_report_counts_what_is_on_disk(tiny, text_file, tmp_path):
    report = run(tiny, tmp_path / "slim", text_file, keep=0.8)
    written = json.loads((tmp_path / "slim/slim_report.json").read_text())
    with Checkpoint.open(tmp_path / "slim") as slim:
        assert report.total_bytes == slim.nbytes == written["total_bytes"]
        assert {m.name: m.rank for m in report.modules} == {
            name: spec.rank for name, spec in slim.modules.items() if "layers" in name
        }
    assert len(report.modules) == 14
    assert written["keep"]["parameters"] == pytest.approx(report.keep_parameters)
    assert written["keep"]["bytes"] == pytest.approx(report.bytes / (2 * report.dense_parameters))
    assert written["source_sha256"].keys() == {"model.safetensors"}
    assert written["options"]["keep"] == 0.8 and written["calibration"]["tokens"] == 8 * 64
    assert set(written["seconds"]) == {
        "hash",
        "text",
        "open",
        "calibrate",
        "decompose",
        "allocate",
        "blocks",
        "write",
    }
    assert all(0 <= m["relative_error"] < 1 and m["calibrated"] for m in written["modules"])


def test_the_same_seed_gives_the_same_bytes(tiny, text_file, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        run(tiny, tmp_path / name, text_file, keep=0.7, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_calibration_makes_the_seen_text_better_than_plain_svd(tiny, text_file, tmp_path):
    """On inputs like those calibrated on, whitening must beat a calibration that says nothing about them."""
    other = tmp_path / "other.txt"
    other.write_text("w5 " * 400)
    found = {}
    for name, file in [("seen", text_file), ("other", other)]:
        run(tiny, tmp_path / name, file, keep=0.5, store="fp32", allocation="uniform")
        found[name] = distance(logits(dense_reference(tiny)), logits(slim_as_transformers(tmp_path / name)))
    assert found["seen"] < found["other"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"keep": float("nan")}, "keep"),
        ({"store": "int3"}, "store"),
        ({"kind": "sparse"}, "kind"),
        ({"allocation": "random"}, "allocation"),
        ({"samples": 0}, "samples"),
        ({"device": "quantum"}, "quantum"),
        ({"keep": 0.001, "rank_multiple": 16}, "keep"),
        ({"sequence_length": 100_000}, "sequence"),
    ],
)
def test_a_bad_option_is_named_and_nothing_is_left(tiny, text_file, tmp_path, options, message):
    with pytest.raises(CompressionError, match=message):
        run(tiny, tmp_path / "slim", text_file, **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_calibration_files(tiny, tmp_path):
    cases = {
        "empty.txt": b" \n",
        "binary.txt": b"\xff\xfe\x00",
        "broken.jsonl": b'{"text": 1}',
        "bad.jsonl": b"{",
        "short.txt": b"w1",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in [*cases, "missing.txt"]:
        with pytest.raises(CompressionError, match=r"calibration|text"):
            run(tiny, tmp_path / "slim", tmp_path / name)
        assert not (tmp_path / "slim").exists()


def test_jsonl_is_read(tiny, text_file, tmp_path):
    lines = [json.dumps({"text": text_file.read_text()[:2000], "id": k}) for k in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n\n")
    assert run(tiny, tmp_path / "slim", tmp_path / "t.jsonl").calibration["source"] == "t.jsonl: 3 texts"


def test_a_taken_destination(tiny, text_file, tmp_path):
    run(tiny, tmp_path / "slim", text_file)
    with pytest.raises(CheckpointWriteError, match="exists"):
        run(tiny, tmp_path / "slim", text_file)
    assert run(tiny, tmp_path / "slim", text_file, keep=0.5, overwrite=True).keep_parameters <= 0.5


def test_a_slim_source_is_compressed_further(tiny, text_file, tmp_path):
    run(tiny, tmp_path / "slim", text_file, keep=0.9, store="fp32")
    report = run(tmp_path / "slim", tmp_path / "again", text_file, keep=0.6, store="fp32")
    assert 0.55 < report.keep_parameters <= 0.6
    run(tiny, tmp_path / "once", text_file, keep=0.6, store="fp32")
    reference = logits(dense_reference(tiny))
    twice, once = (distance(reference, logits(slim_as_transformers(tmp_path / name))) for name in ("again", "once"))
    assert once < 1.2 * twice and twice < 1.5 * once


def test_a_missing_source(tmp_path, text_file):
    with pytest.raises(SourceError):
        run(tmp_path / "nothing", tmp_path / "again", text_file)


def test_a_full_disk_is_told_before_the_work(tiny, text_file, tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(CompressionError, match="free"):
        run(tiny, tmp_path / "slim", text_file)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_linear_layers_is_unsupported(text_file, add_tokenizer, tmp_path):
    """GPT-2 keeps its weights in Conv1D modules, transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=62, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    add_tokenizer(tmp_path / "gpt2")
    with pytest.raises(UnsupportedModelError, match="Linear"):
        run(tmp_path / "gpt2", tmp_path / "slim", text_file)


def test_importing_the_package_is_light():
    modules = "cai_runtime.compressor, cai_runtime.cli.compress"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"]
