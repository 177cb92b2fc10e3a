"""What benchmarks/gpu_suite.py does when something goes wrong on the GPU: of what was measured nothing is lost."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def report(tmp_path: Path):
    gpu_report = importlib.import_module("gpu.report")
    return gpu_report.Report(tmp_path / "found.json", time.monotonic() + 100, {}, tmp_path / "found.log")


def program(body: str):
    """The command of a section whose process does `body` with `findings`."""

    def command(findings: Path, until: float) -> list[str]:
        begin = "import sys, time; from pathlib import Path; from gpu.report import Findings\n"
        return [sys.executable, "-c", f"{begin}findings = Findings(Path({str(findings)!r}), {until})\n{body}"]

    return command


def written(report) -> dict:
    return json.loads(report.path.read_text())["sections"]


def test_a_section_that_hangs_costs_its_limit_and_keeps_what_it_found(report):
    report.section("hangs", 4, program("findings.add(seconds=1.5); time.sleep(60)"))
    report.section("next", 20, program("findings.add(seconds=2.5)"))
    hung, following = written(report)["hangs"], written(report)["next"]
    assert not hung["ok"] and hung["items"] == [{"seconds": 1.5}] and "stopped after 4 s" in hung["error"]
    assert following["ok"] and following["items"] == [{"seconds": 2.5}]
    assert report.failed == ["hangs"] and "seconds 1.5" in report.log.read_text()


def test_a_section_that_crashes_keeps_what_it_found(report):
    report.section("dies", 20, program("findings.add(a=1); import os; print('bad', flush=True); os.abort()"))
    entry = written(report)["dies"]
    assert not entry["ok"] and entry["items"] == [{"a": 1}] and "exit status -6: " in entry["error"]
    assert "bad" in entry["error"] and "bad" in report.log.read_text()


def test_one_part_of_a_section_fails_and_the_others_are_found(report):
    body = """
def fails(): raise ValueError('an illegal memory access')
findings.attempt('first', fails)
findings.attempt('second', lambda: findings.add(b=2))
findings._until = 0
findings.attempt('third', fails)
"""
    report.section("parts", 20, program(body))
    entry = written(report)["parts"]
    assert entry["items"] == [{"b": 2}] and not entry["ok"]
    assert entry["problems"] == [
        "first: ValueError: an illegal memory access",
        "third: not run: the time was used up",
    ]


def test_no_section_begins_after_the_time(report):
    report.deadline = time.monotonic()
    report.section("late", 20, lambda *_: pytest.fail("there is no time left"))
    assert "not run" in written(report)["late"]["error"] and report.failed == ["late"]


def test_a_child_that_takes_too_long_ends_with_what_it_started():
    """The grandchild holds the child's output open, as pytest's workers do."""
    children = importlib.import_module("gpu.children")
    script = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="took more than 2 s:\nbegun"):
        children.run_child([sys.executable, "-c", script], 2)
    assert time.monotonic() - began < 30
    with pytest.raises(RuntimeError, match="exited with 3:\nbad"):
        children.run_child([sys.executable, "-c", "import sys; sys.stderr.write('bad'); sys.exit(3)"], 60)


SIDE_BY_SIDE = """\
[gw0] [ 10%] PASSED tests/k.py::test_a[bf16-decode]
tests/k.py::test_b
[gw1] [ 20%] FAILED tests/k.py::test_b[int8]
[gw0] [ 30%] SKIPPED tests/k.py::test_c
"""


def test_what_tests_came_to_is_read_also_where_they_were_cut_off():
    read_tests = importlib.import_module("gpu.children").read_tests
    cut = read_tests(SIDE_BY_SIDE, finished=False)
    assert (cut.passed, cut.failed, cut.failures, cut.ok) == (1, 1, ["tests/k.py::test_b[int8]"], False)
    whole = read_tests(SIDE_BY_SIDE + "FAILED tests/k.py::test_b[int8] - assert 2 == 1\n", finished=True)
    assert whole.failures == ["tests/k.py::test_b[int8] - assert 2 == 1"]
    alone = read_tests("tests/k.py::test_a PASSED   [ 50%]\ntests/k.py::test_b[x y] PASSED  [100%]\n", finished=True)
    assert (alone.passed, alone.ok) == (2, True)
    assert not read_tests("no tests ran in 0.1s\n", finished=True).ok


def test_pytest_itself_is_read(tmp_path: Path):
    children = importlib.import_module("gpu.children")
    tests = "def test_good(): pass\ndef test_bad(): assert 1 == 2\n"
    (tmp_path / "test_two.py").write_text(tests)
    child = children.Child([*children.pytest_command([str(tmp_path / "test_two.py")], 1), f"--rootdir={tmp_path}"])
    assert child.wait(time.monotonic() + 60) == 1
    found = children.read_tests(child.text(), finished=True)
    assert (found.passed, found.failed) == (1, 1) and "test_bad - assert 1 == 2" in found.failures[0]


def test_no_file_of_results_is_written_over(tmp_path: Path):
    suite = importlib.import_module("gpu_suite")
    first = tmp_path / "found_2026-01-01.json"
    assert suite.unused(first) == first
    first.touch()
    assert suite.unused(first) == tmp_path / "found_2026-01-01_2.json"


def test_tuned_tiles_need_no_package_to_find_the_cache(monkeypatch: pytest.MonkeyPatch):
    from cai_runtime.home import cai_home

    monkeypatch.setenv("CAI_HOME", "x")  # so that it is put back
    monkeypatch.delenv("CAI_HOME")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    importlib.import_module("gpu.environment").name_a_cache()
    assert cai_home() == Path.home() / ".cache/cai_runtime"


def test_prepared_libraries_of_other_sources_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    environment = importlib.import_module("gpu.environment")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "KIT", tmp_path / "kit")
    monkeypatch.setattr(environment.shutil, "which", lambda name: name)
    for folder in ("csrc", "cai_runtime/_lib", "kit/lib"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "setup.py").touch()
    (tmp_path / "kit/lib/libcai_cuda.so").write_text("a library")
    (tmp_path / "kit/manifest.json").write_text(json.dumps({"sources": "others"}))
    assert any("of other sources" in said for said in environment.use_kit())
    assert not (tmp_path / "cai_runtime/_lib/libcai_cuda.so").exists()
    (tmp_path / "kit/manifest.json").write_text(json.dumps({"sources": environment.sources_digest()}))
    environment.use_kit()
    assert (tmp_path / "cai_runtime/_lib/libcai_cuda.so").read_text() == "a library"


def test_both_calls_fit_their_time():
    sections = importlib.import_module("gpu.sections")
    # Engines are checked beside the kernels' tests.
    assert {*sections.names_of_call(1), *sections.names_of_call(2), "engine"} == set(sections.SECTIONS)
    first = sections.names_of_call(1)
    assert first.index("correct") < first.index("decode")  # right comes before fast
    assert all(section.limit <= 150 for section in sections.SECTIONS.values())


def test_tests_side_by_side_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    correct = importlib.import_module("gpu.correct")
    context = importlib.import_module("gpu.context")
    findings = importlib.import_module("gpu.report").Findings(tmp_path / "found.json", time.time() + 60)
    (tmp_path / "test_right.py").write_text("def test_right(): pass\n")
    (tmp_path / "test_wrong.py").write_text("def test_wrong(): assert not 'wrong'\n")
    rootdir = f"--rootdir={tmp_path}"
    monkeypatch.setattr(correct, "triton_tests", lambda: [str(tmp_path / "test_right.py"), rootdir])
    monkeypatch.setattr(correct, "CUDA_TESTS", [str(tmp_path / "test_wrong.py"), rootdir])
    monkeypatch.setattr(context.Context, "backends", ["triton", "cuda"])
    here = context.Context(context.REHEARSAL, "cpu", tmp_path / "none.json", tmp_path)
    correct.run(findings, here, until=time.monotonic() + 60, warm=False)
    triton, cuda = sorted(findings.items, key=lambda item: item["failed"])
    assert triton["what"] == "tests triton" and (triton["passed"], triton["failed"], triton["finished"]) == (1, 0, True)
    assert cuda["what"] == "tests cuda" and "assert not 'wrong'" in cuda["failures"][0]
    assert len(findings.problems) == 1 and findings.problems[0].startswith("tests cuda: ")


def test_engines_checked_beside_the_tests_are_reported_with_them(tmp_path: Path):
    correct = importlib.import_module("gpu.correct")
    findings = importlib.import_module("gpu.report").Findings(tmp_path / "found.json", time.time() + 60)
    other = tmp_path / "engine.json"
    other.write_text(json.dumps({"items": [{"check": "bits"}], "problems": ["float32: ValueError"]}))
    correct._take_over(findings, other, 1)
    assert findings.items == [{"check": "bits"}] and findings.problems == ["float32: ValueError"]
    correct._take_over(findings, other, -9)  # it died before it wrote anything
    assert findings.problems[1:] == ["engine: exit status -9"]
