"""Where a checkpoint may be written, and what is left of writers that were killed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cai_runtime.errors import CheckpointWriteError
from cai_runtime.slim.destination import check_destination, destination
from cai_runtime.slim.writer import CheckpointWriter


def test_overwrite_does_not_touch_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("mine")
    with pytest.raises(CheckpointWriteError, match="not a checkpoint") as caught:
        CheckpointWriter(tmp_path / "thesis", config={}, overwrite=True)
    assert caught.value.file == str(tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter.txt").read_text() == "mine"


def test_the_source_is_no_destination(tmp_path: Path) -> None:
    source = tmp_path / "models/source"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").touch()
    (tmp_path / "link").symlink_to(source)
    for dst, match in (
        (source, "is the source itself"),
        (tmp_path / "link", "is the source itself"),
        (source / "slim", "lies inside the source"),
        (tmp_path / "link/slim", "lies inside the source"),
        (source.parent, "has the source inside"),
    ):
        with pytest.raises(CheckpointWriteError, match=match):
            CheckpointWriter(dst, config={}, source_dir=source, overwrite=True)
    assert sorted(entry.name for entry in source.iterdir()) == ["config.json", "model.safetensors"]


def test_odd_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointWriteError, match="NUL"):
        CheckpointWriter(tmp_path / "a\0b", config={})
    for length in (238, 300):
        with pytest.raises(CheckpointWriteError, match="more than 237 bytes"):
            CheckpointWriter(tmp_path / ("n" * length), config={})
    CheckpointWriter(tmp_path / ("n" * 237), config={}).abort()
    (tmp_path / "loop").symlink_to("loop")
    for dst in (tmp_path / "loop", tmp_path / "loop/slim"):
        with pytest.raises(CheckpointWriteError, match=r"not a directory|can't be written"):
            CheckpointWriter(dst, config={}, source_dir=tmp_path / "source")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert destination("..") == tmp_path and destination("x/../y") == tmp_path / "inside/y"
    check_destination(destination("."))  # an empty directory


@pytest.mark.skipif(sys.platform == "win32", reason="no lock on directories there")
def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch; from cai_runtime.slim.writer import CheckpointWriter; "
        f"w = CheckpointWriter({str(tmp_path / 'c')!r}, config={{}}, max_shard_bytes=1); "
        "w.add_tensor('a', torch.ones(2)); w.add_tensor('b', torch.ones(2)); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (abandoned,) = tmp_path.iterdir()
    other = tmp_path / ".other.0123abcd.partial"
    other.mkdir()
    first = CheckpointWriter(tmp_path / "c", config={})
    assert not abandoned.exists()
    second = CheckpointWriter(tmp_path / "c", config={})  # the first one is alive, and keeps its own
    second.abort()
    first.add_tensor("a", torch.ones(2))
    first.finish()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [other.name, "c"]
