"""Streams that end early: closed, dropped, interrupted or failed, they leave an engine that is free and usable."""

import _thread
import gc
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


@pytest.mark.parametrize("stream", [False, True])
def test_interrupt(client, factory, ask, stream):
    """Ctrl-C while the main thread waits for a reply."""
    factory.pause_before_step(10, full=3, and_then=_thread.interrupt_main)
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


def test_nothing_runs_when_one_choice_is_refused(client, factory, ask, monkeypatch):
    client.chat.completions.create(**ask, max_tokens=1)
    (engine,) = factory.engines
    submit, calls = engine.submit, []

    def third_fails(request):
        calls.append(request)
        if len(calls) == 3:
            raise MemoryError("no room")
        return submit(request)

    factory.runners[0].gate.clear()
    monkeypatch.setattr(engine, "submit", third_fails)
    with pytest.raises(InternalServerError, match="no room"):
        client.chat.completions.create(**ask, **LONG, n=3)
    factory.resume()
    engine.check_integrity()
    assert engine.stats().aborted == 2


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
