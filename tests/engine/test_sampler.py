from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_runtime.engine.request import SamplingParams
from cai_runtime.engine.sampler import (
    SequenceSampler,
    TokenCounts,
    draw,
    inverse_cdf,
    kth_greatest,
    nucleus,
    sample,
    uniform,
)
from cai_runtime.errors import NonFiniteLogitsError


def row(seed, vocab=1000, scale=4.0):
    return (np.random.default_rng(seed).normal(size=vocab) * scale).astype(np.float32)


def reference_distribution(logits, params):
    """Temperature, top_k, top_p, min_p by their definitions: float64, full sorts."""
    x = logits.astype(np.float64) / params.temperature
    if 0 < params.top_k < len(x):
        x[x < np.sort(x)[-params.top_k]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if params.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= params.top_p]] = 0
        p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_k=20),
    SamplingParams(temperature=1.3, top_p=0.9),
    SamplingParams(temperature=1.0, top_p=0.5, top_k=50),
    SamplingParams(temperature=2.0, min_p=0.05),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.02),
    SamplingParams(temperature=1.0, top_p=1e-9),
    SamplingParams(temperature=1.0, top_k=1),
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("vocab", [7, 1000, 49_152])
def test_draw_is_the_inverse_cdf_of_the_definition(params, vocab):
    logits = row(1, vocab)
    cdf = np.cumsum(reference_distribution(logits, params))
    for u in np.random.default_rng(2).random(50):
        token = draw(logits, params, float(u))
        # The token's interval contains u, but for the rounding of the fp32 weights.
        assert cdf[token] > u - 1e-5 and (token == 0 or cdf[token - 1] <= u + 1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 700), st.integers(1, 700), st.booleans())
@settings(max_examples=60, deadline=None)
def test_kth_greatest_equals_sorting(seed, size, k, ties):
    values = row(seed, size)
    if ties:
        values = np.round(values)
    k = min(k, size)
    assert kth_greatest(values, k) == np.sort(values)[-k]


@given(st.integers(0, 2**32 - 1), st.integers(1, 700), st.floats(0.0, 0.999999), st.booleans())
@settings(max_examples=60, deadline=None)
def test_nucleus_equals_sorting(seed, size, top_p, ties):
    weights = np.exp(row(seed, size))
    if ties:
        weights = np.exp(np.round(np.log(weights)))
    order = np.argsort(-weights, kind="stable")
    shares = np.cumsum(weights[order], dtype=np.float64)
    wanted = int((shares < top_p * weights.sum(dtype=np.float64)).sum()) + 1
    assert nucleus(weights, top_p).tolist() == sorted(order[:wanted].tolist())


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.floats(0.0, 1.0, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_inverse_cdf_never_takes_a_weightless_token(seed, size, u):
    rng = np.random.default_rng(seed)
    weights = (rng.random(size) * (rng.random(size) < 0.2)).astype(np.float32)
    weights[rng.integers(size)] = 1.0
    index = inverse_cdf(weights, u)
    assert weights[index] > 0
    running = np.cumsum(weights, dtype=np.float64)
    assert running[index] >= u * running[-1] * (1 - 1e-12)
    assert index == 0 or running[index - 1] <= u * running[-1] * (1 + 1e-12)


def test_inverse_cdf_at_the_very_end():
    weights = np.zeros(200, dtype=np.float32)
    weights[[3, 130]] = [1.0, 1e-30]
    assert inverse_cdf(weights, float(np.nextafter(1.0, 0.0))) in (3, 130)


def test_frequencies_follow_the_distribution():
    logits = row(3, 8, scale=1.0)
    params = SamplingParams(temperature=1.0)
    n = 4000
    counts = Counter(draw(logits, params, uniform(5, position)) for position in range(n))
    p = reference_distribution(logits, params)
    chi2 = sum((counts[token] - n * p[token]) ** 2 / (n * p[token]) for token in range(8))
    assert chi2 < 24.3  # 0.999 quantile with 7 degrees of freedom; the seed is fixed


def test_uniform_is_a_pure_function_of_seed_and_position():
    assert uniform(1, 2) == uniform(1, 2)
    numbers = {uniform(seed, position) for seed in (-1, 0, 1, 2**64) for position in range(50)}
    assert len(numbers) == 200 and all(0 <= u < 1 for u in numbers)


def sampler(seed=0, stop_ids=(), prompt=(), **params):
    return SequenceSampler(SamplingParams(**params), list(prompt), stop_ids, seed)


def test_a_row_does_not_see_its_neighbours():
    logits = np.stack([row(seed, 500) for seed in range(6)])
    options = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 0.0, "frequency_penalty": 0.5},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.5, "min_p": 0.1},
    ]
    together = sample(logits, [sampler(seed=i, **o) for i, o in enumerate(options)], range(6))
    alone = [sample(logits[i : i + 1], [sampler(seed=i, **o)], [i])[0] for i, o in enumerate(options)]
    assert together == alone


def test_greedy_takes_the_first_of_equals():
    logits = np.zeros((2, 10), dtype=np.float32)
    logits[0, [3, 7]] = 1
    assert sample(logits, [sampler(temperature=0.0)] * 2, [0, 0]) == [3, 0]


def test_seed_of_the_request_wins():
    logits = row(0, 500)
    own = [sampler(seed=i, temperature=1.0).choose(logits, 3) for i in range(20)]
    assert len(set(own)) > 1
    params = SamplingParams(temperature=1.0, seed=11)
    assert len({SequenceSampler(params, [], (), seed=i).choose(logits, 3) for i in range(20)}) == 1


def after_processors(s, logits):
    out = logits.copy()
    for process in s._processors:
        process(out)
    return out


def test_penalties_by_their_definitions():
    logits = np.array([2.0, -2.0, 1.0, 0.5, -1.0], dtype=np.float32)
    s = sampler(prompt=[0, 1], repetition_penalty=2.0)
    s.observe(2)
    assert after_processors(s, logits).tolist() == [1.0, -4.0, 0.5, 0.5, -1.0]
    s = sampler(prompt=[0, 1], frequency_penalty=0.5, presence_penalty=0.25)
    for token in (2, 2, 4):
        s.observe(token)
    assert after_processors(s, logits).tolist() == [2.0, -2.0, 1.0 - 1.25, 0.5, -1.75], "the prompt is not counted"
    s = sampler(logit_bias={3: 10.0, 0: -100.0})
    assert after_processors(s, logits).tolist() == [-98.0, -2.0, 1.0, 10.5, -1.0]


def test_processors_run_in_the_documented_order():
    s = sampler(prompt=[0], repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 3.0})
    s.observe(0)
    assert after_processors(s, np.array([4.0, 0.0], dtype=np.float32))[0] == 4.0 / 2 - 1 + 3


def test_min_tokens_bans_stop_tokens_until_reached():
    logits = np.array([0.0, 1.0, 9.0], dtype=np.float32)
    s = sampler(temperature=0.0, min_tokens=2, stop_ids=[2])
    assert not s.is_plain_greedy
    tokens = []
    for position in range(3):
        tokens.append(s.choose(logits, position))
        s.observe(tokens[-1])
    assert tokens == [1, 1, 2]
    assert s.is_plain_greedy, "the ban is over"
    assert logits.tolist() == [0.0, 1.0, 9.0], "the runner's row is left alone"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_fail_their_row_alone(value, temperature):
    logits = np.stack([row(0, 300), row(1, 300), row(2, 300)])
    good = sample(logits, [sampler(temperature=temperature)] * 3, [0, 1, 2])
    logits[1, 17] = value
    tokens = sample(logits, [sampler(temperature=temperature)] * 3, [0, 1, 2])
    assert isinstance(tokens[1], NonFiniteLogitsError)
    assert [tokens[0], tokens[2]] == [good[0], good[2]]


def test_minus_infinity_is_a_ban():
    logits = np.full(300, -np.inf, dtype=np.float32)
    logits[[7, 200]] = [1.0, 2.0]
    seen = {draw(logits, SamplingParams(temperature=1.0), uniform(0, position)) for position in range(100)}
    assert seen == {7, 200}
    logits[:] = -np.inf
    assert isinstance(sample(logits[None], [sampler(temperature=1.0)], [0])[0], NonFiniteLogitsError)


def test_tiny_and_huge_temperatures():
    logits = row(4, 300, scale=20.0)
    assert draw(logits, SamplingParams(temperature=1e-12), 0.7) == int(logits.argmax())
    assert len({draw(logits, SamplingParams(temperature=1e9), uniform(0, p)) for p in range(200)}) > 100


def test_token_counts_grow():
    ids = np.random.default_rng(0).integers(0, 300, size=2000).tolist()
    counts = TokenCounts(ids)
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == dict(Counter(ids))
