"""What benchmarks/compress_speech.py makes of checkpoints that are there, and of clips without transcripts."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FAST = {"samples": 4, "sequence_length": 16, "rank_multiple": 1, "refine_epochs": 0, "heal_tokens": 0}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("compress_speech")


def test_a_checkpoint_is_taken_up_by_what_it_was_made_with(benchmark, whisper, speech, tmp_path, capsys):
    slim, options = tmp_path / "keep-0.9", {"calibration": [str(speech)], "keep": 0.9, **FAST}
    report = benchmark.made(whisper, slim, options)
    (slim / "model.safetensors").touch()
    before = (slim / "model.safetensors").stat().st_mtime_ns
    assert benchmark.made(whisper, slim, options) == report
    assert (slim / "model.safetensors").stat().st_mtime_ns == before
    for other in ({"samples": 5}, {"calibration": [str(speech / "clip01.wav")]}, {"keep": 0.8}, {"heal_tokens": 64}):
        with pytest.raises(SystemExit, match=f"other options: {next(iter(other))} "):
            benchmark.made(whisper, slim, {**options, **other})

    sets = {"silent": str(speech / "clip00.wav"), "told": str(speech / "clip01.wav")}
    found = benchmark.judge(slim, sets, whisper)
    assert found["silent"]["word_error"] is None and found["told"]["words"] == 4
    silent, told = capsys.readouterr().out.splitlines()
    assert "silent: no transcripts, KL" in silent and "told: 4 words, word error" in told
