import json

import pytest

from cai_runtime.bench import decode, peers
from cai_runtime.bench.bandwidth import read_bandwidth
from cai_runtime.bench.checks import Peers, check_peers
from cai_runtime.bench.child import run_child
from cai_runtime.bench.decode import DecodeSettings, measure
from cai_runtime.cli import main
from cai_runtime.errors import BenchmarkError
from cai_runtime.slim.reader import Checkpoint, read_json


def settings(**changes):
    base = {"batch": 2, "tokens": 5, "prompt_tokens": 10, "repeats": 3, "threads": 1, "vocab_size": 258}
    return DecodeSettings(**{**base, "kv_elements": 128, **changes})


class FakeSubject:
    """Takes 1 s for its first token and a set time for each further one; the second prompt takes half as long."""

    engine, weights, weight_bytes, kv_item_bytes, versions = "fake", "int8", 1_000_000, 4, {"fake": "1"}

    def __init__(self, *step_seconds):
        self.steps = list(step_seconds)
        self.prompts = []

    def generate(self, prompts, tokens):
        self.prompts.append((tokens, prompts))
        last = 1.0 + (self.steps.pop(0) * (tokens - 1) if tokens == 5 and len(self.prompts) > 1 else 0)
        return [last, last / 2]

    def close(self):
        pass


def test_figures_come_from_the_medians():
    subject = FakeSubject(0.5, 0.25, 9.0)
    result = measure(subject, settings())
    assert result.whole_s == (3.0, 2.0, 37.0)
    assert result.step_ms == pytest.approx(500)
    assert result.decode_tokens_per_s == pytest.approx(4)
    assert result.first_token_ms == pytest.approx(750)
    assert result.prefill_tokens_per_s == pytest.approx(20)
    assert result.kv_bytes == 2 * 12.5 * 128 * 4
    assert result.gb_per_s == pytest.approx((1_000_000 + result.kv_bytes) / 0.5 / 1e9)
    assert result.floor_fraction(4e6) == pytest.approx(result.gb_per_s * 1e9 / 4e6)


def test_every_run_has_new_prompts_of_ordinary_tokens():
    subject = FakeSubject(1, 1, 1)
    measure(subject, settings())
    assert [tokens for tokens, _ in subject.prompts] == [5, 1, 5, 1, 5, 1, 5]
    prompts = [tuple(prompt) for _, batch in subject.prompts for prompt in batch]
    assert len(set(prompts)) == len(prompts) == 14
    assert all(len(prompt) == 10 and min(prompt) >= 64 and max(prompt) < 193 for prompt in prompts)
    assert settings().prompts(3) == settings().prompts(3)


def test_a_difference_below_the_noise_is_no_figure():
    result = measure(FakeSubject(-0.1, -0.1, -0.1), settings())
    assert result.decode_tokens_per_s is None
    assert result.gb_per_s is None
    assert result.floor_fraction(1e9) is None


def test_one_token_is_no_decoding():
    with pytest.raises(BenchmarkError, match="tokens is 1"):
        measure(FakeSubject(), settings(tokens=1))


def test_bytes_of_a_step_leave_out_an_embedding_that_is_not_the_head(tiny_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    table = 258 * 64 * 4
    with Checkpoint.open(tiny_dir) as tied:
        assert decode.step_weight_bytes(tied, None) == tied.nbytes
        assert decode.step_weight_bytes(tied, "bfloat16") == tied.nbytes / 2
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, tie_word_embeddings=False)
    model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    with Checkpoint.open(tmp_path / "untied") as untied:
        assert "lm_head.weight" in untied
        assert decode.step_weight_bytes(untied, None) == untied.nbytes - table


def test_our_engine_and_transformers_answer_the_lengths_they_are_asked_for(tiny_dir):
    small = settings(tokens=4, repeats=1)
    ours = decode.OurEngine(tiny_dir, small)
    try:
        mine = measure(ours, small)
    finally:
        ours.close()
    theirs = measure(peers.Transformers(tiny_dir, settings(dtype="float32")), settings(tokens=4, repeats=1))
    assert mine.weight_bytes == theirs.weight_bytes
    assert mine.kv_bytes == theirs.kv_bytes == 2 * 12 * decode.kv_elements(read_json(tiny_dir / "config.json")) * 4
    assert (mine.weights, theirs.weights) == ("F32", "float32")


def test_llama_cpp_answers_the_lengths_it_is_asked_for(smollm2_gguf):
    pytest.importorskip("xllamacpp", reason="the peers extra is not installed")
    small = settings(tokens=4, repeats=1, vocab_size=49152)
    subject = peers.LlamaCpp(smollm2_gguf, small)
    try:
        result = measure(subject, small)
    finally:
        subject.close()
    assert result.weights == "Q4_1"
    assert 80e6 < result.weight_bytes < smollm2_gguf.stat().st_size


@pytest.fixture(scope="session")
def smollm2_gguf():
    from cai_runtime.convert.sources import fetch_file

    return fetch_file("smollm2-135m-instruct")


def test_bandwidth_is_that_of_bytes_over_seconds():
    # A processor reads at least 100 MB/s and at most 100 TB/s, caches included.
    assert 1e8 < read_bandwidth(buffer_bytes=1 << 22) < 1e14


def test_the_command_writes_a_table_and_json(tiny_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cai_runtime.bench.run.run_child", quick_bandwidth)
    out = tmp_path / "figures.json"
    arguments = ["bench", "decode", str(tiny_dir), "--batch", "1", "3", "--tokens", "8", "--prompt-tokens", "6"]
    assert main([*arguments, "--repeats", "2", "--threads", "1", "--json", str(out)]) == 0
    table = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [(r["engine"], r["batch"], len(r["whole_s"])) for r in found["results"]] == [
        ("cai_runtime", 1, 2),
        ("cai_runtime", 3, 2),
    ]
    assert found["bandwidth_gb_per_s"] == 8
    assert found["settings"]["threads"] == 1
    assert found["machine"]["cpu"]
    assert found["versions"]["torch"]
    for result in found["results"]:
        rate = result["gb_per_s"]  # None: less than the noise, on a machine that does other things
        assert result["floor_fraction"] == (None if rate is None else pytest.approx(rate / 8))
        assert f"{result['first_token_ms']:,.1f}" in table
    assert "of floor" in table


def quick_bandwidth(job, *, threads):
    """Children as they are, but for the seconds that the bandwidth takes."""
    if job["do"] == "roofs.bandwidth":
        return {"device": "cpu", "gpu": None, "bytes_per_s": 8e9}
    return run_child(job, threads=threads)


def test_a_failure_in_the_child_is_told(tiny_dir, tmp_path):
    with pytest.raises(BenchmarkError, match=r"measuring cai_runtime: no such checkpoint directory"):
        run_child(decode_job(tmp_path / "nothing"), threads=1)
    with pytest.raises(BenchmarkError, match=r"(?s)measuring nobody failed with exit status 1.*KeyError"):
        run_child({**decode_job(tiny_dir), "subject": "nobody"}, threads=1)


def decode_job(path):
    from dataclasses import asdict

    return {"do": "subjects.decode", "subject": "cai_runtime", "path": str(path), "settings": asdict(settings())}


def test_bad_arguments_are_named_before_anything_runs(tiny_dir, capsys, monkeypatch):
    monkeypatch.setattr("cai_runtime.bench.run.run_child", lambda *_, **__: pytest.fail("something ran"))
    bench = ["bench", "decode", str(tiny_dir)]
    for extra, named in (
        (["--tokens", "1"], "tokens is 1"),
        (["--batch", "1", "0"], "batch is 0"),
        (["--repeats", "0"], "repeats is 0"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at"),
    ):
        assert main([*bench, *extra]) == 1
        assert named in capsys.readouterr().err
    assert main(["bench", "decode", str(tiny_dir / "nothing")]) == 1
    assert "no such checkpoint directory" in capsys.readouterr().err


def test_peers_must_be_the_same_model(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("cai_runtime.bench.checks.find_spec", lambda name: object())
    config = read_json(tiny_dir / "config.json")
    here = Peers(gguf=tmp_path / "a.gguf", dense=tiny_dir)
    check_peers(config, here)
    with pytest.raises(BenchmarkError, match="hidden_size is 64"):
        check_peers({**config, "hidden_size": 32}, here)
    monkeypatch.setattr("cai_runtime.bench.checks.find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match=r"cai-runtime\[peers\]"):
        check_peers(config, here)
