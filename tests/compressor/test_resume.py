"""A compression that was stopped anywhere goes on and comes to the same bytes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from cai_runtime.compressor import compress, dry_run
from cai_runtime.compressor.work import FORMAT, Work
from cai_runtime.errors import CaiError, CheckpointWriteError, CompressionError, SourceError
from cai_runtime.slim.reader import Checkpoint

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
    code = f"from cai_runtime import compress; compress({str(tiny)!r}, {str(tmp_path / 'slim')!r}, **{settings!r})"
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
    monkeypatch.setattr("cai_runtime.compressor.run.Run._compress_blocks", _killed)
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
    monkeypatch.setattr("cai_runtime.compressor.run.Run._compress_blocks", _killed)
    with pytest.raises(Killed):
        compress(tiny, tmp_path / "slim", calibration=text_file, **SETTINGS)
    monkeypatch.undo()
    (tmp_path / ".slim.work/curves-0-0000.safetensors").write_bytes(b"nothing")
    with pytest.raises(CompressionError, match=r"curves-0-0000.*--restart"):
        compress(tiny, tmp_path / "slim", calibration=text_file, **SETTINGS)


def _killed(*_args, **_kwargs):
    raise Killed


@pytest.mark.parametrize("elastic", [False, True])
def test_stopped_while_the_result_is_judged(tiny, text_file, tmp_path, monkeypatch, elastic):
    """The checkpoint is there: the same call judges it, and makes nothing again."""
    kind = {"elastic": True, "keep": 1.0, "shift": False, "refine_epochs": 0, "heal_tokens": 0} if elastic else {}
    settings = {**SETTINGS, **kind, "evaluate": True, "calibration": text_file}
    pipeline = "cai_runtime.compressor.pipeline."
    judges = {"judge_keeps": _judged, "quality": lambda *_args, **_kwargs: {"perplexity": 1.0}}
    for name in judges:
        monkeypatch.setattr(pipeline + name, _killed)
    with pytest.raises(Killed):
        compress(tiny, tmp_path / "slim", **settings)
    weights = (tmp_path / "slim/model.safetensors").read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} == {"slim", ".slim.work"}
    with pytest.raises(
        CheckpointWriteError, match="exists"
    ):  # another source's, or another call's, is not taken for it
        (tmp_path / ".slim.work").rename(tmp_path / "aside")
        compress(tiny, tmp_path / "slim", **settings)
    (tmp_path / "aside").rename(tmp_path / ".slim.work")
    for name, judge in judges.items():
        monkeypatch.setattr(pipeline + name, judge)
    monkeypatch.setattr("cai_runtime.compressor.run.Run.run", _killed)
    report = compress(tiny, tmp_path / "slim", **settings)
    assert report.quality == {"perplexity": 1.0} and report.seconds["evaluate"] >= 0
    assert (tmp_path / "slim/model.safetensors").read_bytes() == weights
    assert json.loads((tmp_path / "slim/slim_report.json").read_text()) == json.loads(json.dumps(report.to_json()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["slim"]


def test_a_judgement_that_fails_leaves_the_checkpoint(tiny, text_file, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise SourceError("no text")

    monkeypatch.setattr("cai_runtime.compressor.pipeline.quality", fail)
    settings = {**SETTINGS, "calibration": text_file}
    with pytest.raises(CompressionError, match=r"slim is complete.*no text.*--no-evaluation"):
        compress(tiny, tmp_path / "slim", **{**settings, "evaluate": True})
    Checkpoint.open(tmp_path / "slim").close()
    assert compress(tiny, tmp_path / "slim", **settings).quality is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["slim"]


def test_stopped_around_the_publication(tiny, text_file, tmp_path, monkeypatch, whole):
    """Before it, the steps are there; behind it, nothing is left to do. What stood there is not taken for the result."""
    settings = {**SETTINGS, "calibration": text_file, "overwrite": True}
    compress(tiny, tmp_path / "slim", **{**settings, "keep": 0.9})
    for name in ("cai_runtime.slim.writer.publish", "cai_runtime.compressor.run.Work.keep_only"):
        monkeypatch.setattr(name, _killed)
        with pytest.raises(Killed):
            compress(tiny, tmp_path / "slim", **settings)
        monkeypatch.undo()
    assert (tmp_path / "slim/model.safetensors").read_bytes() == whole[0]
    monkeypatch.setattr("cai_runtime.compressor.run.Run.run", _killed)
    compress(tiny, tmp_path / "slim", **{**settings, "overwrite": False})
    assert [entry.name for entry in tmp_path.iterdir()] == ["slim"]


def test_stopped_while_the_directory_begins_or_goes(tmp_path):
    work = Work(tmp_path / "w", {"a": {"b": 1, "c": 2}})
    work.save("step", {}, 1)
    work.close()
    for left in ({"lock"}, {"lock", "manifest.json.partial"}, {"lock", "manifest.json"}):
        for entry in (tmp_path / "w").iterdir():
            entry.unlink()
        for name in left:
            content = json.dumps({"format": FORMAT, "a": {"b": 1, "c": 2}}, sort_keys=True, indent=1)
            (tmp_path / "w" / name).write_text(content if name == "manifest.json" else "")
        again = Work(tmp_path / "w", {"a": {"b": 1, "c": 2}})
        again.save("step", {}, 1)
        again.close()
    with pytest.raises(CompressionError, match=r"other options \(a\.c\)"):
        Work(tmp_path / "w", {"a": {"b": 1, "c": 3}})


def test_a_full_disk_keeps_what_is_finished(tiny, text_file, tmp_path, monkeypatch, whole):
    """At every write to the disk in turn: the old checkpoint stays, no partial file does, and the same call goes on."""
    settings = {**SETTINGS, "calibration": text_file, "overwrite": True}
    compress(tiny, tmp_path / "slim", **{**settings, "keep": 0.9})
    old = (tmp_path / "slim/model.safetensors").read_bytes()
    fsync, left = os.fsync, [0]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(20):
        left[0] = 13
        try:
            compress(tiny, tmp_path / "slim", **settings)
            break
        except CaiError as e:
            assert "No space left" in str(e)
        assert (tmp_path / "slim/model.safetensors").read_bytes() == old
        assert not list(tmp_path.rglob("*.partial"))
    assert (tmp_path / "slim/model.safetensors").read_bytes() == whole[0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["slim"]


def test_room_is_wanted_for_what_is_not_there_yet(tiny, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("cai_runtime.compressor.run.Run._heal", _killed)
    settings = {**SETTINGS, "calibration": text_file}
    with pytest.raises(Killed):
        compress(tiny, tmp_path / "slim", **settings)
    monkeypatch.undo()
    held = sum(file.stat().st_size for file in (tmp_path / ".slim.work").iterdir())
    plan, _ = dry_run(
        tiny, tmp_path / "slim", **{k: v for k, v in settings.items() if k not in ("evaluate", "progress")}
    )
    free = SimpleNamespace(free=plan.work_bytes + plan.output_bytes - held)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: free)
    compress(tiny, tmp_path / "slim", **settings)


def _judged(_dense, _slim, report, **_options):
    report.quality = {"perplexity": 1.0}
    report.elastic["quality"] = []
