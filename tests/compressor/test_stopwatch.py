"""Times by stage: nested stages, open ones, and those of earlier calls."""

import pytest

from cai_runtime.compressor import stopwatch
from cai_runtime.compressor.stopwatch import Stopwatch
from cai_runtime.compressor.work import Work


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now[0])
    return now


def test_a_stage_inside_another_is_counted_by_itself(clock):
    watch = Stopwatch({"a": 10.0})
    with watch.stage("a"):
        clock[0] += 1
        with watch.stage("b"):
            clock[0] += 2
            assert watch.seconds() == {"a": 11, "b": 2}  # both are open
        clock[0] += 4
    clock[0] += 100
    watch.add("c", 0.5)
    assert watch.seconds() == {"a": 15, "b": 2, "c": 0.5}


def test_an_error_ends_a_stage(clock):
    watch = Stopwatch()
    with pytest.raises(ValueError), watch.stage("a"):
        clock[0] += 1
        raise ValueError
    clock[0] += 1
    assert watch.seconds() == {"a": 1}


def test_the_next_call_goes_on(clock, tmp_path):
    work = Work(tmp_path / "work", {})
    with work.watch.stage("a"):
        clock[0] += 3
        work.save("step", {})
        clock[0] += 5  # lost with the process
    work.close()
    work = Work(tmp_path / "work", {})
    with work.watch.stage("a"):
        clock[0] += 1
    assert work.watch.seconds() == {"a": 4}
    work.close()
    (tmp_path / "work" / "seconds.json").write_text("{")
    work = Work(tmp_path / "work", {})
    assert work.watch.seconds() == {}
    work.remove()
