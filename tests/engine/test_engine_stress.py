"""Many threads and tasks, aborts, bad requests and a tiny cache; and processes that end without closing the engine."""

import asyncio
import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
import tracemalloc

import pytest

from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.errors import EngineClosedError, InvalidRequestError, RequestTooLargeError, RunnerError


@pytest.mark.parametrize("seed", range(3))
def test_threads_with_aborts_and_bad_requests(make_engine, make_runner, greedy, expected, seed):
    """200 requests from 16 threads: every good one is right, every bad one gets its error, no page leaks."""
    runner = make_runner(num_pages=24, max_context=96)
    runner.fail_on = 95
    engine = make_engine(runner, max_batch=6, prefill_chunk=11)
    wrong, counts = [], {"good": 0, "aborted": 0, "refused": 0, "poisoned": 0}

    def worker(number):
        rng = random.Random(seed * 100 + number)
        for _ in range(200 // 16 + 1):
            system = [rng.randrange(3)] * rng.choice([0, 8, 17])
            prompt = system + [rng.randrange(90) for _ in range(rng.randrange(1, 40))]
            count = rng.randrange(1, 25)
            kind = rng.choice(["good"] * 5 + ["abort", "break", "empty", "large", "poison"])
            try:
                if kind == "empty":
                    engine.submit(greedy([]))
                elif kind == "large":
                    engine.submit(greedy(prompt, 96))
                elif kind == "poison":
                    engine.submit(greedy([*prompt, 95], count)).result(timeout=60)
                elif kind == "abort":
                    engine.submit(greedy(prompt, count)).abort()
                    counts["aborted"] += 1
                    continue
                elif kind == "break":
                    for _ in engine.submit(greedy(prompt, count)):
                        break
                    continue
                else:
                    tokens = engine.submit(greedy(prompt, count)).result(timeout=60).token_ids
                    if tokens == expected(prompt, count):
                        counts["good"] += 1
                        continue
                wrong.append((kind, prompt, count))
            except (InvalidRequestError, RequestTooLargeError) as error:
                counts["refused"] += 1
                if kind not in ("empty", "large"):
                    wrong.append((kind, error))
            except RunnerError as error:
                counts["poisoned"] += 1
                if 95 not in [*prompt, *expected(prompt, count)[:-1]] and kind != "poison":
                    wrong.append((kind, error))
            if rng.random() < 0.1:
                engine.check_integrity()

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    assert all(counts.values()), counts
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert stats.preemptions > 0 and stats.prefix_hit_tokens > 0


def test_tasks_with_cancellations(make_engine, make_runner, greedy, expected):
    engine = make_engine(make_runner(num_pages=24, max_context=96), max_batch=6, prefill_chunk=11)

    async def one(i):
        rng = random.Random(i)
        prompt = [rng.randrange(90) for _ in range(rng.randrange(1, 40))]
        task = asyncio.create_task(engine.submit(greedy(prompt, 20)).aresult())
        if i % 3 == 0:
            await asyncio.sleep(rng.random() * 0.02)
            task.cancel()
        try:
            return (await task).token_ids == expected(prompt, 20)
        except asyncio.CancelledError:
            return i % 3 == 0

    async def main():
        return await asyncio.gather(*(one(i) for i in range(60)))

    assert all(asyncio.run(main()))
    engine.check_integrity()


def test_close_under_load(make_engine, make_runner, greedy):
    runner = make_runner(num_pages=24, max_context=96)
    engine = make_engine(runner)
    outcomes = []

    def worker(number):
        try:
            while True:
                outcomes.append(engine.submit(greedy([number] * 9)).result(timeout=60))
        except EngineClosedError:
            outcomes.append("closed")

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 30:
        threads[0].join(0.001)
    engine.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert outcomes.count("closed") == 8
    engine.check_integrity()


def test_every_request_ends_under_the_tightest_budgets(make_engine, make_runner, greedy, expected):
    """Nothing starves and nothing livelocks when a handful of pages is all there is."""
    for pages, page_size, batch, chunk in ((6, 1, 8, 1), (3, 2, 8, 3), (2, 4, 2, 64), (7, 3, 5, 2)):
        capacity = pages * page_size
        engine = make_engine(
            make_runner(num_pages=pages, page_size=page_size, max_context=96), max_batch=batch, prefill_chunk=chunk
        )
        rng = random.Random(pages)
        handles = []
        for _ in range(30):
            length = rng.randrange(1, capacity)
            prompt = [rng.randrange(2) for _ in range(length)]
            count = rng.randrange(1, capacity - length + 1)
            handles.append((prompt, count, engine.submit(greedy(prompt, count))))
        for prompt, count, handle in handles:
            assert handle.result(timeout=60).token_ids == expected(prompt, count)
        engine.check_integrity()


def test_closing_returns_the_memory(make_runner):
    """A runner's arrays, and what an exception's traceback holds of them, are gone after close()."""
    from cai_runtime.engine.engine import Engine

    class Tokenizer:
        def decode(self, token_ids, skip_special_tokens=True):
            return "x" * len(token_ids)

    megabytes = 8

    def heavy_runner():
        runner = make_runner()
        runner.weights = bytearray(megabytes << 20)
        runner.fail_on = 95
        return runner

    def use():
        with Engine(heavy_runner(), Tokenizer(), eos_token_ids=[96]) as engine:
            handles = [engine.submit(Request([i, 2, 3], SamplingParams(max_tokens=9))) for i in range(20)]
            with pytest.raises(RunnerError) as caught:
                engine.submit(Request([95])).result()
        return engine, handles, caught  # all of which somebody may keep

    use()
    gc.collect()
    tracemalloc.start()
    kept = [use() for _ in range(3)]
    gc.collect()
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak > megabytes << 20 > 2 * current
    assert len(kept) == 3


END_OF_SCRIPT = {
    "idle": "engine.submit(request).result()",
    "busy": "handle = engine.submit(request); next(iter(handle))",
    "raising": "handle = engine.submit(request); raise SystemExit(0)",
    "many": "keep = [(e := make(), e.submit(request)) for _ in range(4)]",
    "forked": """
import os, warnings
warnings.simplefilter("ignore")  # newer Pythons warn about forking with threads
child = os.fork()
if not child:
    try:
        engine.submit(request)
    except EngineClosedError:
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
""",
    "in a native call": "handle = engine.submit(request); runner.busy.wait()",
}


@pytest.mark.parametrize("ending", END_OF_SCRIPT)
def test_a_process_ends_without_closing_the_engine(ending):
    if ending == "forked" and not hasattr(os, "fork"):
        pytest.skip("no fork on this platform")
    script = """
        import os, threading, time
        import numpy as np
        from cai_runtime.engine.engine import Engine
        from cai_runtime.engine.request import Request, SamplingParams
        from cai_runtime.errors import EngineClosedError

        class Runner:
            page_size, num_pages, vocab_size, max_context = 4, 4096, 8, 16_000
            busy = threading.Event()
            def run(self, step):
                self.busy.set()
                np.ones((300, 300)) @ np.ones((300, 300))  # without the GIL
                return np.eye(8, dtype=np.float32)[[s.token_ids[-1] for s in step if s.wanted]]
            def close(self):
                os.write(1, b"closed\\n")  # at once: several engines close at the same time

        class Tokenizer:
            def decode(self, token_ids, skip_special_tokens=True):
                return "x" * len(token_ids)

        runner = Runner()
        def make():
            return Engine(runner, Tokenizer(), eos_token_ids=[])
        engine = make()
        request = Request([1], SamplingParams(max_tokens=COUNT, temperature=0.0))
    """
    count = "5" if ending == "idle" else "15_000"
    code = textwrap.dedent(script).replace("COUNT", count) + END_OF_SCRIPT[ending]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["closed"] * (5 if ending == "many" else 1)
