import json

import pytest
import torch

from cai_runtime.bench import attention
from cai_runtime.bench.attention import AttentionSettings, bench_attention
from cai_runtime.bench.attention_cases import Case, gathered_calls
from cai_runtime.bench.attention_report import format_attention
from cai_runtime.cli import main
from cai_runtime.errors import BenchmarkError, KernelError
from cai_runtime.models.shapes import AttentionHeads

HEADS = AttentionHeads(4, 2, 16)


@pytest.fixture
def bench(roofs, once):
    def run(**changes):
        settings = {
            "heads": HEADS,
            "contexts": (37,),
            "batches": (1, 3),
            "prompts": (21,),
            "threads": 1,
            "schedule": once,
        }
        return bench_attention(
            AttentionSettings(**{**settings, **changes}),
            subject="test",
            roofs=lambda device, threads: roofs,
            reader=None,
        )

    return run


@pytest.mark.parametrize("window", [None, 8])
def test_backends_and_torch_attend_to_the_same(bench, window):
    report = bench(window=window, backends=("cpu", "reference"))
    assert [(r.mode, r.batch, r.context) for r in report.results[::6]] == [
        ("decode", 1, 37),
        ("decode", 3, 37),
        ("prefill", 1, 21),
    ]
    assert {(r.engine, r.cache) for r in report.results} == {
        (engine, cache) for engine in ("torch", "cpu", "reference") for cache in ("fp32", "bf16")
    }
    for r in report.results:
        assert r.unsupported is None
        assert 0 < r.best_s <= r.median_s
        assert r.relative_error < (1e-4 if r.cache == "fp32" else 2e-2)


def test_an_int8_cache_is_held_against_its_own_codes(bench):
    report = bench(caches=("int8",), backends=("cpu", "reference"))
    assert [r.engine for r in report.results[:2]] == ["cpu", "reference"] and len(report.results) == 6
    for r in report.results:
        assert r.unsupported is None and r.relative_error < 1e-4
        assert r.cache_bytes == 2 * r.batch * 2 * r.context * (16 + 4)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_bytes_and_operations_are_those_of_what_is_seen(mode, window):
    case = Case(mode, HEADS, 30, 2, window)
    pairs = 0
    oldest_seen = 30
    for position in range(29 if mode == "decode" else 0, 30):
        seen = [p for p in range(position + 1) if window is None or position - p < window]
        pairs += len(seen)
        oldest_seen = min(oldest_seen, seen[0])
    assert case.flops == 2 * pairs * 4 * (2 * 16 + 2 * 16)
    assert case.seen_bytes("float32") == 2 * (30 - oldest_seen) * 2 * 2 * 16 * 4
    assert case.held_bytes("bfloat16") == 2 * 30 * 2 * 2 * 16 * 2


def test_the_judge_is_a_plain_softmax_over_what_is_seen():
    case = Case("prefill", HEADS, 11, 1, 4)
    rows, expected = case.expected("cpu", "float32", "float32")
    assert rows[0] == 0 and rows[-1] == 10
    q, k, v = case.gathered("cpu", "float32", "float32")
    head, row = 3, rows[4]
    seen = range(max(0, row - 3), row + 1)
    scores = torch.tensor(
        [float(q[0, row, head].double() @ k[0, 1, p].double()) / 4 for p in seen], dtype=torch.float64
    )
    plain = sum(weight * v[0, 1, p].double() for weight, p in zip(scores.softmax(0), seen, strict=True))
    torch.testing.assert_close(expected[4].view(4, 16)[head], plain)


def test_sequences_of_a_step_differ():
    calls = gathered_calls(Case("decode", HEADS, 5, 2, None), 2, "cpu", "float32")
    first, again = calls[0](), calls[1]()
    assert torch.equal(first, again)
    assert not torch.allclose(first[0], first[1])


def test_a_wrong_result_is_an_error_and_no_figure(bench, monkeypatch):
    def broken(case, sets, device, dtype, activations, backend):
        return [lambda: torch.zeros(case.batch * case.new, 64)]

    monkeypatch.setattr(attention, "paged_calls", broken)
    with pytest.raises(BenchmarkError, match="cpu with a fp32 cache is wrong on decode, 37 positions"):
        bench()


def test_what_a_backend_can_t_do_is_shown_with_its_reason(bench, monkeypatch):
    def refuse(*_):
        raise KernelError("no such heads")

    monkeypatch.setattr(attention, "paged_calls", refuse)
    report = bench()
    assert {r.unsupported for r in report.results} == {None, "no such heads"}
    assert "[1] not supported: no such heads" in format_attention(report)


def test_the_command_writes_a_table_and_json(tmp_path, capsys, monkeypatch, roofs):
    defaults = {**attention.bench_attention.__kwdefaults__, "roofs": lambda *_: roofs, "reader": None}
    monkeypatch.setattr(attention.bench_attention, "__kwdefaults__", defaults)
    out = tmp_path / "figures.json"
    arguments = ["--heads", "4/2x16", "--context", "20,40", "--batch", "2", "--mode", "decode", "--cache", "fp32"]
    quick = ["--rounds", "1", "--seconds", "0", "--threads", "1", "--device", "cpu", "--json", str(out)]
    assert main(["bench", "attention", *arguments, *quick]) == 0
    table = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [(r["engine"], r["context"]) for r in found["results"]] == [
        ("torch", 20),
        ("cpu", 20),
        ("torch", 40),
        ("cpu", 40),
    ]
    for r in found["results"]:
        assert f"{r['median_s'] * 1e3:,.3f}" in table
        assert r["gb_per_s"] == pytest.approx(2 * 2 * r["context"] * 2 * 16 * 4 / r["median_s"] / 1e9)
        assert r["floor_fraction"] == pytest.approx(r["floor_s"] / r["median_s"])


def test_bad_arguments_are_named_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setattr("cai_runtime.bench.attention.bench_attention", lambda *_, **__: pytest.fail("something ran"))
    for arguments, named in (
        (["--model", "glm-5.1"], "latent"),
        (["--model", "llama-9"], "no shapes of 'llama-9'"),
        (["--heads", "4x2"], "--heads 4x2"),
        (["--heads", "5/2x16"], "5 query heads don't share 2"),
        (["--window", "0"], "window is 0"),
        (["--cache", "int4"], "unknown cache dtype 'int4'"),
        (["--backend", "metal"], "unknown backend 'metal'"),
        (["--mode", "training"], "unknown mode 'training'"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at"),
    ):
        assert main(["bench", "attention", *arguments]) == 1
        assert named in capsys.readouterr().err
