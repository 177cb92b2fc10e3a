"""Requests with beam search that are aborted, fail, or are refused: each alone, once, and nothing stays behind."""

import random
import threading

import numpy as np
import pytest

from cai_runtime.engine.beam_search import BeamSearch
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.errors import (
    CaiError,
    EngineError,
    InvalidRequestError,
    NonFiniteLogitsError,
    RequestAbortedError,
    RequestTooLargeError,
    RunnerError,
)
from tests.engine.test_beam_search import BEAMS, COMBINATIONS, EOS, few, make_beam, results  # noqa: F401 - a fixture


def test_an_abort_frees_everything_at_once(make_engine, make_runner, make_beam, greedy):  # noqa: F811
    runner = make_runner()
    runner.gate = threading.Semaphore(6)
    engine = make_engine(runner, max_batch=5)
    request, wanted = make_beam([1, 2, 3], BeamSearch(5), 40, logit_bias={EOS: -100.0})
    handle, waiting = engine.submit(request), engine.submit(request)
    while len(runner.steps) < 4:
        pass
    handle.abort()
    waiting.abort()
    runner.gate.release(1000)
    for aborted in (handle, waiting):
        with pytest.raises(RequestAbortedError):
            aborted.result(timeout=60)
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used, stats.aborted) == (0, 0, 0, 2)
    assert engine.submit(request).result(timeout=60).token_ids == wanted


@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_step_that_is_too_large_goes_in_halves(make_engine, make_groups, most):
    """The runner fails after it has written everything, and on more than so many sequences."""
    for kinds in COMBINATIONS:
        requests = [
            Request([i, 2, 3], SamplingParams(max_tokens=8, temperature=0.0), rules=few, beam=beam)
            for i, beam in enumerate(BEAMS)
        ]
        alone = [make_engine(make_groups(kinds, slots=60)).submit(r).result(timeout=60) for r in requests]
        runner = make_groups(kinds, slots=60)
        runner.fail_after = most
        engine = make_engine(runner, max_batch=12)
        found = results(engine, requests)
        assert [(d.token_ids, d.logprobs) for d in found] == [(d.token_ids, d.logprobs) for d in alone]
        assert engine.stats().retries > 0
        engine.check_integrity()


@pytest.mark.parametrize(
    ("attribute", "error"), [("fail_on", RunnerError), ("nan_on", NonFiniteLogitsError)], ids=["fails", "NaN"]
)
def test_one_text_ends_its_request(make_engine, make_runner, make_beam, expected, greedy, attribute, error):  # noqa: F811
    request, wanted = make_beam([1, 2, 3], BeamSearch(4), 12, logit_bias={EOS: -100.0})
    bad = next(t for t in wanted[3:] if t not in wanted[:3])
    runner = make_runner()
    setattr(runner, attribute, bad)
    others = [p for p in ([5, 6], [9, 9, 1], [4], [8, 0]) if bad not in expected(p, 20)]
    engine = make_engine(runner, max_batch=9)
    handles = engine.submit_all([greedy(others[0]), request, greedy(others[1])])
    with pytest.raises(error):
        handles[1].result(timeout=60)
    assert handles[0].result(timeout=60).token_ids == expected(others[0], 20)
    assert handles[2].result(timeout=60).token_ids == expected(others[1], 20)
    assert (engine.stats().failed, engine.stats().finished) == (1, 2)
    engine.check_integrity()


def test_rules_that_raise_fail_their_request_alone(make_engine, make_beam, greedy, expected):  # noqa: F811
    def broken(logits, generated):
        if len(generated) == 3:
            raise KeyError("mine")

    request = Request([1], SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True), rules=broken)
    request.beam = BeamSearch(3)
    engine = make_engine()
    bad, good = engine.submit_all([request, greedy([2])])
    with pytest.raises(EngineError, match="rules failed at position 4"):
        bad.result(timeout=60)
    assert good.result(timeout=60).token_ids == expected([2], 20)


def test_rules_that_leave_nothing_are_named(make_engine):
    request = Request([1], SamplingParams(max_tokens=9, temperature=0.0), rules=lambda row, _: row.fill(-np.inf))
    request.beam = BeamSearch(3)
    with pytest.raises(NonFiniteLogitsError, match="every token is banned"):
        make_engine().submit(request).result(timeout=60)


@pytest.mark.parametrize(
    ("beam", "change", "message"),
    [
        (5, {}, "beam is 5"),
        (BeamSearch(0), {}, "beam.width is 0"),
        (BeamSearch(True), {}, "beam.width is True"),
        (BeamSearch(2.0), {}, "beam.width is 2.0"),
        (BeamSearch(64), {}, "from 1 to 63"),
        (BeamSearch(7), {}, "max_batch is 6"),
        (BeamSearch(2, 0.0), {}, "patience is 0.0"),
        (BeamSearch(2, float("nan")), {}, "patience is nan"),
        (BeamSearch(2, 1.0, float("inf")), {}, "length_penalty is inf"),
        (BeamSearch(2), {"temperature": 0.2}, "temperature is 0.2"),
        (BeamSearch(2), {"max_tokens": 0}, "max_tokens is 0"),
        (BeamSearch(2), {"prompt_logprobs": 1}, "prompt_logprobs"),
        (BeamSearch(2), {"stop": ("ab",)}, "stop string such as 'ab'"),
    ],
    ids=str,
)
def test_refusals(make_engine, beam, change, message):
    request = Request([1], SamplingParams(**({"temperature": 0.0} | change)), beam=beam)
    with pytest.raises(InvalidRequestError, match=message):
        make_engine(max_batch=6).submit(request)


def test_a_mask_is_refused(make_engine, hash_mask):
    request = Request([1], SamplingParams(temperature=0.0), beam=BeamSearch(2), mask=hash_mask)
    with pytest.raises(InvalidRequestError, match="mask"):
        make_engine().submit(request)


def test_what_can_never_fit_is_refused(make_engine, make_runner):
    engine = make_engine(make_runner(num_pages=20))
    sampling = SamplingParams(max_tokens=40, temperature=0.0)
    with pytest.raises(RequestTooLargeError, match="width 4 over 5 prompt tokens and max_tokens 40"):
        engine.submit(Request([1] * 5, sampling, beam=BeamSearch(4)))
    assert engine.submit(Request([1] * 5, sampling, beam=BeamSearch(1))).result(timeout=60).token_ids


def test_a_runner_that_copies_no_pages_is_named(make_engine, make_runner):
    class Simple:
        def __init__(self, runner):
            self.runner = runner
            self.page_size, self.num_pages = runner.page_size, runner.num_pages
            self.vocab_size, self.max_context = runner.vocab_size, runner.max_context
            self.run, self.close = runner.run, runner.close

    with pytest.raises(InvalidRequestError, match="copies of cache pages"):
        make_engine(Simple(make_runner())).submit(Request([1], SamplingParams(temperature=0.0), beam=BeamSearch(2)))


@pytest.mark.parametrize("seed", range(3))
def test_stress(make_engine, make_groups, greedy, seed):
    """Threads with searches, plain requests, aborts and poison over a small cache; the books are checked all the time."""
    kinds = COMBINATIONS[2 * seed]
    runner = make_groups(kinds, num_pages=(19, 44, 19)[seed], slots=15)
    runner.fail_on = 95
    engine = make_engine(runner, max_batch=7, prefill_chunk=11)
    rng = random.Random(seed)
    pool = [[rng.randrange(90) for _ in range(rng.randrange(1, 20))] for _ in range(6)]
    requests = [
        Request(p, SamplingParams(max_tokens=8, temperature=0.0), rules=few, beam=BEAMS[i]) for i, p in enumerate(pool)
    ]
    roomy = make_engine(make_groups(kinds, num_pages=200, slots=60), max_batch=5)
    wanted = [roomy.submit(request).result(timeout=60).token_ids for request in requests]
    wrong = []

    def worker(number):
        rng = random.Random(100 * seed + number)
        for _ in range(12):
            i, kind = rng.randrange(6), rng.choice(["search", "search", "plain", "abort", "poison"])
            try:
                if kind == "plain":
                    text = runner.defined(pool[i], 9)
                    good = 95 in text or engine.submit(greedy(pool[i], 9)).result(timeout=60).token_ids == text
                elif kind == "abort":
                    engine.submit(requests[i]).abort()
                    continue
                elif kind == "poison":
                    bad = Request([*pool[i], 95], requests[i].sampling, beam=BEAMS[i])
                    engine.submit(bad).result(timeout=60)
                    good = False
                else:
                    good = engine.submit(requests[i]).result(timeout=60).token_ids == wanted[i]
                if not good:
                    wrong.append((kind, i))
            except CaiError as error:
                if kind != "poison" or not isinstance(error, RunnerError):
                    wrong.append((kind, i, error))
            engine.check_integrity()

    threads = [threading.Thread(target=worker, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
