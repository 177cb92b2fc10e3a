import pytest
import torch

from cai_runtime.bench import timing
from cai_runtime.bench.bandwidth import matmul_rates
from cai_runtime.bench.roofs import Roofs
from cai_runtime.bench.timing import CallClock, Schedule, Times, interleaved, rotation, thread_count
from cai_runtime.errors import BenchmarkError


def test_the_floor_is_the_slower_of_reading_and_multiplying():
    roofs = Roofs(read=10.0, matmul={"float32": 100.0, "bfloat16": 400.0})
    assert roofs.floor(50, 100, "float32") == 5  # reading
    assert roofs.floor(50, 1000, "float32") == 10  # multiplying
    assert roofs.floor(50, 1000, "bfloat16") == 5
    # Where a processor has no units for bf16, its numbers can be widened.
    assert Roofs(10.0, {"float32": 100.0, "bfloat16": 5.0}).floor(0, 100, "bfloat16") == 1
    assert roofs.higher(Roofs(20.0, {"float32": 90.0, "bfloat16": 500.0})) == Roofs(
        20.0, {"float32": 100.0, "bfloat16": 500.0}
    )


def test_matrix_rates_are_operations_over_seconds():
    rates = matmul_rates(size=64)
    assert set(rates) == {"float32", "bfloat16"}
    assert all(1e6 < rate < 1e15 for rate in rates.values())


def test_sets_exceed_the_cache_several_times_and_fit_in_memory(monkeypatch):
    monkeypatch.setattr(timing, "CACHE_FACTOR", 8)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 100)
    assert rotation([100, 300, 1000], "cpu", available=10**6) == [8, 3, 1]
    assert rotation([1], "cpu", available=10**6) == [timing.MAX_SETS]
    # Half of 1000 is 500: one of each is 300, and each has 100 more.
    assert rotation([50, 250], "cpu", available=1000) == [3, 1]
    with pytest.raises(BenchmarkError, match="half of the available memory"):
        rotation([300, 300], "cpu", available=1000)


def test_contenders_take_turns_and_their_data_rotates():
    made = []
    clocks = [CallClock([lambda name=name, i=i: made.append(f"{name}{i}") for i in range(2)]) for name in "ab"]
    told = []
    times = interleaved(clocks, Schedule(rounds=3, seconds=0), after_turn=told.append)
    assert told == [0, 1, 0, 1, 0, 1]
    assert made == ["a0", "b0", "a1", "b1", "a0", "b0"]
    assert [len(t.seconds) for t in times] == [3, 3]
    assert all(0 < t.best <= t.median for t in times)


def test_median_and_best():
    assert Times((3.0, 1.0, 2.0)).median == 2
    assert Times((3.0, 1.0, 2.0)).best == 1


def test_a_turn_has_at_least_its_seconds():
    times = interleaved([CallClock([lambda: None])], Schedule(rounds=2, seconds=0.002))
    assert len(times[0].seconds) > 2


def test_threads_are_put_back():
    from cai_runtime.kernels import cpu_library

    before = torch.get_num_threads(), cpu_library.num_threads()
    other = 2 if before == (1, 1) else 1
    with pytest.raises(RuntimeError), thread_count(other) as threads:
        assert (threads, torch.get_num_threads(), cpu_library.num_threads()) == (other, other, other)
        raise RuntimeError
    assert (torch.get_num_threads(), cpu_library.num_threads()) == before
    with pytest.raises(BenchmarkError, match="threads is 0"), thread_count(0):
        pass


def test_schedules_that_make_no_sense_are_refused():
    with pytest.raises(BenchmarkError, match="rounds is 0"):
        Schedule(rounds=0)
    with pytest.raises(BenchmarkError, match="seconds is -1"):
        Schedule(seconds=-1)
