"""Cache entries: whole or absent, built once however many ask, rebuilt when damaged."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from cai_runtime.convert.cache import copy_entry, damage, entry, entry_path
from cai_runtime.errors import SourceError
from cai_runtime.home import cai_home


class Builder:
    """Counts how often it builds."""

    def __init__(self, content: str = "content", seconds: float = 0.0):
        self.count, self.content, self.seconds = 0, content, seconds

    def __call__(self, directory: Path) -> None:
        self.count += 1
        (directory / "sub").mkdir()
        (directory / "sub/a.txt").write_text(self.content)
        time.sleep(self.seconds)


def test_home_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CAI_HOME", str(tmp_path / "x"))
    assert cai_home() == tmp_path / "x"
    monkeypatch.delenv("CAI_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert cai_home().name == "cai_runtime"


def test_entry_is_built_once_and_again_when_forced(home):
    build = Builder()
    path = entry("k", "n", "i", build)
    assert (path / "sub/a.txt").read_text() == "content"
    assert entry("k", "n", "i", build) == path
    assert build.count == 1
    entry("k", "n", "i", build, force=True)
    assert build.count == 2
    assert entry("k", "n", "other", build) != path


@pytest.mark.parametrize(
    ("harm", "rebuilt"),
    [
        (lambda path: (path / "sub/a.txt").write_text("short"), True),
        (lambda path: (path / "sub/a.txt").write_text("CONTENT"), True),  # the same size
        (lambda path: (path / "sub/a.txt").unlink(), True),
        (lambda path: (path / ".cai_receipt.json").write_text("{"), True),
        (lambda path: (path / ".cai_receipt.json").unlink(), True),
        (lambda path: os.utime(path / "sub/a.txt"), False),  # touched, content unchanged
        (lambda path: (path / "new.txt").write_text("kept"), False),
    ],
    ids=["size", "content", "missing", "receipt", "no-receipt", "touched", "added"],
)
def test_damage_is_found_and_repaired(home, harm, rebuilt):
    build = Builder()
    path = entry("k", "n", "i", build)
    time.sleep(0.02)  # so that the modification time differs
    harm(path)
    assert (damage(path) is not None) == rebuilt
    entry("k", "n", "i", build)
    assert build.count == 1 + rebuilt
    assert (path / "sub/a.txt").read_text() == "content"


def test_nothing_is_left_of_a_failed_build(home):
    def fail(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise SourceError("no luck")

    with pytest.raises(SourceError, match="no luck"):
        entry("k", "n", "i", fail)
    assert list((home / "k").iterdir()) == []
    with pytest.raises(SourceError, match="no luck"):
        entry("k", "n", "i", fail, keep_partial=True)
    path = entry("k", "n", "i", lambda directory: None, keep_partial=True)
    assert (path / "half").read_text() == "x", "a partial download is taken up again"


def test_a_failed_forced_build_keeps_the_old_entry(home):
    path = entry("k", "n", "i", Builder())

    def fail(directory: Path) -> None:
        raise SourceError("no luck")

    with pytest.raises(SourceError):
        entry("k", "n", "i", fail, force=True)
    assert damage(path) is None


def test_unwritable_home_says_so(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAI_HOME", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="CAI_HOME"):
        entry("k", "n", "i", Builder())


def test_threads_that_ask_at_once_build_once(home):
    build = Builder(seconds=0.1)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(entry("k", "n", "i", build))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.count == 1
    assert set(found) == {entry_path("k", "n", "i")}


def _build_in_another_process(home: str, log: str) -> None:
    os.environ["CAI_HOME"] = home

    def build(directory: Path) -> None:
        with Path(log).open("a") as f:
            f.write("x")
        time.sleep(0.3)
        (directory / "a").write_text("a")

    assert (entry("k", "n", "i", build) / "a").read_text() == "a"


def test_processes_that_ask_at_once_build_once(home, tmp_path):
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    children = [context.Process(target=_build_in_another_process, args=(str(home), str(log))) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert log.read_text() == "x"


def test_copy_refuses_a_full_directory_unless_forced(home, tmp_path):
    src = entry("k", "n", "i", Builder())
    out = tmp_path / "deep/out"
    assert copy_entry(src, out) == out
    assert sorted(p.name for p in out.rglob("*")) == ["a.txt", "sub"]
    (out / "mine").write_text("x")
    with pytest.raises(SourceError, match="already exists"):
        copy_entry(src, out)
    assert (out / "mine").exists()
    copy_entry(src, out, force=True)
    assert not (out / "mine").exists()
    assert [p.name for p in out.parent.iterdir()] == ["out"]
