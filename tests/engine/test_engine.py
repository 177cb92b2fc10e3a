"""The engine over a model whose every logit depends on all tokens before, read through the pages it was given."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.errors import (
    EngineClosedError,
    EngineError,
    InvalidRequestError,
    NonFiniteLogitsError,
    QueueFullError,
    RequestTooLargeError,
    RunnerError,
)


def run_all(engine, requests):
    handles = [engine.submit(request) for request in requests]
    return [handle.result(timeout=60) for handle in handles]


def test_single_request_equals_the_definition(make_engine, greedy, expected, prompts):
    engine = make_engine()
    for prompt in prompts:
        completion = engine.submit(greedy(prompt)).result()
        assert completion.token_ids == expected(prompt, 20)
        assert completion.completion_tokens == len(completion.token_ids)
        assert completion.prompt_tokens == len(prompt)
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 96 else "length")


@pytest.mark.parametrize(
    "runner, options",
    [
        ({}, {}),
        ({}, {"prefill_chunk": 1}),
        ({}, {"prefill_chunk": 7}),
        ({}, {"max_batch": 1}),
        ({}, {"max_batch": 3, "prefill_chunk": 5}),
        ({"page_size": 1, "num_pages": 200}, {"prefill_chunk": 3}),
        ({"page_size": 16, "num_pages": 512}, {}),
        ({"num_pages": 20}, {"prefill_chunk": 9}),  # 80 positions for 24 sequences of up to 80
        ({"num_pages": 20}, {"prefill_chunk": 9, "prefix_cache": False}),
        ({"num_pages": 512}, {"prefix_cache": False}),
    ],
    ids=str,
)
def test_batching_chunking_paging_and_preemption_change_nothing(
    make_engine, make_runner, greedy, expected, prompts, runner, options
):
    engine = make_engine(make_runner(**runner), **options)
    completions = run_all(engine, [greedy(prompt) for prompt in prompts])
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.token_ids == expected(prompt, 20)
    if runner.get("num_pages") == 20:
        assert engine.stats().preemptions > 0, "the budget was meant to be too small"


def test_seeded_sampling_is_the_same_alone_batched_chunked_and_preempted(make_engine, make_runner, prompts):
    requests = [
        Request(p, SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, presence_penalty=0.3, seed=i))
        for i, p in enumerate(prompts)
    ]
    alone = make_engine()
    singles = [alone.submit(request).result().text for request in requests]
    for pages, options in ((512, {}), (20, {"prefill_chunk": 5}), (20, {"prefix_cache": False})):
        engine = make_engine(make_runner(num_pages=pages), **options)
        assert [c.text for c in run_all(engine, requests)] == singles
        assert pages == 512 or engine.stats().preemptions > 0


def test_unseeded_requests_differ(make_engine):
    engine = make_engine()
    request = Request([1, 2, 3], SamplingParams(max_tokens=12, temperature=1.0))
    assert len({c.token_ids for c in run_all(engine, [request] * 8)}) > 1


def test_prefix_is_reused_and_changes_nothing(make_engine, make_runner, greedy, expected):
    engine = make_engine(make_runner(num_pages=256))
    system = list(range(50))
    first = engine.submit(greedy([*system, 60])).result()
    assert first.cached_tokens == 0
    handle = engine.submit(greedy([*system, 61]))
    second = handle.result()
    assert second.cached_tokens == handle.cached_tokens == 48, "12 full pages of 4"
    assert second.token_ids == expected([*system, 61], 20)
    follow_up = [*system, 60, *first.token_ids, 5]
    third = engine.submit(greedy(follow_up)).result()
    assert third.cached_tokens >= 64, "generated tokens are reused as well"
    assert third.token_ids == expected(follow_up, 20)
    assert engine.stats().prefix_hit_tokens == second.cached_tokens + third.cached_tokens


def test_a_wholly_cached_prompt_still_computes_its_last_token(make_engine, greedy, expected):
    engine = make_engine()
    prompt = list(range(16))
    engine.submit(greedy(prompt)).result()
    again = engine.submit(greedy(prompt)).result()
    assert again.cached_tokens == 12
    assert again.token_ids == expected(prompt, 20)


def test_equal_prompts_that_arrive_together_are_computed_once(make_engine, make_runner, greedy, expected):
    runner = make_runner(num_pages=256)
    runner.gate = threading.Semaphore(0)
    engine = make_engine(runner, prefill_chunk=64)
    prompt = list(range(41))
    first = engine.submit(greedy([80], 1))
    assert runner.entered.wait(30)  # the owner thread is held in its first step, so that the others arrive together
    handles = [engine.submit(greedy(prompt, 5)) for _ in range(6)]
    runner.gate.release(10_000)
    assert {handle.result().token_ids for handle in handles} == {expected(prompt, 5)}
    first.result()
    assert engine.stats().tokens_prefilled == 1 + 41 + 5 * 1


def test_waiting_for_a_prefix_holds_nobody_else_up(make_engine, make_runner, greedy):
    runner = make_runner(num_pages=256)
    runner.gate = threading.Semaphore(0)
    engine = make_engine(runner, prefill_chunk=64)
    first = engine.submit(greedy([80], 4))
    assert runner.entered.wait(30)  # the owner thread is held in its first step, so that the others arrive together
    same = [engine.submit(greedy(range(40), 4)) for _ in range(2)]
    other = engine.submit(greedy(range(50, 70), 4))
    runner.gate.release(10_000)
    for handle in (first, *same, other):
        handle.result()
    assert [1, 40, 20] in runner.steps, "the other prompt shares the first step with the first of the equal ones"


def test_steps_keep_their_budgets(make_engine, make_runner, greedy, prompts):
    runner = make_runner(num_pages=512)
    engine = make_engine(runner, max_batch=5, prefill_chunk=10)
    run_all(engine, [greedy(prompt) for prompt in prompts])
    assert max(len(step) for step in runner.steps) == 5
    assert max(sum(n for n in step if n > 1) for step in runner.steps) == 10
    assert threading.get_ident() not in runner.threads and len(runner.threads) == 2, "the engine's and the runner's"


def test_decodes_go_along_with_a_long_prefill(make_engine, make_runner, greedy):
    runner = make_runner(num_pages=256)
    engine = make_engine(runner, prefill_chunk=8)
    runner.gate = threading.Semaphore(0)
    short = engine.submit(greedy([1, 2], 30, ignore_eos=True))
    long = engine.submit(greedy([i % 90 for i in range(100)], 2))
    runner.gate.release(10_000)
    short.result(), long.result()
    assert sum(step[0] == 1 and step[-1] == 8 for step in runner.steps) > 8


def test_first_come_first_served_under_pressure(make_engine, make_runner, greedy):
    """With room for one at a time, requests finish in the order of arrival."""
    runner = make_runner(num_pages=8)
    runner.gate = threading.Semaphore(0)
    engine = make_engine(runner)
    finished = []
    handles = [engine.submit(greedy([i, *range(10)], 20, ignore_eos=True)) for i in range(6)]

    def wait(i):
        handles[i].result()
        finished.append((engine.stats().steps, i))

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            runner.gate.release()
            thread.join(0.001)
    assert [i for _, i in sorted(finished)] == list(range(6))


def test_end_of_sequence_and_stop_tokens(make_engine, greedy, expected):
    engine = make_engine()
    tokens = expected([3, 1], 20)
    stop = next(t for i, t in enumerate(tokens) if i >= 4 and t not in tokens[:i])
    at = tokens.index(stop)
    completion = engine.submit(greedy([3, 1], stop_token_ids=(stop,))).result()
    assert completion.token_ids == tokens[: at + 1] and completion.finish_reason == "stop"
    assert len(completion.text) == at, "the stop token has no text"
    later = engine.submit(greedy([3, 1], stop_token_ids=(stop,), min_tokens=at + 3)).result()
    assert len(later.token_ids) >= at + 3 and stop not in later.token_ids[: at + 2]


def test_ignore_eos(make_engine, greedy, expected, prompts):
    engine = make_engine()
    prompt = next(p for p in ([i, j] for i in range(90) for j in range(5)) if 96 in expected(p, 40))
    normal = engine.submit(greedy(prompt, 40)).result()
    assert normal.token_ids[-1] == 96 and normal.finish_reason == "stop"
    ignored = engine.submit(greedy(prompt, 60, ignore_eos=True)).result()
    assert len(ignored.token_ids) == 60 and ignored.finish_reason == "length"
    assert ignored.token_ids[: len(normal.token_ids)] == normal.token_ids


def test_stop_string_ends_the_text_and_never_leaks(make_engine, greedy, expected):
    engine = make_engine()
    whole = engine.submit(greedy([8, 9], ignore_eos=True)).result().text
    stop = whole[6:9]
    handle = engine.submit(greedy([8, 9], stop=("zzz", stop), ignore_eos=True))
    deltas = list(handle)
    text = "".join(delta.text for delta in deltas)
    assert text == whole[: whole.index(stop)]
    assert deltas[-1].finish_reason == "stop" and deltas[-1].stop_string == stop
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    completion = handle.result()
    assert completion.text == text and completion.stop_string == stop
    assert completion.completion_tokens == whole.index(stop) + 3
    almost = whole[6:8] + "z"
    assert engine.submit(greedy([8, 9], stop=(almost,), ignore_eos=True)).result().text == whole


def test_stop_strings_wait_for_min_tokens(make_engine, greedy):
    engine = make_engine()
    whole = engine.submit(greedy([8, 9], ignore_eos=True)).result().text
    completion = engine.submit(greedy([8, 9], stop=(whole[2], whole[10]), min_tokens=9, ignore_eos=True)).result()
    assert completion.text == whole[: whole.index(whole[10], 8)]


@pytest.mark.parametrize(
    "request_, error",
    [
        (Request([]), InvalidRequestError),
        (Request([1, 97]), InvalidRequestError),
        (Request([-1]), InvalidRequestError),
        (Request(["a"]), InvalidRequestError),  # type: ignore[list-item]
        (Request([1], SamplingParams(max_tokens=-1)), InvalidRequestError),
        (Request([1], SamplingParams(logit_bias={500: 1.0})), InvalidRequestError),
        (Request([1] * 250, SamplingParams(max_tokens=7)), RequestTooLargeError),
    ],
    ids=str,
)
def test_bad_requests_are_refused_at_submit(make_engine, request_, error):
    with pytest.raises(error):
        make_engine().submit(request_)


def test_the_largest_request_fits_exactly(make_engine, make_runner, greedy, expected):
    engine = make_engine(make_runner(num_pages=10))
    assert engine.max_context == 40
    prompt = list(range(30))
    assert engine.submit(greedy(prompt, 10)).result().token_ids == expected(prompt, 10)
    with pytest.raises(RequestTooLargeError, match="41 positions, but the KV cache of 10 pages holds 40"):
        engine.submit(greedy(prompt, 11))


@pytest.mark.parametrize("max_waiting", [0, 1, 4])
def test_max_waiting_is_what_waits_beyond_the_seats(make_engine, make_runner, greedy, max_waiting):
    runner = make_runner()
    runner.gate = threading.Semaphore(0)
    engine = make_engine(runner, max_batch=3, max_waiting=max_waiting)
    handles = [engine.submit(greedy([i])) for i in range(3 + max_waiting)]
    with pytest.raises(QueueFullError, match="raise max_waiting"):
        engine.submit(greedy([4]))
    handles[0].abort()
    runner.gate.release(10_000)
    for handle in handles[1:]:
        handle.result()
    for i in range(5):  # aborted and finished requests have given their places back
        engine.submit_all([greedy([i])] * (3 + max_waiting))[-1].result()


def test_several_requests_are_queued_all_or_none(make_engine, make_runner, greedy, expected):
    runner = make_runner()
    engine = make_engine(runner, max_batch=4, max_waiting=1)
    for _ in range(20):
        handles = engine.submit_all([greedy([1, 2, 3], 3)] * 5)
        assert {handle.result().token_ids for handle in handles} == {expected([1, 2, 3], 3)}
    runner.gate = threading.Semaphore(0)
    one = engine.submit(greedy([1], 3))
    with pytest.raises(QueueFullError):
        engine.submit_all([greedy([2])] * 5)
    others = engine.submit_all([greedy([2], 3)] * 4)
    runner.gate.release(10_000)
    for handle in (one, *others):
        handle.result()
    with pytest.raises(InvalidRequestError, match="6 sequences at once never fit"):
        engine.submit_all([greedy([2])] * 6)
    with pytest.raises(InvalidRequestError):
        engine.submit_all([greedy([2]), greedy([])])
    assert engine.submit_all([]) == []
    assert engine.stats().finished == 20 * 5 + 5, "none of the refused ones ran"


def test_a_failing_model_fails_the_guilty_request_alone(make_engine, make_runner, greedy, expected, prompts):
    runner = make_runner(num_pages=512)
    runner.fail_on = 95
    runner.gate = threading.Semaphore(0)
    engine = make_engine(runner)
    good = [engine.submit(greedy(p)) for p in prompts[:4]]
    bad = engine.submit(greedy([1, 2, 95, 3]))
    good += [engine.submit(greedy(p)) for p in prompts[4:8]]
    runner.gate.release(10_000)
    with pytest.raises(RunnerError, match="poison") as caught:
        bad.result()
    assert isinstance(caught.value.__cause__, RuntimeError)
    for handle, prompt in zip(good, prompts, strict=False):
        want = expected(prompt, 20)
        if 95 in want[:-1]:  # it generates the poison, and fails when it is fed
            with pytest.raises(RunnerError):
                handle.result()
        else:
            assert handle.result().token_ids == want
    engine.check_integrity()
    assert engine.stats().failed >= 1 and engine.stats().pages_used == 0


def test_half_written_pages_of_a_failed_step_are_never_reused(make_engine, make_runner, greedy, expected):
    runner = make_runner()
    runner.fail_on = 95
    engine = make_engine(runner)
    prompt = [*range(20), 95]
    with pytest.raises(RunnerError):
        engine.submit(greedy(prompt)).result()
    runner.fail_on = None
    assert engine.submit(greedy(prompt)).result().token_ids == expected(prompt, 20)


def test_nan_logits_fail_the_request_alone(make_engine, make_runner, greedy, expected):
    runner = make_runner()
    runner.nan_on = 94
    engine = make_engine(runner)
    tokens = expected([1, 2], 20)
    handles = [engine.submit(greedy([1, 2])), engine.submit(greedy([5, 94]))]
    with pytest.raises(NonFiniteLogitsError):
        handles[1].result()
    if 94 not in tokens[:-1]:
        assert handles[0].result().token_ids == tokens


@pytest.mark.parametrize("answer", [np.zeros((1, 5), np.float32), np.zeros((3, 97), np.float32), None, "logits"])
def test_a_runner_that_returns_rubbish_does_not_hang_the_caller(make_engine, make_runner, greedy, answer):
    runner = make_runner()
    engine = make_engine(runner)
    runner.run = lambda step: answer
    with pytest.raises(RunnerError):
        engine.submit(greedy([1])).result(timeout=30)
    del runner.run
    engine.submit(greedy([1])).result(timeout=30)


def test_a_tokenizer_that_breaks_fails_the_request_alone(make_engine, greedy, expected):
    engine = make_engine()

    def decode(token_ids, skip_special_tokens=True):
        raise ValueError("no such token")

    good_decode, engine.tokenizer.decode = engine.tokenizer.decode, decode
    with pytest.raises(EngineError, match="no such token"):
        engine.submit(greedy([1])).result(timeout=30)
    engine.tokenizer.decode = good_decode
    assert engine.submit(greedy([1])).result().token_ids == expected([1], 20)


def test_parameters_that_nobody_validated_fail_the_request_alone(make_engine, expected, greedy):
    engine = make_engine()
    bad = Request([1], SamplingParams(max_tokens=4, temperature="hot"))  # type: ignore[arg-type]
    with pytest.raises(EngineError):
        engine.submit(bad).result(timeout=30)
    assert engine.submit(greedy([1])).result().token_ids == expected([1], 20)


def test_the_request_is_copied(make_engine, make_runner, greedy, expected):
    runner = make_runner()
    runner.gate = threading.Semaphore(0)
    engine = make_engine(runner)
    request = greedy([1, 2, 3])
    handle = engine.submit(request)
    request.prompt_ids.clear()
    runner.gate.release(10_000)
    assert handle.result().token_ids == expected([1, 2, 3], 20)
    assert handle.request_id and request.request_id is None
    assert engine.submit(replace(request, prompt_ids=[1], request_id="mine")).request_id == "mine"


def test_stats_add_up(make_engine, make_runner, greedy, prompts):
    engine = make_engine(make_runner(num_pages=512), prefix_cache=False)
    completions = run_all(engine, [greedy(prompt) for prompt in prompts])
    stats = engine.stats()
    assert stats.finished == len(prompts) and stats.failed == stats.aborted == stats.preemptions == 0
    assert stats.tokens_decoded == sum(c.completion_tokens for c in completions)
    assert stats.prompt_tokens == stats.tokens_prefilled == sum(map(len, prompts))
    assert (stats.running, stats.waiting, stats.pages_used, stats.pages_free) == (0, 0, 0, 512)


def test_close_wakes_everyone_and_closes_the_runner_once(make_engine, make_runner, greedy):
    runner = make_runner()
    runner.gate = threading.Semaphore(0)
    engine = make_engine(runner, max_batch=2)
    handles = [engine.submit(greedy([i])) for i in range(5)]
    outcomes = []

    def wait(handle):
        try:
            handle.result()
        except EngineClosedError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=wait, args=(handle,)) for handle in handles]
    for thread in threads:
        thread.start()
    assert runner.entered.wait(30)
    sent = engine._loop.inbox.queue.qsize()  # the owner thread is held in its first step
    closers = [threading.Thread(target=engine.close) for _ in range(3)]
    for thread in closers:
        thread.start()
    while engine._loop.inbox.queue.qsize() < sent + 3:
        closers[0].join(0.001)
    runner.gate.release(10_000)
    for thread in threads + closers:
        thread.join(30)
        assert not thread.is_alive()
    assert len(outcomes) == 5 and runner.closed == 1
    assert threading.get_ident() not in runner.threads
    with pytest.raises(EngineClosedError):
        engine.submit(greedy([1]))
    engine.close()
    assert runner.closed == 1


def test_close_raises_what_the_runner_raises_once(make_engine, make_runner):
    runner = make_runner()

    def close():
        raise RuntimeError("device lost")

    runner.close = close
    engine = make_engine(runner)
    with pytest.raises(RuntimeError, match="device lost"):
        engine.close()
    engine.close()


def test_an_internal_error_ends_the_engine_without_hanging_anyone(make_engine, make_runner, greedy):
    engine = make_engine()

    assert engine.alive

    def schedule(budget):
        raise ZeroDivisionError("a bug")

    engine._loop.scheduler.schedule = schedule
    with pytest.raises(EngineClosedError, match="a bug") as caught:
        engine.submit(greedy([1])).result(timeout=30)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    engine._thread.join(30)
    assert not engine.alive
    with pytest.raises(EngineClosedError, match="a bug"):
        engine.submit(greedy([1]))


@pytest.mark.parametrize(
    "options",
    [{"max_batch": 0}, {"prefill_chunk": 0}, {"prefill_time": 0}, {"prefill_time": -1.0}, {"max_waiting": -1}],
)
def test_impossible_options_are_refused(make_engine, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_engine(**options)


def test_choices_of_one_prompt_hash_its_pages_once(make_engine, make_runner, greedy, monkeypatch):
    from cai_runtime.engine import cache

    hashed = []
    extend = cache.extend_digests

    def counting(digests, token_ids, **more):
        before = len(digests)
        extend(digests, token_ids, **more)
        hashed.extend(digests[before:])

    monkeypatch.setattr(cache, "extend_digests", counting)
    engine = make_engine(make_runner(num_pages=512), max_batch=16)
    prompt = list(range(41))
    for handle in engine.submit_all([Request(prompt, SamplingParams(max_tokens=1, temperature=0.0)) for _ in range(8)]):
        handle.result()
    assert len(hashed) == len(set(hashed)) == 10, "41 tokens fill ten pages of 4"
