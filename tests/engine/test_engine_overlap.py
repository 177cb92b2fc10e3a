"""The engine works on a step while the model computes the next one."""

import random
import threading

import numpy as np
import pytest

from cai_runtime.engine.runner_thread import SMALL, CallThread
from cai_runtime.engine.seats import Seats
from cai_runtime.engine.step import Feed, NewPages
from cai_runtime.errors import EngineClosedError, RequestAbortedError
from cai_runtime.kernels.batch import FULL


@pytest.mark.parametrize("batch", [1, SMALL, SMALL + 1])
def test_text_comes_while_the_next_step_is_computed(make_engine, make_runner, greedy, expected, batch):
    """Each token is delivered when the next step is in the model already, and cannot get on."""
    runner = make_runner()
    runner.gate = threading.Semaphore(0)
    handles = make_engine(runner).submit_all([greedy([1, i], 5, ignore_eos=True) for i in range(batch)])
    deltas = [iter(handle) for handle in handles]
    tokens = [[] for _ in handles]
    for _ in range(5):
        runner.gate.release()  # for one step; the one behind it stands at the gate
        for own, new in zip(tokens, deltas, strict=True):
            own += next(new).token_ids
    assert [tuple(own) for own in tokens] == [expected([1, i], 5) for i in range(batch)]
    assert [list(rest) for rest in deltas] == [[]] * batch


def test_a_stop_string_drops_the_row_that_is_under_way(make_engine, make_runner, greedy, expected):
    """The step behind a stop string has been launched: its token reaches nobody, and nobody else's is lost."""
    runner = make_runner()
    engine = make_engine(runner)
    whole = engine.submit(greedy([8, 9], ignore_eos=True)).result()
    stopped, other = engine.submit_all(
        [greedy([8, 9], stop=(whole.text[6:9],), ignore_eos=True), greedy([3], 20, ignore_eos=True)]
    )
    assert stopped.result().token_ids == whole.token_ids[:9]
    assert other.result().token_ids == expected([3], 20)
    assert engine.stats().tokens_decoded == 20 + 9 + 20
    assert sum(map(sum, runner.steps)) > 2 + 19 + 2 + 8 + 1 + 19, "one token more was fed than the texts needed"


def test_an_abort_while_a_step_is_under_way(make_engine, make_runner, greedy, expected):
    runner = make_runner()
    runner.gate = threading.Semaphore(0)
    engine = make_engine(runner, max_batch=2)
    first, second, third = engine.submit_all([greedy([i], 20, ignore_eos=True) for i in range(3)])
    runner.gate.release()
    next(iter(first))
    first.abort()
    runner.gate.release(10_000)
    with pytest.raises(RequestAbortedError):
        first.result()
    assert second.result().token_ids == expected([1], 20)
    assert third.result().token_ids == expected([2], 20), "in the seat that became free"


def test_a_text_that_ended_before_a_crash_is_delivered(make_engine, greedy, expected):
    engine = make_engine(prefix_cache=False)
    schedule = engine._loop.scheduler.schedule

    def once(budget):
        engine._loop.scheduler.schedule = broken
        return schedule(budget)

    def broken(budget):
        raise ZeroDivisionError("a bug")

    engine._loop.scheduler.schedule = once
    short, long = engine.submit_all([greedy([1], 1), greedy([2], 5, ignore_eos=True)])
    assert short.result(timeout=30).token_ids == expected([1], 1)
    with pytest.raises(EngineClosedError, match="a bug"):
        long.result(timeout=30)


def test_the_thread_of_a_runner_ends_with_its_engine(make_engine, greedy):
    engine = make_engine()
    before = {thread for thread in threading.enumerate() if thread.name.startswith("cai-runner-")}
    for handle in engine.submit_all([greedy([1], 2)] * (SMALL + 1)):
        handle.result()
    (thread,) = {thread for thread in threading.enumerate() if thread.name.startswith("cai-runner-")} - before
    engine.close()
    assert not thread.is_alive()


def test_calls_run_in_order_and_their_errors_are_kept():
    thread, order = CallThread("cai-runner-test"), []
    promises = [thread.submit(lambda i=i: order.append(i) or i) for i in range(100)]
    small = [thread.submit(lambda i=i: order.append(i) or i, small=True) for i in (100, 101)]
    broken = thread.submit(lambda: 1 // 0, small=True)
    behind = thread.submit(lambda: order.append(102) or threading.current_thread().name)
    by_itself = thread.submit(lambda: order.append(103) or threading.current_thread(), small=True)
    assert by_itself.wait() is threading.current_thread() and order == list(range(104))
    assert behind.wait() == "cai-runner-test" and [promise.wait() for promise in small] == [100, 101]
    last = thread.submit(lambda: "after it")
    assert [promise.wait() for promise in promises] == list(range(100))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            broken.wait()
    assert last.wait() == "after it"
    thread.close()
    thread.close()
    with pytest.raises(RuntimeError, match="closed"):
        thread.submit(list)


@pytest.mark.parametrize("seed", range(5))
def test_the_numbers_of_a_step_are_those_of_its_sequences(seed):
    """Against the definition, for any mixture of chunks, decoding and drafts, over tables that grow bit by bit."""
    rng, size = random.Random(seed), 4
    seats, pages = Seats(size), {}
    for _ in range(30):
        feeds, changes = [], []
        for seat in rng.sample(range(9), rng.randint(1, 5)):
            start, count = rng.randrange(40), rng.choice([1, 1, 3, 17])
            table = pages.setdefault(seat, [])
            new = [rng.randrange(1000) for _ in range(max((start + count - 1) // size + 1 - len(table), 0))]
            if new:
                changes.append(NewPages(seat, FULL, len(table), new))
                table += new
            elif rng.random() < 0.3:
                at = rng.randrange(len(table))
                table[at] = rng.randrange(1000)
                changes.append(NewPages(seat, FULL, at, table[at : at + 1]))
            ids = [rng.randrange(50) for _ in range(count)]
            feeds.append(Feed(seat, start, ids, rng.randint(0, count)))
        seats.write(changes)
        n = seats.numbers(feeds)
        slots, table = n.tables[FULL]
        where = [(f, p) for f in feeds for p in range(f.start, f.start + len(f.ids))]
        assert n.ids.tolist() == [f.ids[p - f.start] for f, p in where]
        assert n.positions.tolist() == [p for _, p in where]
        assert slots.tolist() == [pages[f.seat][p // size] * size + p % size for f, p in where]
        assert n.context_len.tolist() == [f.start + len(f.ids) for f in feeds]
        assert np.diff(n.query_start).tolist() == [len(f.ids) for f in feeds] and n.query_start[0] == 0
        last = [(f, p) in [(f, f.start + len(f.ids) - 1 - i) for i in range(f.wanted)] for f, p in where]
        assert n.wanted.tolist() == [row for row, wanted in enumerate(last) if wanted]
        for f, row in zip(feeds, table.tolist(), strict=True):
            used = (f.start + len(f.ids) + size - 1) // size
            assert row[:used] == pages[f.seat][:used]
        assert {a.dtype for a in (n.ids, n.positions, slots, table, n.context_len, n.query_start, n.wanted)} == {
            np.dtype(np.int32)
        }
