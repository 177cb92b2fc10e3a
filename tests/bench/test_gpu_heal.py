"""benchmarks/gpu_heal.py on the CPU: the model's own text, a compression healed by the clock, perplexities on the way."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)

    return load


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Test text of a model of bytes, where gpu_prepare.py would put it."""
    (tmp_path / "kit/model-0").mkdir(parents=True)
    windows = [[65 + (7 * k + i) % 26 for i in range(24)] for k in range(3)]
    (tmp_path / "kit/model-0/test_text.json").write_text(json.dumps({"source": "made up", "windows": windows}))
    return tmp_path / "kit"


@pytest.mark.slow
def test_perplexities_by_tokens_taken(script, tiny_dir: Path, prepared: Path, tmp_path: Path, monkeypatch):
    gpu_heal = script("gpu_heal")
    monkeypatch.setattr(gpu_heal, "FIRST_CHECKPOINT", 64)
    # With all time in reserve, a second is left; by this clock a step takes a quarter.
    monkeypatch.setattr("cai_runtime.compressor.train.heal.monotonic", itertools.count(0, 0.25).__next__)
    options = ["--minutes", "10", "--reserve", "600", "--device", "cpu", "--keep", "0.5", "--out", str(tmp_path)]
    options += ["--sequences", "6", "--length", "32", "--lanes", "4", "--samples", "2", "--sequences-per-step", "2"]
    assert gpu_heal.main([*options, "--model", str(tiny_dir), "--prepared", str(prepared)]) == 0
    (file,) = tmp_path.glob("gpu_heal_*.json")
    found = json.loads(file.read_text())
    (keep,) = found["keeps"]
    assert found["text"]["tokens"] == 6 * 32 and found["dense_perplexity"] > 1
    points = keep["points"]
    assert [p["tokens"] for p in points] == [0, 64, 128, 192]  # 64 a step
    assert points[-1]["divergence"] > 0 and set(keep["stages"]) >= {"calibrate", "blocks", "heal", "write"}
    assert all(p["perplexity"] > 1 for p in points)


def test_text_is_documents_and_conversations_without_forbidden_tokens(script, tiny_dir: Path):
    from cai_runtime.compressor.data.conversation import chat_frame
    from cai_runtime.compressor.data.self_text import document_marks
    from cai_runtime.engine.tokenizer import load_tokenizer

    rows = script("gpu_heal").TextWriter(tiny_dir, "cpu", lanes=8, length=40).write(8, float("inf"))
    assert rows.shape == (8, 40)
    tokenizer = load_tokenizer(tiny_dir)
    frame = chat_frame(tokenizer)
    marks = document_marks(tokenizer, frame, 258)
    assert not set(rows.flatten().tolist()) & set(marks.banned.tolist())
    opening = list(frame.opening)
    assert sum(row[: len(opening)] == opening for row in rows.tolist()) == 2  # a quarter
    assert rows[0, 0] == marks.start


def test_the_model_comes_whole_from_its_parts(script, tmp_path: Path):
    gpu_heal, gpu_prepare = script("gpu_heal"), script("gpu_prepare")
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(range(256)) * 10)
    folders = [tmp_path / "kit/model-0", tmp_path / "kit/model-1"]
    gpu_prepare.split_file(file, folders, part=2000)
    (tmp_path / "there").mkdir()
    assert gpu_heal.assemble(tmp_path / "kit", tmp_path / "there").read_bytes() == file.read_bytes()
    part = folders[1] / "model.gguf.part"
    part.write_bytes(b"\0" + part.read_bytes()[1:])
    with pytest.raises(SystemExit, match="not those of the file"):
        gpu_heal.assemble(tmp_path / "kit", tmp_path / "there")
    part.unlink()
    with pytest.raises(SystemExit, match="bring both parts"):
        gpu_heal.assemble(tmp_path / "kit", tmp_path / "there")
    with pytest.raises(RuntimeError, match="more than 2 parts"):
        gpu_prepare.split_file(file, folders, part=1000)
