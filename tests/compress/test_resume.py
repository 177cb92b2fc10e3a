"""A compression that was stopped anywhere goes on and comes to the same bytes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cai_runtime.compress import compress
from cai_runtime.compress.work import Work
from cai_runtime.errors import CompressionError

SETTINGS = {
    "keep": 0.7,
    "samples": 4,
    "sequence_length": 32,
    "rank_multiple": 1,
    "shift": True,
    "refine_epochs": 1,
    "heal_tokens": 64 * 20,
    "evaluate": False,
    "progress": False,
}


class Killed(BaseException):
    """What no handler expects."""


@pytest.fixture(scope="module")
def whole(tiny, text_file, tmp_path_factory):
    """The weights of a run in one go, and how many steps it kept."""
    path = tmp_path_factory.mktemp("whole") / "slim"
    saves = []
    save = Work.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "save", lambda self, step, *a, **k: (saves.append(step), save(self, step, *a, **k))[1])
        compress(tiny, path, calibration=text_file, **SETTINGS)
    return (path / "model.safetensors").read_bytes(), saves


def test_it_goes_on_from_every_step(tiny, text_file, tmp_path, monkeypatch, whole):
    """Stopped before one step after the other is kept, one call after the other: each goes on where the last one was."""
    expected, steps = whole
    assert {step.partition("-")[0] for step in steps} >= {
        "text",
        "hidden",
        "grad",
        "curves",
        "cores",
        "shifted",
        "heal",
    }
    save = Work.save
    done: list[str] = []

    def save_one(self, step, *rest, **options):
        new = not self.has(step) or options.get("again")
        if len(done) == 1 and new:
            raise Killed
        if new:
            done.append(step)
        save(self, step, *rest, **options)

    monkeypatch.setattr(Work, "save", save_one)
    taken: list[str] = []
    for _ in range(len(steps) + 1):
        try:
            compress(tiny, tmp_path / "slim", calibration=text_file, **SETTINGS)
            break
        except Killed:
            assert not (tmp_path / "slim").exists()
            taken += done
            done.clear()
    else:
        pytest.fail("it never came to the end")
    assert (tmp_path / "slim/model.safetensors").read_bytes() == expected
    assert sorted(taken + done) == sorted(steps)  # nothing was kept twice
    assert [entry.name for entry in tmp_path.iterdir()] == ["slim"]


def test_killed_in_earnest(tiny, text_file, tmp_path, whole):
    """SIGKILL at five moments."""
    settings = {**SETTINGS, "calibration": str(text_file)}
    code = f"from cai_runtime.compress import compress; compress({str(tiny)!r}, {str(tmp_path / 'slim')!r}, **{settings!r})"
    work = tmp_path / ".slim.work"
    for wanted in (1, 4, 8, 11, 14):
        process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            while process.poll() is None and len(list(work.glob("*.safetensors"))) < wanted:
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    found = (tmp_path / "slim/model.safetensors").read_bytes()
    subprocess.run(
        [sys.executable, "-c", code.replace(str(tmp_path / "slim"), str(tmp_path / "whole"))], check=True, env=env
    )
    assert found == (tmp_path / "whole/model.safetensors").read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} == {"slim", "whole"}


def test_another_run_in_the_way(tiny, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("cai_runtime.compress.run.Run._compress_blocks", _killed)
    with pytest.raises(Killed):
        compress(tiny, tmp_path / "slim", calibration=text_file, **SETTINGS)
    monkeypatch.undo()
    with pytest.raises(CompressionError, match="other options .options.*--restart"):
        compress(tiny, tmp_path / "slim", calibration=text_file, **{**SETTINGS, "keep": 0.6})
    held = Work(tmp_path / "held", {"a": 1})
    with pytest.raises(CompressionError, match="locked"):
        Work(tmp_path / "held", {"a": 1})
    held.close()
    compress(tiny, tmp_path / "slim", calibration=text_file, restart=True, **{**SETTINGS, "keep": 0.6})
    assert [entry.name for entry in tmp_path.iterdir()] == ["slim"]


def test_a_damaged_step_is_named(tiny, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("cai_runtime.compress.run.Run._compress_blocks", _killed)
    with pytest.raises(Killed):
        compress(tiny, tmp_path / "slim", calibration=text_file, **SETTINGS)
    monkeypatch.undo()
    (tmp_path / ".slim.work/curves-0-0000.safetensors").write_bytes(b"nothing")
    with pytest.raises(CompressionError, match=r"curves-0-0000.*--restart"):
        compress(tiny, tmp_path / "slim", calibration=text_file, **SETTINGS)


def _killed(*_args):
    raise Killed
