"""Logprobs of generated and of prompt tokens: of the raw distribution, the same alone, in a batch, however computed."""

import numpy as np
import pytest

from cai_runtime.engine.request import Request, SamplingParams, TokenLogprobs
from cai_runtime.engine.scheduler import SCORED_ROWS
from cai_runtime.engine.segments import GivenRows
from cai_runtime.errors import InvalidRequestError, NonFiniteLogitsError, RunnerError
from cai_runtime.kernels.sampling_reference import logprobs as reference_logprobs

VOCAB, EOS = 97, 96  # of the fake model

SAMPLINGS = [
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 0.7, "top_k": 5, "logprobs": 0, "prompt_logprobs": 0},
    {
        "temperature": 1.3, "repetition_penalty": 1.5, "presence_penalty": 1.0, "logit_bias": {5: 9.0, EOS: -100.0},
        "min_tokens": 4, "logprobs": 20,
    },
    {"temperature": 1.0, "prompt_logprobs": 127},
    {"temperature": 0.0},
]  # fmt: skip


@pytest.fixture
def requests(prompts):
    return [
        Request(prompt, SamplingParams(max_tokens=i % 7 + 6, seed=i, **SAMPLINGS[i % len(SAMPLINGS)]))
        for i, prompt in enumerate(prompts)
    ]


def results(engine, requests):
    return [handle.result(timeout=60) for handle in engine.submit_all(requests)]


def outcome(done):
    return done.token_ids, done.logprobs, done.prompt_logprobs


def check(found, logits, token_id, k):
    values, top = reference_logprobs(logits), np.argsort(-logits, kind="stable")[:k]
    assert found.token_id == token_id
    assert found.logprob == pytest.approx(values[token_id], abs=1e-5)
    assert [token for token, _ in found.top] == top.tolist()
    assert [value for _, value in found.top] == pytest.approx(values[top].tolist(), abs=1e-5)
    assert dict(found.top).get(token_id, found.logprob) == found.logprob


def test_they_are_their_definition(make_engine, requests, logits_behind):
    engine = make_engine()
    for request, done in zip(requests, results(engine, requests), strict=True):
        text, params = request.prompt_ids + list(done.token_ids), request.sampling
        if params.logprobs is None:
            assert done.logprobs is None
        else:
            assert len(done.logprobs) == len(done.token_ids)
            for i, found in enumerate(done.logprobs, len(request.prompt_ids)):
                check(found, logits_behind(text[:i]), text[i], params.logprobs)
        if params.prompt_logprobs is None:
            assert done.prompt_logprobs is None
        else:
            first, *rest = done.prompt_logprobs
            assert first is None and len(rest) == len(request.prompt_ids) - 1
            for i, found in enumerate(rest, 1):
                check(found, logits_behind(text[:i]), text[i], min(params.prompt_logprobs, VOCAB))


@pytest.mark.parametrize(
    ("runner", "options"),
    [
        ({"num_pages": 512}, {"prefix_cache": False}),
        ({"num_pages": 512}, {"prefill_chunk": 5}),
        ({"num_pages": 20}, {"prefill_chunk": 9}),
        ({"num_pages": 25, "page_size": 3}, {}),
        ({"num_pages": 200, "page_size": 1}, {"max_batch": 3}),
    ],
    ids=["batch", "chunks", "preempted in chunks", "preempted", "tiny pages"],
)
def test_the_same_however_they_are_computed(make_engine, make_runner, requests, runner, options):
    alone = [outcome(make_engine().submit(request).result(timeout=60)) for request in requests]
    engine = make_engine(make_runner(**runner), **options)
    assert list(map(outcome, results(engine, requests))) == alone
    assert list(map(outcome, results(engine, requests))) == alone, "after what the prefix cache has of the first time"
    assert runner["num_pages"] > 25 or engine.stats().preemptions > 0


class Drafts:
    """Proposes the undrafted texts, with a wrong token now and then."""

    def __init__(self, texts):
        self.texts = texts

    def propose(self, sequence):
        at, text = sequence.num_generated, self.texts[sequence.request.sampling.seed]
        return [(token + (at % 3 == 1)) % EOS for token in text[at : at + 3]]


def test_the_same_with_drafts(make_engine, requests):
    alone = results(make_engine(), requests)
    engine = make_engine(proposer=Drafts([done.token_ids for done in alone]))
    assert list(map(outcome, results(engine, requests))) == list(map(outcome, alone))
    assert engine.stats().drafts_taken > 0


def test_deltas_have_those_of_their_tokens(make_engine, requests):
    for handle in make_engine().submit_all(requests):
        deltas, done = list(handle), handle.result()
        if done.logprobs is None:
            assert all(delta.logprobs is None for delta in deltas)
            continue
        for delta in deltas:
            assert tuple(found.token_id for found in delta.logprobs) == delta.token_ids
        assert tuple(found for delta in deltas for found in delta.logprobs) == done.logprobs


def test_tokens_behind_a_stop_string_have_none(make_engine, greedy):
    engine = make_engine()
    whole = engine.submit(greedy([1, 2], 8, logprobs=0)).result()
    stop = whole.text[3]
    cut = make_engine(proposer=Drafts({None: whole.token_ids})).submit(greedy([1, 2], 8, logprobs=0, stop=(stop,)))
    assert cut.result().token_ids == whole.token_ids[:4] and cut.result().logprobs == whole.logprobs[:4]


def test_a_prompts_logprobs_take_no_prefix_hit_and_give_one(make_engine, greedy):
    engine, prompt = make_engine(), list(range(20))
    engine.submit(greedy(prompt, 2)).result()
    scored = engine.submit(greedy(prompt, 2, prompt_logprobs=0)).result()
    assert scored.cached_tokens == 0 and len(scored.prompt_logprobs) == 20
    assert engine.submit(greedy(prompt, 2, logprobs=1)).result().cached_tokens == 16


def test_few_rows_of_logits_at_a_time(make_engine, make_runner, greedy):
    class Rows(make_runner):
        most = 0

        def run(self, step):
            self.most = max(self.most, sum(s.wanted for s in step))
            return super().run(step)

    runner = Rows(num_pages=400, max_context=600)
    engine = make_engine(runner, prefill_chunk=10_000)
    prompts = [[i] * 350 for i in range(4)]
    scored = results(engine, [greedy(prompt, 1, prompt_logprobs=0) for prompt in prompts] + [greedy([9] * 300, 1)])
    assert [len(done.prompt_logprobs) for done in scored[:4]] == [350] * 4
    assert 0 < runner.most <= SCORED_ROWS + len(scored)


def test_a_prompt_alone(make_engine, greedy, prompts):
    """max_tokens 0: the prompt is scored, nothing is generated, and it may fill the context."""
    engine = make_engine()
    for prompt in [*prompts, [7] * engine.max_context]:
        done = engine.submit(greedy(prompt, 0, prompt_logprobs=1)).result(timeout=60)
        assert (done.token_ids, done.finish_reason, done.text) == ((), "length", "")
        if len(prompt) < engine.max_context:
            assert done.prompt_logprobs == engine.submit(greedy(prompt, 1, prompt_logprobs=1)).result().prompt_logprobs
    assert engine.submit(greedy([1, 2], 0)).result().prompt_logprobs is None


def test_a_prompt_alone_says_that_the_model_is_damaged(make_engine, make_runner, greedy):
    runner = make_runner()
    runner.nan_on = 3
    engine = make_engine(runner)
    for prompt in ([1, 2, 3], [1, 3, 2]):
        for asked in ({"max_tokens": 0}, {"prompt_logprobs": 0}, {"logprobs": 0}):
            with pytest.raises(NonFiniteLogitsError, match="position"):
                engine.submit(greedy(prompt, **asked)).result(timeout=60)
    assert engine.submit(greedy([1, 2], 0, prompt_logprobs=0)).result().prompt_logprobs[0] is None


def test_a_failure_in_a_batch_is_one_requests(make_engine, make_runner, requests):
    runner = make_runner(num_pages=512)
    alone = list(map(outcome, results(make_engine(), requests)))
    runner.fail_on = 95
    engine = make_engine(runner)
    poison = Request([1, 95, 2], SamplingParams(prompt_logprobs=1))
    handles = engine.submit_all([*requests, poison])
    with pytest.raises(RunnerError):
        handles[-1].result(timeout=60)
    found = [outcome(handle.result(timeout=60)) for handle in handles[:-1]]
    assert found == alone and engine.stats().retries > 0


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [-1, 128, 1.0, True, "1"])
def test_refused_numbers(make_engine, name, value):
    with pytest.raises(InvalidRequestError, match=f"{name} is"):
        make_engine().submit(Request([1], SamplingParams(**{name: value})))


def test_prompt_logprobs_are_of_tokens_alone(make_engine, make_groups):
    engine = make_engine(make_groups(["full"]))
    request = Request(segments=([1], GivenRows(np.arange(3), b"a")), sampling=SamplingParams(prompt_logprobs=0))
    with pytest.raises(InvalidRequestError, match="prompt_logprobs"):
        engine.submit(request)


@pytest.mark.parametrize("kinds", [["full", "window"], ["state"], ["full", "state"]])
def test_models_of_several_caches(make_engine, make_groups, prompts, kinds):
    requests = [
        Request(prompt, SamplingParams(max_tokens=5, temperature=0.0, logprobs=1, prompt_logprobs=1))
        for prompt in prompts
    ]
    alone = [outcome(make_engine(make_groups(kinds)).submit(r).result(timeout=60)) for r in requests]
    engine = make_engine(make_groups(kinds, num_pages=40), prefill_chunk=11)
    assert list(map(outcome, results(engine, requests))) == alone
    assert all(found is None or isinstance(found, TokenLogprobs) for _, _, prompt in alone for found in prompt)
