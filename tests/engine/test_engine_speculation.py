"""Drafted tokens, right and wrong ones: the text is the undrafted one, to the last token."""

import random

import pytest

from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.errors import EngineClosedError, NonFiniteLogitsError, RunnerError

SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "top_p": 0.9},
    "penalties": {
        "temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3, "top_k": 20,
    },
    "min_tokens": {"temperature": 0.9, "min_tokens": 9, "logit_bias": {96: 4.0}},
}  # fmt: skip


class Oracle:
    """Proposes how a request's text went on without drafts; each token wrong with a probability."""

    def __init__(self, wrong, seed=0):
        self.texts, self.wrong, self.rng = {}, wrong, random.Random(seed)

    def propose(self, sequence):
        text = self.texts.get((tuple(sequence.request.prompt_ids), sequence.request.sampling.seed), ())
        at = sequence.num_generated
        ahead = text[at : at + self.rng.choice([0, 1, 3, 6])]
        return [(t + 1) % 96 if self.rng.random() < self.wrong else t for t in ahead] + [5] * self.rng.randint(0, 2)


@pytest.fixture(params=[0.0, 0.3, 1.0], ids=["right", "mixed", "wrong"])
def oracle(request):
    return Oracle(request.param)


def run_all(engine, requests):
    return [handle.result(timeout=60) for handle in engine.submit_all(requests)]


def undrafted(make_engine, requests, oracle):
    """What the requests give alone, without drafts. The oracle learns their texts."""
    engine, found = make_engine(), []
    for request in requests:
        found.append(engine.submit(request).result())
        oracle.texts[tuple(request.prompt_ids), request.sampling.seed] = found[-1].token_ids
    return [(done.token_ids, done.text, done.finish_reason, done.stop_string) for done in found]


def outcome(done):
    return done.token_ids, done.text, done.finish_reason, done.stop_string


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    ("runner", "options"),
    [
        ({"num_pages": 512}, {}),
        ({"num_pages": 20}, {"prefill_chunk": 9}),  # 80 positions for 24 sequences of up to 80
        ({"num_pages": 200, "page_size": 1}, {"max_batch": 3, "prefix_cache": False}),
    ],
    ids=["roomy", "preempted", "tiny pages"],
)
def test_drafts_change_nothing(make_engine, make_runner, prompts, oracle, sampling, runner, options):
    requests = [
        Request(prompt, SamplingParams(max_tokens=20, seed=i, **SAMPLINGS[sampling]))
        for i, prompt in enumerate(prompts)
    ]
    alone = undrafted(make_engine, requests, oracle)
    engine = make_engine(make_runner(**runner), proposer=oracle, **options)
    assert list(map(outcome, run_all(engine, requests))) == alone
    stats = engine.stats()
    assert stats.tokens_drafted > stats.drafts_taken >= 0
    assert stats.drafts_taken > 0 or oracle.wrong == 1.0
    assert stats.tokens_decoded == sum(len(tokens) for tokens, *_ in alone)
    assert runner["num_pages"] != 20 or stats.preemptions > 0
    again = run_all(engine, requests)
    assert list(map(outcome, again)) == alone, "from pages that drafts were written to"
    if options.get("prefix_cache", True) and runner["num_pages"] == 512:
        assert sum(done.cached_tokens for done in again) > 0


@pytest.mark.parametrize("pages", [512, 20], ids=["roomy", "preempted"])
def test_drafts_change_nothing_under_masks(make_engine, make_runner, prompts, oracle, hash_mask, obeys, pages):
    requests = [
        Request(prompt, SamplingParams(max_tokens=20, seed=i, temperature=1.0), mask=hash_mask if i % 3 else None)
        for i, prompt in enumerate(prompts)
    ]
    alone = undrafted(make_engine, requests, oracle)
    engine = make_engine(make_runner(num_pages=pages), proposer=oracle)
    together = run_all(engine, requests)
    assert list(map(outcome, together)) == alone
    assert all(obeys(done.token_ids) for done, request in zip(together, requests, strict=True) if request.mask)
    assert engine.stats().drafts_taken > 0 or oracle.wrong == 1.0


def test_right_drafts_save_steps(make_engine, make_runner, greedy, expected):
    class Knowing:
        def propose(self, sequence):
            return list(expected(sequence.token_ids, 4))

    runner = make_runner()
    engine = make_engine(runner, proposer=Knowing())
    done = engine.submit(greedy([1, 2], 21, ignore_eos=True)).result()
    assert done.token_ids[:10] == expected([1, 2], 21)[:10]
    assert runner.steps == [[2], [5], [5], [5], [5]]
    assert (engine.stats().tokens_drafted, engine.stats().drafts_taken) == (16, 16)


def test_a_stop_string_among_drafted_tokens(make_engine, greedy, oracle):
    plain = make_engine()
    prompts = [[i, 9] for i in range(12)]
    stops = [plain.submit(greedy(p, ignore_eos=True)).result().text[6:8] for p in prompts]
    requests = [greedy(p, stop=(stop,), ignore_eos=True) for p, stop in zip(prompts, stops, strict=True)]
    alone = undrafted(make_engine, requests, oracle)
    for prompt in prompts:  # the oracle knows how it would go on behind the stop string
        done = plain.submit(greedy(prompt, ignore_eos=True)).result()
        oracle.texts[tuple(prompt), None] = done.token_ids
    engine = make_engine(proposer=oracle)
    assert list(map(outcome, run_all(engine, requests))) == alone


def test_a_draft_that_the_memory_does_not_take_is_left_out(make_engine, make_runner, greedy, expected):
    class Long:
        def propose(self, sequence):
            return [3] * 12

    runner = make_runner()
    run = runner.run

    def limited(step):
        if max(len(s.token_ids) for s in step) > 8:
            raise MemoryError("out of memory")
        return run(step)

    runner.run = limited
    engine = make_engine(runner, proposer=Long())
    assert engine.submit(greedy([1, 2])).result().token_ids == expected([1, 2], 20)
    assert engine.stats().retries > 0


def test_a_poisonous_draft_fails_nobody(make_engine, make_runner, greedy, expected):
    """The model fails on a token that was only drafted: the text does without it."""

    class Poison:
        def propose(self, sequence):
            return [95]

    runner = make_runner()
    runner.fail_on = 95
    engine = make_engine(runner, proposer=Poison())
    text = expected([1, 2], 20)
    assert 95 not in text
    assert engine.submit(greedy([1, 2])).result().token_ids == text
    with pytest.raises(RunnerError):
        engine.submit(greedy([1, 95])).result()


def test_logits_that_are_not_finite_behind_a_drafted_token(make_engine, make_runner, greedy, expected):
    """The tokens before come out; a wrong draft's rows do not matter."""

    class Knowing:
        def propose(self, sequence):
            return list(expected(sequence.token_ids, 3))

    runner = make_runner()
    text = expected([1, 2], 20)
    runner.nan_on = text[3]
    assert text.index(runner.nan_on) == 3
    handle = make_engine(runner, proposer=Knowing()).submit(greedy([1, 2]))
    with pytest.raises(NonFiniteLogitsError):
        handle.result()
    assert sum((delta.token_ids for delta in handle._log.deltas), ()) == text[:4]


def test_a_proposer_outside_the_vocabulary_is_named(make_engine, greedy):
    class Broken:
        def propose(self, sequence):
            return [97]

    with pytest.raises(EngineClosedError, match="Broken proposed token id 97; the vocabulary is 0..96"):
        make_engine(proposer=Broken()).submit(greedy([1])).result(timeout=30)
