"""Requests with rules: the text and its logprobs follow them, however the request is computed, and they fail it alone."""

import numpy as np
import pytest

from cai_runtime.engine.output import TokenOutput
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.errors import EngineError, InvalidRequestError, RunnerError
from cai_runtime.kernels.sampling_reference import logprobs as reference_logprobs


def one_in_three(logits, generated):
    """Another third of the tokens at each place, which the tokens before determine."""
    logits[np.arange(len(logits)) % 3 != sum(generated) % 3] = -np.inf


def broken(logits, generated):
    if len(generated) == 3:
        raise KeyError("no such token")


class Drafts:
    """Proposes the undrafted texts, with a wrong token now and then."""

    def __init__(self, texts):
        self.texts = texts

    def propose(self, sequence):
        at, text = sequence.num_generated, self.texts[tuple(sequence.request.prompt_ids)]
        return [(token + (at % 3 == 1)) % 96 for token in text[at : at + 3]]


@pytest.fixture
def requests(prompts):
    params = [{"temperature": 0.0}, {"temperature": 0.0, "logprobs": 2}, {"temperature": 0.8}]
    return [
        Request(
            prompt,
            SamplingParams(max_tokens=9, seed=i, ignore_eos=True, **params[i % 3]),
            rules=one_in_three if i % 4 else None,
        )
        for i, prompt in enumerate(prompts)
    ]


def results(engine, requests):
    return [handle.result(timeout=60) for handle in engine.submit_all(requests)]


def outcome(done):
    return done.token_ids, done.logprobs


def test_texts_and_logprobs_follow_the_rules(make_engine, requests, logits_behind):
    for request, done in zip(requests, results(make_engine(), requests), strict=True):
        if request.rules is None:
            continue
        for i, token in enumerate(done.token_ids):
            row = logits_behind([*request.prompt_ids, *done.token_ids[:i]])
            one_in_three(row, done.token_ids[:i])
            assert row[token] > -np.inf
            assert token == row.argmax() or request.sampling.temperature
            if done.logprobs is not None:
                top = np.argsort(-row, kind="stable")[:2]
                assert done.logprobs[i].logprob == pytest.approx(reference_logprobs(row)[token], abs=1e-5)
                assert [t for t, _ in done.logprobs[i].top] == top.tolist()


@pytest.mark.parametrize("pages", [512, 20], ids=["roomy", "preempted"])
@pytest.mark.parametrize("drafted", [False, True])
def test_the_same_however_they_are_computed(make_engine, make_runner, requests, pages, drafted):
    alone = [outcome(make_engine().submit(request).result(timeout=60)) for request in requests]
    texts = {tuple(r.prompt_ids): tokens for r, (tokens, _) in zip(requests, alone, strict=True)}
    engine = make_engine(make_runner(num_pages=pages), proposer=Drafts(texts) if drafted else None)
    assert list(map(outcome, results(engine, requests))) == alone
    assert engine.stats().drafts_taken > 0 or not drafted


def test_what_rules_raise_fails_their_request_alone(make_engine, greedy, expected):
    engine = make_engine()
    bad = Request([1, 2], SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True), rules=broken)
    good, handle = engine.submit_all([greedy([1, 2]), bad])
    with pytest.raises(EngineError, match="rules failed at position 5: KeyError") as caught:
        handle.result(timeout=60)
    assert not isinstance(caught.value, RunnerError) and isinstance(caught.value.__cause__, KeyError)
    assert good.result(timeout=60).token_ids == expected([1, 2], 20)


def test_tokens_alone(make_engine, expected):
    sampling = SamplingParams(max_tokens=20, temperature=0.0, logprobs=0)
    done = make_engine().submit(Request([1, 2], sampling, output=TokenOutput)).result(timeout=60)
    assert (done.token_ids, done.text, len(done.logprobs)) == (expected([1, 2], 20), "", len(done.token_ids))
    with pytest.raises(InvalidRequestError, match="stop_token_ids"):
        make_engine().submit(Request([1], SamplingParams(stop=("no",)), output=TokenOutput))
