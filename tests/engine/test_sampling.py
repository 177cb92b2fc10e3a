"""State kept token by token, the step's batch made of it, and errors of single rows. The draw itself is tested in
tests/kernels/test_sampling.py."""

from collections import Counter

import numpy as np
import pytest

from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.engine.sampling import (
    PromptTokens,
    SequenceSampler,
    TokenCounts,
    TokenScorer,
    sample_one,
    sampling_batch,
    tokens_or_errors,
)
from cai_runtime.errors import EngineError, InvalidRequestError, NonFiniteLogitsError
from cai_runtime.kernels.sampling import sample_cpu, uniform
from cai_runtime.kernels.sampling_reference import processed_logits, sample_reference


def row(seed, vocab=1000, scale=4.0):
    return (np.random.default_rng(seed).normal(size=vocab) * scale).astype(np.float32)


def sampler(seed=0, stop_ids=(), prompt=(), rules=None, **params):
    return SequenceSampler(SamplingParams(**params), list(prompt), stop_ids, seed, rules)


def sample(logits, samplers, positions, drafted=None, mask=None):
    """Tokens or errors by the CPU kernels, which the reference agrees with."""
    batch = sampling_batch(samplers, positions, drafted, mask)
    found = sample_cpu(np.array(logits), batch)
    wanted = sample_reference(np.array(logits), batch)
    assert found.ids.tolist() == wanted.ids.tolist() and found.status.tolist() == wanted.status.tolist()
    return tokens_or_errors(found.wait(), positions)


def processed(s, logits):
    batch = sampling_batch([s], [0])
    return processed_logits(np.array(logits, np.float32), batch.rows[0], batch.tables[0], None).tolist()


OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 0.0, "frequency_penalty": 0.5},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 1.0, "repetition_penalty": 1.3, "prompt": [3, 4], "logit_bias": {7: 2.0}},
]


def test_a_row_does_not_see_its_neighbours():
    logits = np.stack([row(seed, 500) for seed in range(len(OPTIONS))])
    together = sample(logits, [sampler(seed=i, **o) for i, o in enumerate(OPTIONS)], range(len(OPTIONS)))
    alone = [sample(logits[i : i + 1], [sampler(seed=i, **o)], [i])[0] for i, o in enumerate(OPTIONS)]
    assert together == alone


def test_greedy_takes_the_first_of_equals():
    logits = np.zeros((2, 10), dtype=np.float32)
    logits[0, [3, 7]] = 1
    assert sample(logits, [sampler(temperature=0.0)] * 2, [0, 0]) == [3, 0]


def test_a_seed_gives_the_documented_number():
    logits = row(0, 500)
    for seed in (-1, 0, 11, 2**63, 2**64 + 5):
        params = SamplingParams(temperature=1.0, seed=seed)
        token = sample(logits[None], [SequenceSampler(params, [], (), seed=99)], [3])[0]
        assert token == sample_one(logits, params, uniform(seed, 3))
    drawn = {sample(logits[None], [sampler(seed=i, temperature=1.0)], [3])[0] for i in range(20)}
    assert len(drawn) > 5, "the engine's seed counts where the request has none"


def test_penalties_by_their_definitions():
    logits = [2.0, -2.0, 1.0, 0.5, -1.0]
    s = sampler(prompt=[0, 1], repetition_penalty=2.0)
    s.observe(2)
    assert processed(s, logits) == [1.0, -4.0, 0.5, 0.5, -1.0]
    s = sampler(prompt=[0, 1], frequency_penalty=0.5, presence_penalty=0.25)
    for token in (2, 2, 4):
        s.observe(token)
    assert processed(s, logits) == [2.0, -2.0, 1.0 - 1.25, 0.5, -1.75], "the prompt is not counted"
    s = sampler(logit_bias={3: 10.0, 0: -100.0})
    assert processed(s, logits) == [-98.0, -2.0, 1.0, 10.5, -1.0]


def test_processors_run_in_the_documented_order():
    s = sampler(prompt=[0], repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 3.0})
    s.observe(0)
    assert processed(s, [4.0, 0.0])[0] == 4.0 / 2 - 1 + 3


def test_min_tokens_bans_stop_tokens_until_reached():
    logits = np.array([[0.0, 1.0, 9.0]], dtype=np.float32)
    s = sampler(temperature=0.0, min_tokens=2, stop_ids=[2], logit_bias={2: 50.0})
    tokens = []
    for position in range(3):
        tokens += sample(logits, [s], [position])
        s.observe(tokens[-1])
    assert tokens == [1, 1, 2]


def test_rows_of_a_draft_see_the_tokens_before_them():
    """Verifying a draft chooses what decoding token by token would have."""
    logits = np.stack([row(seed, 40, 1.0) for seed in range(4)])
    params = {
        "temperature": 1.0,
        "repetition_penalty": 1.5,
        "frequency_penalty": 1.0,
        "min_tokens": 2,
        "stop_ids": [5, 6],
        "prompt": [1, 2, 3],
    }
    one_by_one = sampler(**params)
    tokens = []
    for i in range(4):
        tokens += sample(logits[i : i + 1], [one_by_one], [3 + i])
        one_by_one.observe(tokens[-1])
    verifier = sampler(**params)
    drafted = {i: tokens[:i] for i in range(1, 4)}
    assert sample(logits, [verifier] * 4, [3, 4, 5, 6], drafted) == tokens
    assert sample(logits[:1], [verifier], [3]) == tokens[:1], "only accepted tokens are observed"


def test_the_mask_bans():
    mask = np.zeros((1, 2), np.uint32)
    mask[0, 1] = 1 << 3  # token 35
    assert sample(row(0, 40)[None], [sampler(temperature=1.0)], [0], mask=mask) == [35]
    (error,) = sample(row(0, 40)[None], [sampler(temperature=1.0)], [0], mask=np.zeros((1, 2), np.uint32))
    assert isinstance(error, NonFiniteLogitsError) and "every token is banned at position 0" in str(error)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_fail_their_row_alone(value, temperature, capfd):
    logits = np.stack([row(0, 300), row(1, 300), row(2, 300)])
    samplers = [sampler(temperature=temperature, repetition_penalty=1.1, prompt=[17])] * 3
    good = sample(logits, samplers, [0, 1, 2])
    logits[1, 17] = value
    tokens = sample(logits, samplers, [0, 1, 2])
    assert isinstance(tokens[1], NonFiniteLogitsError) and "NaN or infinity" in str(tokens[1])
    assert [tokens[0], tokens[2]] == [good[0], good[2]]
    assert capfd.readouterr().err == ""


def only_seven(logits, generated):
    logits[:] = -np.inf
    logits[7] = 0


def test_rules_see_their_row_and_fail_alone():
    def broken(logits, generated):
        raise ZeroDivisionError("mine")

    samplers = [sampler(temperature=1.0, rules=rules) for rules in (None, only_seven, broken)]
    logits = np.stack([row(0, 50)] * 3)
    tokens = sample(logits, samplers, [0, 0, 4])
    assert tokens[:2] == [sample(logits[:1], samplers[:1], [0])[0], 7]
    assert isinstance(tokens[2], EngineError) and "rules failed at position 4: ZeroDivisionError('mine')" in str(
        tokens[2]
    )
    assert isinstance(tokens[2].__cause__, ZeroDivisionError)


def test_rules_do_not_hide_that_a_row_is_damaged():
    for value in (np.nan, np.inf):
        logits = row(0, 50)[None]
        logits[0, 9] = value
        (error,) = sample(logits, [sampler(temperature=0.0, rules=only_seven)], [0])
        assert isinstance(error, NonFiniteLogitsError)


def test_rules_come_before_the_penalties():
    s = sampler(temperature=0.0, logit_bias={1: 5.0}, rules=lambda logits, _: logits.__setitem__(1, -3.0))
    assert sample([[0.0, 9.0]], [s], [0]) == [1], "-3 + 5 against 0"


def test_rules_see_the_tokens_generated_so_far():
    """The prompt's are not among them; those of a draft are."""
    seen = []
    s = sampler(prompt=[9], temperature=0.0, rules=lambda _, generated: seen.append(generated))
    logits = row(0, 50)[None]
    sample(logits, [s], [1])
    s.observe(4)
    sampling_batch([s, s], [2, 3], {1: [8]}).custom[1](logits[0])
    assert seen == [(), (), (4, 8)]


@pytest.mark.parametrize("masked", [False, True])
def test_logprobs_are_of_the_logits_after_the_rules(masked):
    def halve(logits, generated):
        logits *= 0.5
        logits[:10] = -np.inf

    samplers = [sampler(temperature=0.0, logprobs=k, rules=r) for k, r in ((3, halve), (2, None), (0, halve))]
    samplers.append(TokenScorer(5, 1))
    logits = np.stack([row(seed, 50) for seed in range(4)])
    mask = np.full((4, 2), ~np.uint32(32), np.uint32) if masked else None  # token 5 is banned
    batch = sampling_batch(samplers, range(4), None, mask)
    found, wanted = sample_cpu(logits.copy(), batch), sample_reference(logits.copy(), batch)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-6)
    assert found.top[0].tolist() == wanted.top[0].tolist()
    np.testing.assert_allclose(found.top[1], wanted.top[1], atol=1e-6)
    kept = logits[0, 10:].astype(np.float64) / 2
    assert found.logprobs[0] == pytest.approx(kept.max() - np.log(np.exp(kept).sum()), abs=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 0.0},
        {"top_p": 1.5},
        {"logit_bias": {3: float("inf")}},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_named(bad, make_engine):
    with pytest.raises(InvalidRequestError, match=next(iter(bad))):
        sampler(**bad)
    with pytest.raises(EngineError):
        make_engine().submit(Request([1], SamplingParams(**bad))).result(timeout=30)


def test_tokens_outside_the_vocabulary_are_refused():
    (error,) = sample_bad = tokens_or_errors(
        sample_cpu(np.zeros((1, 10), np.float32), sampling_batch([sampler(logit_bias={10: 1.0})], [0])), [0]
    )
    assert isinstance(error, InvalidRequestError) and len(sample_bad) == 1


def test_counts_follow_prompt_and_text():
    rng = np.random.default_rng(0)
    prompt, text = rng.integers(0, 300, size=400).tolist(), rng.integers(200, 500, size=2000).tolist()
    counts = TokenCounts(PromptTokens.of(prompt))
    for token in text:
        counts.add(token)
    wanted = dict.fromkeys(prompt, 0) | Counter(text)
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == wanted
    more = counts.plus([499, 7, 7])
    assert sum(more.counts) == len(text) + 3 and sum(counts.counts) == len(text)


def test_choices_share_the_prompt_tokens_while_one_lives():
    first = PromptTokens.of([5, 3, 5])
    assert PromptTokens.of([5, 3, 5]) is first and first.ids.tolist() == [3, 5]
    assert PromptTokens.of([5, 3]) is not first


def test_sample_one_raises():
    assert sample_one(row(0, 100), SamplingParams(temperature=0.0), 0.5) == int(row(0, 100).argmax())
    with pytest.raises(NonFiniteLogitsError):
        sample_one(np.full(10, np.nan, np.float32), SamplingParams(), 0.5)


def test_a_runner_samples_its_own_logits_and_may_fail(make_engine, make_runner, greedy, expected):
    runner = make_runner()
    shapes = []

    def broken_once(logits, batch):
        shapes.append((logits.shape, len(batch)))
        if len(shapes) == 1:
            raise RuntimeError("the device is out of memory")
        return sample_cpu(logits, batch)

    runner.sample = broken_once
    engine = make_engine(runner)
    with pytest.raises(EngineError, match="out of memory"):
        engine.submit(greedy([1])).result(timeout=30)
    assert engine.submit(greedy([1])).result(timeout=30).token_ids == expected([1], 20)
    assert shapes[0] == ((1, runner.vocab_size), 1)
