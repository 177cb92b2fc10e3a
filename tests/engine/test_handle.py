"""Consumers of every kind, and what happens when they leave."""

import asyncio
import contextlib
import gc
import signal
import threading
import time
import traceback

import pytest

from cai_runtime.engine.handle import HandleGroup
from cai_runtime.engine.outbox import Outbox, TokenLog, deliver
from cai_runtime.engine.request import Delta, EndEvent, TextEvent
from cai_runtime.errors import EngineClosedError, RequestAbortedError, RunnerError

LONG = 3000  # tokens; every test that leaves early checks that this many were not generated


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


@pytest.fixture
def slow(make_engine, make_runner):
    """(engine, runner) whose steps take a millisecond, so that a consumer can leave in the middle."""
    runner = make_runner(num_pages=1024, max_context=4096)
    run = runner.run

    def run_slowly(step):
        time.sleep(0.001)
        return run(step)

    runner.run = run_slowly
    return make_engine(runner), runner


def left(engine):
    """Whether the one request was aborted, its pages freed."""
    until(lambda: engine.stats().aborted == 1)
    engine.check_integrity()
    stats = engine.stats()
    return stats.pages_used == 0 and stats.running == 0 and stats.tokens_decoded < LONG


def test_iteration_equals_result(make_engine, greedy, expected):
    handle = make_engine().submit(greedy([1, 2]))
    deltas = list(handle)
    completion = handle.result()
    assert "".join(delta.text for delta in deltas) == completion.text
    assert tuple(t for delta in deltas for t in delta.token_ids) == completion.token_ids == expected([1, 2], 20)
    assert list(handle) == deltas, "a later reader sees everything"
    assert handle.done


def test_async_iteration_and_result(make_engine, greedy, expected):
    engine = make_engine()

    async def main():
        async def one(i):
            handle = engine.submit(greedy([1, i]))
            tokens = tuple([t async for delta in handle for t in delta.token_ids])
            return tokens == (await handle.aresult()).token_ids == expected([1, i], 20)

        return await asyncio.gather(*(one(i) for i in range(20)))

    assert all(asyncio.run(main()))


def test_several_event_loops_and_threads_at_once(make_engine, greedy, expected):
    engine = make_engine()
    wrong = []

    async def main(i):
        results = await asyncio.gather(*(engine.submit(greedy([i, j])).aresult() for j in range(5)))
        return [r.token_ids for r in results]

    def thread(i):
        if asyncio.run(main(i)) != [expected([i, j], 20) for j in range(5)]:
            wrong.append(i)

    threads = [threading.Thread(target=thread, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_one_handle_read_by_a_thread_and_a_task(make_engine, greedy, expected):
    handle = make_engine().submit(greedy([4]))
    seen = []
    thread = threading.Thread(target=lambda: seen.extend(t for d in handle for t in d.token_ids))
    thread.start()

    async def main():
        return tuple([t async for delta in handle for t in delta.token_ids])

    assert asyncio.run(main()) == expected([4], 20)
    thread.join()
    assert tuple(seen) == expected([4], 20)


def test_result_timeout_does_not_abort(slow, greedy):
    engine, _ = slow
    handle = engine.submit(greedy([1], 50, ignore_eos=True))
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.001)
    assert len(handle.result().token_ids) == 50


def test_abort(slow, greedy):
    engine, _ = slow
    handle = engine.submit(greedy([1], LONG, ignore_eos=True))
    iterator = iter(handle)
    next(iterator)
    handle.abort()
    handle.abort()
    with pytest.raises(RequestAbortedError):
        list(iterator)
    with pytest.raises(RequestAbortedError):
        handle.result()
    assert left(engine)
    assert engine.submit(greedy([1])).result().token_ids, "the engine goes on"


def test_abort_of_a_finished_request_does_nothing(make_engine, greedy):
    engine = make_engine()
    handle = engine.submit(greedy([1]))
    completion = handle.result()
    handle.abort()
    assert handle.result() == completion and engine.stats().aborted == 0


def test_abort_while_waiting_for_a_seat(make_engine, make_runner, greedy):
    runner = make_runner()
    runner.gate = threading.Semaphore(0)
    engine = make_engine(runner, max_batch=1)
    first, second = engine.submit(greedy([1])), engine.submit(greedy([2]))
    assert runner.entered.wait(30)
    second.abort()
    runner.gate.release(10_000)
    with pytest.raises(RequestAbortedError):
        second.result()
    assert first.result().token_ids


def test_break_aborts(slow, greedy):
    engine, _ = slow
    for _ in engine.submit(greedy([1], LONG, ignore_eos=True)):
        break
    assert left(engine)


def test_exception_in_the_consumer_aborts(slow, greedy):
    engine, _ = slow
    with contextlib.suppress(KeyError):
        for _ in engine.submit(greedy([1], LONG, ignore_eos=True)):
            raise KeyError
    assert left(engine)


def test_closing_a_generator_over_the_deltas_aborts(slow, greedy):
    engine, _ = slow

    def texts():
        for delta in engine.submit(greedy([1], LONG, ignore_eos=True)):
            yield delta.text

    generator = texts()
    next(generator)
    generator.close()
    assert left(engine)


@pytest.mark.parametrize("wait", ["iterate", "result"])
def test_keyboard_interrupt_while_waiting_aborts(slow, greedy, monkeypatch, wait):
    engine, _ = slow
    handle = engine.submit(greedy([1], LONG, ignore_eos=True))

    def interrupted(self, ready, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(Outbox, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        handle.result() if wait == "result" else next(iter(handle))
    assert left(engine)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals go to threads on POSIX only")
def test_ctrl_c_wakes_the_waiting_main_thread(slow, greedy):
    engine, runner = slow
    main = threading.get_ident()

    def press():
        runner.entered.wait(30)
        time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        engine.submit(greedy([1], LONG, ignore_eos=True)).result()
    thread.join()
    assert left(engine)


def test_forgetting_the_handle_aborts(slow, greedy):
    engine, _ = slow
    handle = engine.submit(greedy([1], LONG, ignore_eos=True))
    del handle
    gc.collect()
    assert left(engine)


def test_break_out_of_async_for_aborts(slow, greedy):
    engine, _ = slow

    async def main():
        async for _ in engine.submit(greedy([1], LONG, ignore_eos=True)):
            break

    asyncio.run(main())
    assert left(engine)


@pytest.mark.parametrize("how", ["iterate", "aresult"])
def test_cancelled_task_aborts(slow, greedy, how):
    engine, runner = slow

    async def consume(handle):
        if how == "aresult":
            await handle.aresult()
        async for _ in handle:
            pass

    async def main():
        handle = engine.submit(greedy([1], LONG, ignore_eos=True))
        task = asyncio.create_task(consume(handle))
        await asyncio.to_thread(runner.entered.wait, 30)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()
        with pytest.raises(RequestAbortedError):
            await handle.aresult()

    asyncio.run(main())
    assert left(engine)


def test_wait_for_timeout_aborts(slow, greedy):
    engine, _ = slow

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.submit(greedy([1], LONG, ignore_eos=True)).aresult(), 0.01)

    asyncio.run(main())
    assert left(engine)


def test_an_event_loop_that_died_does_not_hurt_the_engine(slow, greedy, expected):
    engine, _ = slow
    handle = engine.submit(greedy([1], 100, ignore_eos=True))
    loop = asyncio.new_event_loop()
    waiter = loop.create_task(handle.aresult())
    loop.run_until_complete(asyncio.sleep(0.005))
    loop.close()
    assert len(handle.result().token_ids) == 100
    del waiter
    assert engine.submit(greedy([1])).result().token_ids == expected([1], 20)


def test_close_reaches_async_consumers(make_engine, make_runner, greedy):
    runner = make_runner()
    runner.gate = threading.Semaphore(0)
    engine = make_engine(runner)

    async def main():
        tasks = [asyncio.create_task(engine.submit(greedy([i])).aresult()) for i in range(4)]
        await asyncio.sleep(0)
        await asyncio.to_thread(runner.entered.wait, 30)
        sent = engine._loop.inbox.queue.qsize()  # the owner thread is held in its first step
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await asyncio.to_thread(until, lambda: engine._loop.inbox.queue.qsize() > sent)
        runner.gate.release(10_000)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await closing
        return results

    assert all(isinstance(result, EngineClosedError) for result in asyncio.run(main()))


def test_a_slow_consumer_holds_nobody_up(make_engine, greedy):
    engine = make_engine()
    idle = engine.submit(greedy([1], 200, ignore_eos=True))
    iterator = iter(idle)
    next(iterator)
    assert engine.submit(greedy([2])).result().token_ids
    until(lambda: idle.done)
    assert len(list(iterator)) == 199


def test_a_forgotten_engine_closes_itself(make_runner, greedy):
    from cai_runtime.engine.engine import Engine

    class Tokenizer:
        def decode(self, token_ids, skip_special_tokens=True):
            return "x" * len(token_ids)

    runner = make_runner()
    engine = Engine(runner, Tokenizer(), eos_token_ids=[96])
    thread = engine._thread
    handle = engine.submit(greedy([1], 50, ignore_eos=True))
    del engine
    assert handle.result().text == "x" * 50, "a handle keeps its engine alive until it is done"
    gc.collect()
    thread.join(30)
    assert not thread.is_alive() and runner.closed == 1


def piece(text, *token_ids):
    return Delta((TextEvent(text, token_ids),), token_ids)


LAST = Delta((EndEvent("length"),), (), "length")


def test_a_log_has_what_came_before_its_error():
    log = TokenLog()
    deliver([(log, piece("a", 1)), (log, RequestAbortedError("x"))])
    assert log.deltas == [piece("a", 1)] and log.done and isinstance(log.error, RequestAbortedError)


def test_every_reader_gets_an_error_of_its_own(make_engine, make_runner, greedy):
    runner = make_runner()
    runner.fail_on = 5
    handle = make_engine(runner).submit(greedy([5]))
    errors = []
    for _ in range(3):
        with pytest.raises(RunnerError, match="poison") as caught:
            handle.result()
        errors.append(caught.value)
    lengths = [len(traceback.extract_tb(error.__traceback__)) for error in errors]
    assert len(set(map(id, errors))) == 3 and lengths[0] == lengths[2], "no traceback grows"
    assert all(isinstance(error.__cause__, RuntimeError) for error in errors)


class Waiters:
    """Threads that wait for an outbox, each counting how often it looks whether it may go on."""

    def __init__(self, outbox, readies):
        self.looks = [0] * len(readies)
        self.threads = [
            threading.Thread(target=outbox.wait, args=(self._counted(i, r),)) for i, r in enumerate(readies)
        ]
        for thread in self.threads:
            thread.start()
        until(lambda: len(outbox._waiters) == len(readies))

    def _counted(self, i, ready):
        def look():
            self.looks[i] += threading.current_thread() is self.threads[i]
            return ready()

        return look


def test_a_waiter_wakes_when_it_may_go_on_and_no_sooner(monkeypatch):
    """Who waits for the end sleeps through the tokens."""
    monkeypatch.setattr("cai_runtime.engine.outbox._SLICE", 60)
    outbox = Outbox()
    logs = [TokenLog(outbox, i) for i in range(2)]
    waiters = Waiters(outbox, [lambda: logs[0].done, lambda: bool(logs[1].deltas), lambda: outbox.unfinished == 0])
    for _ in range(5):
        deliver([(logs[0], piece("a", 1))])
    assert len(outbox._waiters) == 3
    deliver([(logs[0], LAST), (logs[1], piece("b", 2))])
    for thread in waiters.threads[:2]:
        thread.join(30)
    assert len(outbox._waiters) == 1
    deliver([(logs[1], LAST)])
    waiters.threads[2].join(30)
    assert max(waiters.looks) <= 4, "twice before the sleep and twice after it, whatever came meanwhile"


def test_a_step_wakes_an_event_loop_once():
    async def main():
        loop, calls = asyncio.get_running_loop(), []
        logs = [TokenLog() for _ in range(5)]
        tasks = [asyncio.create_task(log.outbox.wait_async(lambda log=log: bool(log.deltas))) for log in logs]
        await asyncio.sleep(0)
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (calls.append(args), call(*args))
        deliver([(log, piece("a", 1)) for log in logs])
        await asyncio.gather(*tasks)
        return len(calls)

    assert asyncio.run(main()) == 1


def test_a_waiter_that_leaves_is_forgotten():
    log = TokenLog()
    assert not log.outbox.wait(lambda: log.done, 0.001)

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(log.outbox.wait_async(lambda: log.done), 0.001)

    asyncio.run(main())
    assert log.outbox._waiters == []


def test_a_group_has_the_deltas_of_all_in_the_order_of_arrival(make_engine, greedy, expected):
    group = HandleGroup(make_engine(max_batch=2).submit_all([greedy([i, 3]) for i in range(5)]))
    seen = []
    while deltas := group.next(timeout=60):
        seen += deltas
    for i in range(5):
        assert tuple(t for index, delta in seen if index == i for t in delta.token_ids) == expected([i, 3], 20)
    results = group.results()
    assert [done.token_ids for done in results] == [expected([i, 3], 20) for i in range(5)]
    assert [done.events for done in results] == [
        tuple(e for index, delta in seen if index == i for e in delta.events) for i in range(5)
    ]
    assert [index for index, _ in seen][:4] == [0, 1, 0, 1], "those with seats come first"


def test_a_group_ends_with_its_first_error(make_engine, make_runner, greedy):
    runner = make_runner()
    runner.fail_on = 5
    runner.gate = threading.Semaphore(0)
    group = HandleGroup(make_engine(runner).submit_all([greedy([1], ignore_eos=True), greedy([5])]))
    runner.gate.release(4)
    with pytest.raises(RunnerError):
        group.results(timeout=60)
    with pytest.raises(RunnerError):
        while group.next(timeout=60):
            pass
    group.abort()
    runner.gate.release(10_000)
