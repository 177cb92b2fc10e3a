"""Streams that end early: closed, dropped, interrupted or failed, they leave an engine that is free and usable."""

import gc
import os
import signal
import threading
import time

import pytest

from cai_runtime import APIError, InternalServerError

LONG = {"max_tokens": 150, "ignore_eos": True}


def assert_free(factory, aborted):
    """Every choice was aborted and every page is back. The engine carries out aborts before it answers the check."""
    factory.resume()
    (engine,) = factory.engines
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.aborted, stats.running, stats.waiting, stats.finished) == (aborted, 0, 0, 0)


def start(client, factory, ask):
    """A stream of three choices that waits in the engine, nine chunks of it consumed."""
    factory.pause_before_step(10, full=3)
    stream = client.chat.completions.create(**ask, **LONG, n=3, stream=True)
    return stream, [next(stream) for _ in range(9)]


def test_close(client, factory, ask):
    stream, _ = start(client, factory, ask)
    stream.close()
    stream.close()
    assert list(stream) == []
    assert_free(factory, aborted=3)
    assert client.chat.completions.create(**ask).choices[0].finish_reason == "stop"


def test_context_manager(client, factory, ask):
    stream, _ = start(client, factory, ask)
    with stream as entered:
        assert entered is stream
    assert_free(factory, aborted=3)


def test_drop(client, factory, ask):
    stream, _ = start(client, factory, ask)
    del stream
    gc.collect()
    assert_free(factory, aborted=3)


def test_drop_before_the_first_chunk(client, factory, ask):
    factory.pause_before_step(10)
    stream = client.completions.create(prompt="a", **LONG, stream=True)
    del stream
    gc.collect()
    assert_free(factory, aborted=1)


def test_close_from_another_thread_ends_the_iteration(client, factory, ask):
    factory.pause_before_step(10)
    stream = client.chat.completions.create(**ask, **LONG, stream=True)
    seen, waiting = [], threading.Event()

    def consume():
        for chunk in stream:
            seen.append(chunk)
            if len(seen) == 1 + 10:  # everything before the pause
                waiting.set()

    thread = threading.Thread(target=consume)
    thread.start()
    assert waiting.wait(timeout=30)
    stream.close()
    factory.resume()
    thread.join(timeout=30)
    assert not thread.is_alive() and len(seen) == 11
    assert_free(factory, aborted=1)


def to_main_thread(signum):
    signal.pthread_kill(threading.main_thread().ident, signum)


@pytest.mark.skipif(os.name != "posix", reason="signals go to threads on POSIX only")
@pytest.mark.parametrize("stream", [False, True])
def test_interrupt(client, factory, ask, stream):
    """Ctrl-C while the main thread waits for a reply."""
    factory.pause_before_step(10, full=3, and_then=lambda: to_main_thread(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        reply = client.chat.completions.create(**ask, **LONG, n=3, stream=stream)
        for _ in reply:
            pass
    assert_free(factory, aborted=3)


def test_failure_in_the_stream(client, factory, ask):
    factory.pause_before_step(10)
    stream = client.chat.completions.create(**ask, **LONG, stream=True)
    seen = [next(stream) for _ in range(5)]
    while factory.runners[0].gate.is_set():
        time.sleep(0.001)
    factory.runners[0].fail = RuntimeError("device on fire")
    factory.resume()
    with pytest.raises(InternalServerError, match="device on fire") as caught:
        for chunk in stream:
            seen.append(chunk)  # noqa: PERF402 - a list is wanted up to the failure
    assert len(seen) == 1 + 10  # what came before the failure was delivered
    assert isinstance(caught.value.__cause__.__cause__, RuntimeError)
    factory.runners[0].fail = None
    assert client.chat.completions.create(**ask).choices[0].finish_reason == "stop"


def test_failure_of_a_whole_reply(client, factory, ask):
    client.chat.completions.create(**ask)
    factory.runners[0].fail = RuntimeError("device on fire")
    with pytest.raises(InternalServerError, match="device on fire"):
        client.chat.completions.create(**ask, n=2)


def test_unload_fails_running_requests(client, factory, ask):
    stream, _ = start(client, factory, ask)
    threading.Timer(0.05, factory.resume).start()
    client.models.unload("abc")
    with pytest.raises(APIError) as caught:
        list(stream)
    assert caught.value.code == "engine_closed"


def test_a_failing_submit_is_an_internal_error(client, factory, ask, monkeypatch):
    client.chat.completions.create(**ask, max_tokens=1)
    (engine,) = factory.engines

    def no_room(sequences):
        raise MemoryError("no room")

    monkeypatch.setattr(engine._loop, "send_requests", no_room)
    with pytest.raises(InternalServerError, match="no room"):
        client.chat.completions.create(**ask, **LONG, n=3)


class TimeLimit(Exception):
    """What a task queue raises in the handler of its alarm."""


@pytest.fixture
def alarm():
    """alarm() -> a signal whose handler, the way task queues have one, raises TimeLimit."""

    def handler(signum, frame):
        raise TimeLimit

    before = signal.signal(signal.SIGUSR1, handler)
    yield lambda: to_main_thread(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.skipif(os.name != "posix", reason="needs a signal of the program's own")
@pytest.mark.parametrize("stream", [False, True])
def test_an_exception_of_a_signal_handler_comes_out_as_itself(client, factory, ask, alarm, stream):
    factory.pause_before_step(10, full=3, and_then=alarm)
    with pytest.raises(TimeLimit):
        # Not kept: a stream whose loop was interrupted between two chunks ends when it is dropped.
        list(client.chat.completions.create(**ask, **LONG, n=3, stream=stream))
    assert_free(factory, aborted=3)


@pytest.mark.skipif(os.name != "posix", reason="needs a signal of the program's own")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_during_submission(client, factory, ask, alarm, monkeypatch, when):
    client.chat.completions.create(**ask, max_tokens=1)
    (engine,) = factory.engines
    send = engine._loop.send_requests

    def interrupted(sequences):
        if when == "after":
            send(sequences)
        alarm()

    monkeypatch.setattr(engine._loop, "send_requests", interrupted)
    factory.runners[0].gate.clear()
    with pytest.raises(TimeLimit):
        client.chat.completions.create(**ask, **LONG, n=3)
    factory.resume()
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.aborted, stats.running, stats.waiting) == (3 if when == "after" else 0, 0, 0)


@pytest.mark.skipif(os.name != "posix", reason="needs a signal of the program's own")
def test_a_signal_while_a_model_opens(client, factory, ask, alarm):
    factory.prepare = lambda runner: alarm()
    with pytest.raises(TimeLimit):
        client.chat.completions.create(**ask)


def test_choices_without_a_seat_hold_nobody_up(client, factory, ask):
    """Eight seats, ten choices: the chunks of those that run come while the others wait."""
    factory.pause_before_step(10, full=8)
    factory.wait_for = 10
    stream = client.chat.completions.create(**ask, **LONG, n=10, stream=True)
    seen = [next(stream).choices[0].index for _ in range(10 + 8 * 10)]
    assert seen[:10] == list(range(10)) and set(seen[10:]) == set(range(8))
    assert min(seen[10:].count(index) for index in range(8)) >= 9
    stream.close()
    assert_free(factory, aborted=10)


def test_two_threads_on_one_stream(client, ask):
    request = {**ask, "max_tokens": 100, "ignore_eos": True}
    want = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**request, stream=True)]
    stream = client.chat.completions.create(**request, stream=True)
    seen: list[str] = []
    threads = [
        threading.Thread(target=lambda: seen.extend(chunk.choices[0].delta.content for chunk in stream))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(seen) == len(want) and sorted(map(str, seen)) == sorted(map(str, want))


def test_many_threads(client, ask):
    """Seeded requests of many threads, some dropped, give what they give alone."""
    request = {**ask, "temperature": 1, "max_tokens": 20, "ignore_eos": True}
    alone = [client.chat.completions.create(**request, seed=seed).choices[0].message.content for seed in range(12)]
    together = [""] * 12

    def run(seed):
        stream = client.chat.completions.create(**request, seed=seed, stream=True)
        if seed % 4 == 3:
            next(stream)
            return stream.close()
        together[seed] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert together == [text if seed % 4 != 3 else "" for seed, text in enumerate(alone)]
