"""What benchmarks/gpu_suite.py does when something goes wrong on the GPU: nothing measured is lost."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_suite")


def test_results_are_written_within_a_section_and_none_begins_late(suite: ModuleType, tmp_path: Path):
    report = suite.Report({}, time.monotonic() + 100, tmp_path / "found.json")

    def measure() -> None:
        report.decode.append({"seconds": 1.0})
        report.checkpoint()
        assert json.loads(report.path.read_text())["decode"] == [{"seconds": 1.0}]
        report.deadline = time.monotonic() - 1
        report.checkpoint()

    report.section("decode", measure)
    report.section("linears", lambda: pytest.fail("there is no time left"))
    assert report.failed == ["decode", "linears"]
    found = json.loads(report.path.read_text())
    assert "not finished" in found["sections"]["decode"]["error"] and found["decode"] == [{"seconds": 1.0}]
    assert "not run" in found["sections"]["linears"]["error"]


def test_a_broken_process_hands_what_is_left_to_another(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken() -> None:
        raise RuntimeError("an illegal memory access")

    started: list[list[str]] = []

    def run(command: list[str], **_: object):
        started.append(command)
        return suite.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(suite, "check_engines", broken)
    monkeypatch.setattr(suite.subprocess, "run", run)
    monkeypatch.setattr(suite, "usable", lambda: False)
    report = suite.Report({}, time.monotonic() + 60, tmp_path / "found.json")
    suite.run_on_gpu(report, ["engine", "decode", "attention"])
    assert list(report.sections) == ["engine", "rest"] and report.failed == ["engine"]
    (command,) = started
    assert command[command.index("--only") + 1] == "decode,attention"
    assert command[command.index("--out") + 1] == str(tmp_path)
    assert 0 < float(command[command.index("--minutes") + 1]) <= 1


def test_no_file_of_results_is_written_over(suite: ModuleType, tmp_path: Path):
    first = tmp_path / "found_2026-01-01.json"
    assert suite.unused(first) == first
    first.touch()
    assert suite.unused(first) == tmp_path / "found_2026-01-01_2.json"


def test_tuned_tiles_need_no_package_to_find_the_cache(suite: ModuleType, monkeypatch: pytest.MonkeyPatch):
    from cai_runtime.home import cai_home

    monkeypatch.setenv("CAI_HOME", "x")  # so that it is put back
    monkeypatch.delenv("CAI_HOME")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    suite.name_a_cache()
    assert cai_home() == Path.home() / ".cache/cai_runtime"


def test_a_child_that_takes_too_long_ends_with_what_it_started(suite: ModuleType):
    """The grandchild holds the child's output open, as pytest's workers do."""
    program = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="took more than 2 s:\nbegun"):
        suite.gpu_checks.run_child([sys.executable, "-c", program], 2)
    assert time.monotonic() - began < 30
    with pytest.raises(RuntimeError, match="exited with 3:\nbad"):
        suite.gpu_checks.run_child([sys.executable, "-c", "import sys; sys.stderr.write('bad'); sys.exit(3)"], 60)
