"""Consumers of every kind, and what happens when they leave."""

import asyncio
import contextlib
import gc
import signal
import threading
import time

import pytest

from cai_runtime.engine.handle import Stream
from cai_runtime.engine.request import Delta
from cai_runtime.errors import EngineClosedError, RequestAbortedError

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

    def interrupted(self, index, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "wait", interrupted)
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
        sent = engine._loop.inbox.qsize()  # the owner thread is held in its first step
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await asyncio.to_thread(until, lambda: engine._loop.inbox.qsize() > sent)
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


def test_stream_delivers_before_it_fails():
    stream = Stream()
    stream.put(Delta("a", (1,)))
    stream.fail(RequestAbortedError("x"))
    assert stream.wait(0) and stream.wait(None) and stream.done
