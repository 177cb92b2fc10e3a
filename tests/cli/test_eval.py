"""`cai eval`: what it prints and writes, what it refuses, and what it gives lm-eval."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cai_runtime.cli import main
from cai_runtime.cli.eval import read_prompts
from cai_runtime.errors import CompressionError

PARAGRAPH = (
    "The lighthouse stood on the cliff above the harbour for more than a hundred years before anybody thought of painting "
    "it, and when they did the whole village came to watch the painters climb up to the lighthouse. Nobody liked the "
    "colour. The keeper said that he would rather live in a cave than look after such a lighthouse."
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "unseen.txt"
    path.write_text("\n".join([PARAGRAPH, "Short.", "nobody " * 40 + "came."] * 3))
    return path


def run(*arguments):
    return main(["eval", *map(str, arguments)])


def test_defaults_are_those_of_compare():
    import argparse

    from cai_runtime.cli import eval as command
    from cai_runtime.compressor import compare

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args, parameters = parser.parse_args(["x"]), inspect.signature(compare).parameters
    for name in ("tokens", "window", "max_tokens", "backend", "device", "dtype", "keep", "text"):
        assert getattr(args, name) == parameters[name].default, name


def test_table_json_and_picture(tiny_dir, text, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello?\n\n  Why?\n")
    files = ("--json", tmp_path / "c.json", "--picture", tmp_path / "c.png", "--prompts", prompts)
    sizes = ("--tokens", 128, "--window", 64, "--max-tokens", 4)
    assert run(tiny_dir, tiny_dir, "--text", text, "--backend", "engine", *sizes, *files) == 0
    said = capsys.readouterr().out
    assert "KL, nats per token" in said and "unseen.txt" in said and "> Hello?" in said
    value = json.loads((tmp_path / "c.json").read_text())
    assert value["divergence"]["kl"] == 0 and value["text"]["windows"] == 2 and value["backend"] == "engine"
    assert [sample["prompt"] for sample in value["samples"]] == ["Hello?", "  Why?"]
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_mistakes_are_told_before_any_work(tiny_dir, text, tmp_path, capsys, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("nothing should be loaded")

    monkeypatch.setattr("cai_runtime.judge.comparison.compare", never)
    for wrong, message in (
        (("--json", tmp_path / "no" / "c.json"), "no directory"),
        (("--picture", tmp_path / "c.pdf"), "PNG"),
        (("--prompts", tmp_path / "none.txt"), "can't be read"),
    ):
        assert run(tiny_dir, "--text", text, *wrong) == 1
        assert message in capsys.readouterr().err
    assert run(tiny_dir, tiny_dir, "--lm-eval", tmp_path / "x") == 1
    assert "one model" in capsys.readouterr().err
    before = sorted(tiny_dir.iterdir())
    assert run(tiny_dir, "--text", text, "--lm-eval", tiny_dir) == 1
    assert "the checkpoint itself" in capsys.readouterr().err and sorted(tiny_dir.iterdir()) == before


def test_prompts(tmp_path):
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a\\nb"}\n{"prompt": "c"}\n')
    assert read_prompts(lines) == ["a\nb", "c"]
    lines.write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\n', encoding="utf-8")
    assert read_prompts(lines) == ["a\u2028b", "c"]
    for bad in ("", "[]", '{"text": "a"}', '{"prompt": 3}', "{"):
        lines.write_text(bad)
        with pytest.raises(CompressionError, match="prompt"):
            read_prompts(lines)


@pytest.fixture
def exported(tiny_dir, text, tmp_path, capsys):
    directory = tmp_path / "lm eval"
    assert run(tiny_dir, "--text", text, "--lm-eval", directory) == 0
    assert "python -m cai_runtime.judge.lm_eval run --model cai" in capsys.readouterr().out
    return directory


def test_export_for_lm_eval(exported, tiny_dir, text):
    import yaml

    assert json.loads((exported / "model_args.json").read_text())["pretrained"] == str(tiny_dir)
    assert "assistant" in (exported / "chat_template.jinja").read_text()
    compile((exported / "run.py").read_text(), "run.py", "exec")
    assert subprocess.run(["sh", "-n", exported / "run.sh"]).returncode == 0
    docs = {}
    for name in ("cai_unseen_text", "cai_last_word"):
        task = yaml.safe_load((exported / "tasks" / f"{name}.yaml").read_text())
        assert task["task"] == name
        data = task["dataset_kwargs"]["data_files"]["test"]
        with Path(data).open() as file:
            docs[name] = [json.loads(line) for line in file]
    assert "\n".join(doc["text"] for doc in docs["cai_unseen_text"]) == text.read_text()
    assert len(docs["cai_last_word"]) == 3  # what is too short has none, nor a paragraph whose last word is new
    for doc in docs["cai_last_word"]:
        assert doc["word"] == "lighthouse" and f"{doc['context']} {doc['word']}." == PARAGRAPH


def test_lm_eval_runs_on_the_engine(exported, tiny_dir):
    """The harness's own run of the exported script, its rolling figure against the definition."""
    pytest.importorskip("lm_eval", reason="the lm-eval extra is not installed")
    import math

    import torch

    from cai_runtime.engine.open import load_tokenizer
    from cai_runtime.stock.load import dense_reference

    done = subprocess.run(
        [sys.executable, exported / "run.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(exported / "hf")},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((exported / "results.json").read_text())["results"]
    model, tokenizer = dense_reference(tiny_dir), load_tokenizer(tiny_dir)
    nats, count = 0.0, 0
    for line in (exported / "tasks" / "cai_unseen_text.jsonl").read_text().splitlines():
        document = json.loads(line)["text"]
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(document)["input_ids"]]])
        said = model(input_ids=ids).logits[0].log_softmax(-1)
        nats -= float(said[:-1].gather(1, ids[0, 1:, None]).sum())
        count += len(document.encode())
    [found] = [v for k, v in results["cai_unseen_text"].items() if k.startswith("bits_per_byte,")]
    assert found == pytest.approx(nats / count / math.log(2), rel=1e-4)
    assert any(k.startswith("acc,") for k in results["cai_last_word"])


def test_lm_eval_generates_and_scores(tiny_dir):
    pytest.importorskip("lm_eval", reason="the lm-eval extra is not installed")
    from lm_eval.api.instance import Instance

    from cai_runtime.errors import InvalidRequestError
    from cai_runtime.judge.lm_eval import CaiLM, sampling_of

    def requests(kind, *arguments):
        return [Instance(kind, {}, own, k) for k, own in enumerate(arguments)]

    lm = CaiLM(str(tiny_dir), device="cpu", max_length=64)
    try:
        prompts = ["Hello", "Hello there, how are you today?", "a" * 200]
        answers = lm.generate_until(
            requests("generate_until", *((p, {"max_gen_toks": 8, "until": ["\x00"]}) for p in prompts)), True
        )
        alone = lm.generate_until(requests("generate_until", (prompts[1], {"max_gen_toks": 8})), True)
        assert answers[1] == alone[0]
        pairs = [("Hello", " world"), ("", "Hello"), ("b" * 100, "c" * 20)]
        scores = lm.loglikelihood(requests("loglikelihood", *pairs), True)
        assert scores == lm.loglikelihood(requests("loglikelihood", *pairs[::-1]), True)[::-1]
        assert all(value < 0 for value, _ in scores)
        template = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
        assert template == "user:Hi\nassistant:"
        with pytest.raises(InvalidRequestError, match="num_beams"):
            sampling_of({"num_beams": 4})
        assert sampling_of({"until": "\n"}).stop == ("\n",) and sampling_of({}).temperature == 0
        assert sampling_of({"do_sample": True, "temperature": 0.5, "max_new_tokens": 3}).temperature == 0.5
    finally:
        lm.close()


def test_a_directory_for_a_file_is_told_before_the_work(tiny_dir, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cai_runtime.judge.comparison._compared", lambda *_: pytest.fail("it was begun"))
    assert run(tiny_dir, "--text", text, "--json", tmp_path) == 1
    assert f"--json {tmp_path} is a directory" in capsys.readouterr().err


def test_a_full_disk_does_not_take_the_table_away(tiny_dir, text, capsys):
    assert run(tiny_dir, "--text", text, "--tokens", 64, "--window", 32, "--no-samples", "--json", "/dev/full") == 1
    out, err = capsys.readouterr()
    assert "perplexity" in out and "can't be written: No space left on device" in err


def test_samples_have_tokens(tiny_dir, text, capsys):
    assert run(tiny_dir, "--text", text, "--max-tokens", -1) == 1
    assert "max_tokens must be at least 1, is -1" in capsys.readouterr().err
