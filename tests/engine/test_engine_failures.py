"""Runners that fail, and what the engine remembers of it, says of it, and never shares because of it."""

import logging
import math

import numpy as np
import pytest

from cai_runtime.engine.pacing import RETRY_STEPS
from cai_runtime.errors import EngineClosedError, NonFiniteLogitsError, RunnerError


def out_of_memory_above(runner, *, sequences=10**9, tokens=10**9):
    """Have a runner fail on steps of more, and count the failures."""
    run, failures = runner.run, []

    def limited(step):
        if len(step) > sequences or max(len(s.token_ids) for s in step) > tokens:
            failures.append([len(s.token_ids) for s in step])
            raise MemoryError("out of memory")
        return run(step)

    runner.run = limited
    return failures


def test_the_size_that_the_memory_takes_is_remembered(make_engine, make_runner, greedy, expected, prompts, caplog):
    runner = make_runner(num_pages=1024)
    failures = out_of_memory_above(runner, sequences=5)
    engine = make_engine(runner, max_batch=16)
    with caplog.at_level(logging.WARNING, logger="cai_runtime.engine"):
        handles = engine.submit_all([greedy(prompt, 100, ignore_eos=True) for prompt in prompts[:16]])
        for handle, prompt in zip(handles, prompts, strict=False):
            assert handle.result().token_ids[:1] == expected(prompt, 1)
    stats = engine.stats()
    assert stats.finished == 16 and stats.failed == 0
    assert stats.retries == len(failures) <= 5, "100 steps, but not 100 failures"
    assert "out of memory" in caplog.text and "16 sequences" in caplog.text


def test_a_larger_batch_is_tried_again(make_engine, make_runner, greedy):
    runner = make_runner(num_pages=2048, max_context=1024)
    run, calls = runner.run, []

    def transient(step):
        calls.append(len(step))
        if len(calls) == 1:
            raise MemoryError
        return run(step)

    runner.run = transient
    engine = make_engine(runner, max_batch=4, prefix_cache=False)
    for handle in engine.submit_all([greedy([i], RETRY_STEPS + 20, ignore_eos=True) for i in range(4)]):
        handle.result()
    assert calls[:5] == [4, 2, 2, 2, 2] and calls[-1] == 4
    assert calls.count(2) == 2 * (RETRY_STEPS + 1)


def test_a_prompt_that_the_memory_does_not_take_goes_in_parts(make_engine, make_runner, greedy, expected):
    runner = make_runner()
    failures = out_of_memory_above(runner, tokens=10)
    engine = make_engine(runner)
    prompt = list(range(60))
    assert engine.submit(greedy(prompt)).result().token_ids == expected(prompt, 20)
    assert failures[:2] == [[32], [16]], "halves until they fit"
    engine.submit(greedy(list(range(30, 90)))).result()
    assert engine.stats().retries == len(failures) and engine.stats().failed == 0


def test_a_prompt_that_is_too_long_does_not_shrink_the_batch(make_engine, make_runner, greedy, expected):
    runner = make_runner(num_pages=512)
    out_of_memory_above(runner, tokens=10)
    engine = make_engine(runner, prefill_time=None, max_batch=8)
    prompts = [[i] for i in range(7)] + [list(range(50))]
    handles = engine.submit_all([greedy(prompt, 30, ignore_eos=True) for prompt in prompts])
    for handle, prompt in zip(handles, prompts, strict=True):
        assert handle.result().token_ids[:1] == expected(prompt, 1)
    assert [1] * 8 in runner.steps
    assert engine.stats().failed == 0 and max(max(step) for step in runner.steps) == 7


def test_one_guilty_request_costs_few_tries(make_engine, make_runner, greedy):
    runner = make_runner(num_pages=512)
    runner.fail_on = 95
    engine = make_engine(runner, max_batch=32, prefill_time=None)
    handles = engine.submit_all([greedy([i, 95 if i == 20 else 1], 1) for i in range(32)])
    for i, handle in enumerate(handles):
        if i == 20:
            with pytest.raises(RunnerError, match="poison"):
                handle.result()
        else:
            handle.result()
    assert engine.stats().retries == 5, "halves: log2(32)"
    for handle in engine.submit_all([greedy([i, 2], 2) for i in range(32)]):
        handle.result()
    assert runner.steps.count([2] * 32) == 2, "its size was not to blame, so nothing is remembered"


@pytest.mark.parametrize(
    "text",
    ["CUDA error: an illegal memory access was encountered", "Triton Error [CUDA]: device-side assert triggered"],
)
def test_a_lost_device_ends_the_engine(make_engine, make_runner, greedy, text):
    runner = make_runner()

    def lost(step):
        raise RuntimeError(text)

    runner.run = lost
    engine = make_engine(runner)
    for handle in engine.submit_all([greedy([1]), greedy([2])]):
        with pytest.raises(EngineClosedError, match="open the model in a new process"):
            handle.result(timeout=30)
    assert not engine.alive


def test_pages_before_logits_that_are_not_finite_are_not_shared(make_engine, make_runner, greedy, expected):
    """A fault that passes leaves wrong keys and values in the pages: nobody may start from them."""
    runner = make_runner()
    run = runner.run

    def broken(step):
        logits = run(step)
        runner.slots[:] += np.uint64(1)  # what the cache holds is wrong
        logits[:] = np.nan
        return logits

    prompt = list(range(41))
    runner.run = broken
    engine = make_engine(runner, prefill_chunk=16)
    with pytest.raises(NonFiniteLogitsError):
        engine.submit(greedy(prompt)).result()
    runner.run = run
    done = engine.submit(greedy(prompt)).result()
    assert (done.token_ids, done.cached_tokens) == (expected(prompt, 20), 0)


def test_a_cache_that_cuts_the_context_is_said_once(make_engine, make_runner, caplog):
    runner = make_runner(num_pages=45, page_size=16, max_context=8192)
    runner.page_bytes = 1 << 20
    with caplog.at_level(logging.WARNING, logger="cai_runtime.engine"):
        engine = make_engine(runner)
    assert len(caplog.records) == 1
    assert caplog.messages[0] == engine.context_limit == (
        "the KV cache of 45MiB holds 720 positions (the model could take 8192): raise kv_cache, to 512MiB for all of them"
    )  # fmt: skip
    assert (engine.max_context, engine.model_context) == (720, 8192)


def test_what_limits_a_request_is_named(make_engine, make_runner):
    runner = make_runner(num_pages=64, page_size=4, max_context=256)
    assert make_engine(runner).context_limit == "the model's context holds 256 positions"
    runner = make_runner(num_pages=64, page_size=4, max_context=100)
    runner.model_context = 256
    engine = make_engine(runner)
    assert (engine.max_context, engine.model_context) == (100, 256)
    assert engine.context_limit == "max_context is 100 (the model could take 256): raise max_context"


def test_no_warning_of_numpy_reaches_the_caller(make_engine, make_runner, greedy, recwarn):
    engine = make_engine(make_runner())
    extreme = {"repetition_penalty": 1e-6, "logit_bias": {3: 1e30}, "frequency_penalty": -1e6}
    engine.submit(greedy([1, 2], **extreme)).result()
    with pytest.raises(NonFiniteLogitsError):
        engine.submit(greedy([1, 2], logit_bias=dict.fromkeys(range(engine.vocab_size), -math.inf))).result()
    assert not list(recwarn)


def test_preemptions_and_the_end_are_logged(make_engine, make_runner, greedy, prompts, caplog):
    engine = make_engine(make_runner(num_pages=20), prefill_chunk=9)
    with caplog.at_level(logging.INFO, logger="cai_runtime.engine"):
        for handle in [engine.submit(greedy(prompt)) for prompt in prompts]:
            handle.result()
        engine.close()
    assert caplog.text.count("is preempted") == engine.stats().preemptions > 0
    assert f"{len(prompts)} requests finished" in caplog.messages[-1]
