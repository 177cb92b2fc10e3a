import json
import shutil

import pytest

from cai_runtime.cli import demo, main


@pytest.fixture
def articles(wikipedia_texts, home):
    """The Wikipedia sample in this test's cache too, without another download. `wikipedia_texts` has put it into the
    user's cache before this test got its own."""
    return wikipedia_texts


@pytest.fixture
def run_demo(tiny_dir, articles, monkeypatch, capsys):
    # Compression samples its calibration text from what this gives, too.
    short = [article[:2000] for article in articles]
    monkeypatch.setattr("cai_runtime.convert.texts.wikipedia_articles", lambda **_: short)
    monkeypatch.setattr(demo, "EVALUATED_TOKENS", 300)

    def run(*arguments):
        assert main(["demo", "--model", str(tiny_dir), "--max-tokens", "10", *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_the_second_run_reuses_what_the_first_made(run_demo, home, tiny_dir):
    first = json.loads(run_demo("--json", "--keep", "0.7"))
    second = json.loads(run_demo("--json", "--keep", "0.7"))
    assert (first["compressed_now"], second["compressed_now"]) == (True, False)
    assert second["answer"] == first["answer"]
    assert second["tokens"] == first["tokens"] > 0
    assert second["slim"] == first["slim"]
    assert first["slim"]["parameters"] < first["original"]["parameters"]
    assert first["slim"]["path"].startswith(str(home))
    assert first["original"]["bf16_bytes"] == first["original"]["bytes"] / 2  # fp32 files
    # A random model knows nothing of any byte, compressed or not.
    assert first["original"]["perplexity"] == pytest.approx(258, rel=0.2)
    assert first["slim"]["perplexity"] == pytest.approx(258, rel=0.2)
    again = json.loads(run_demo("--json", "--keep", "0.7", "--force"))
    assert again["compressed_now"]
    other = json.loads(run_demo("--json", "--keep", "0.8"))
    assert other["compressed_now"]
    assert other["slim"]["parameters"] > first["slim"]["parameters"]


def test_the_text_says_what_was_done(run_demo):
    text = run_demo("--question", "Who are you?", "--store", "fp16")
    assert "interpolative cores at keep 0.9, ranks pooled, stored as fp16" in text
    assert "> Who are you?\n" in text
    for row in ("parameters", "bytes (original as bf16)", "perplexity", "load of the slim", "first token", "tokens/s"):
        assert row in text


def test_chat_without_a_model_talks_to_the_demo_s(run_demo, monkeypatch, capsys):
    import io

    run_demo()
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(["chat", "--temperature", "0", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.strip()


def test_bad_options_leave_nothing_behind(tiny_dir, home, capsys):
    assert main(["demo", "--model", str(tiny_dir), "--keep", "1.5"]) == 1
    assert "keep" in capsys.readouterr().err
    assert list((home / "demo").iterdir()) == []
    shutil.rmtree(home)
