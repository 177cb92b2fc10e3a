"""The CPU sampler against the numpy reference, token by token, and the reference against float64 probabilities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import batches, fill_uniforms, make_batch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels import sampling as s
from cai_runtime.kernels.sampling_reference import kept_weights, reference_weights, sample_reference


@pytest.fixture(scope="module", params=cpu_library.instruction_sets())
def isa(request: pytest.FixtureRequest):
    best = cpu_library.instruction_set()
    cpu_library.use_instruction_set(request.param)
    yield request.param
    cpu_library.use_instruction_set(best)


@pytest.fixture(scope="module", params=[1, 3])
def threads(request: pytest.FixtureRequest):
    before = cpu_library.num_threads()
    cpu_library.set_num_threads(request.param)
    yield request.param
    cpu_library.set_num_threads(before)


def same(found: s.Sampled, wanted: s.Sampled) -> None:
    np.testing.assert_array_equal(found.status, wanted.status)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    assert (found.logprobs is None) == (wanted.logprobs is None) and (found.top is None) == (wanted.top is None)
    if found.logprobs is not None:
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=1e-6, atol=1e-6)
    if found.top is not None:
        np.testing.assert_array_equal(found.top[0], wanted.top[0])
        np.testing.assert_allclose(found.top[1], wanted.top[1], rtol=1e-6, atol=1e-6)


VOCABULARIES = st.one_of(st.integers(1, 300), st.sampled_from([1, 127, 128, 129, 4095, 4097, 5000]))


@given(batches(VOCABULARIES))
@settings(max_examples=60, deadline=None)
def test_cpu_chooses_the_references_tokens(isa: str, case: tuple):
    logits, batch = case
    same(s.sample_cpu(logits.copy(), batch), sample_reference(logits, batch))


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_rows_shared_by_threads_and_whole_rows(threads: int, rows: int):
    """Few long rows are cut into pieces for the threads, many are dealt whole: the same tokens."""
    for seed in range(3):
        logits, batch = make_batch(np.random.default_rng(seed), rows, 40_003)
        same(s.sample_cpu(logits.copy(), batch), sample_reference(logits, batch))


def test_only_masked_logits_are_overwritten():
    logits, batch = make_batch(np.random.default_rng(5), 4, 500)
    batch.mask = None
    after = logits.copy()
    s.sample_cpu(after, batch)
    np.testing.assert_array_equal(after, logits)


def exact_probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Temperature, top_k, top_p and min_p by their definitions: float64, full sorts."""
    x = logits.astype(np.float64) / temperature
    if 0 < top_k < len(x):
        x[x < np.sort(x)[-top_k]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        p[order[np.cumsum(p[order]) - p[order] >= top_p]] = 0
        p /= p.sum()
    p[p < min_p * p.max()] = 0
    return p / p.sum()


PARAMS = [(1.0, 0, 1.0, 0.0), (0.6, 20, 1.0, 0.0), (1.3, 0, 0.9, 0.0), (2.0, 0, 1.0, 0.05), (0.8, 40, 0.95, 0.02)]


@pytest.mark.parametrize("vocabulary", [7, 1000, 128_256])
@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), PARAMS)
def test_shares_of_the_tokens_are_the_exact_ones(vocabulary, temperature, top_k, top_p, min_p):
    logits = (np.random.default_rng(1).normal(size=vocabulary) * 4).astype(np.float32)
    row = s.NEUTRAL.copy()
    row["inverse_temperature"], row["top_k"] = s.inverse_temperature(temperature), top_k
    row["top_p"], row["min_weight"] = top_p, s.min_weight(min_p)
    weights = kept_weights(logits, row[0])
    exact = exact_probabilities(logits, temperature, top_k, top_p, min_p)
    assert np.abs(weights / weights.sum() - exact).sum() / 2 < 4e-7 + vocabulary * 2.0**-31


def test_ten_thousand_draws_follow_the_distribution():
    vocabulary, draws = 50, 10_000
    logits = np.random.default_rng(3).normal(size=vocabulary).astype(np.float32)
    rows = np.repeat(s.NEUTRAL, draws)
    rows["inverse_temperature"], rows["top_p"], rows["position"] = s.inverse_temperature(0.9), 0.95, np.arange(draws)
    rows["seed"] = 5
    fill_uniforms(rows)
    found = s.sample_cpu(np.tile(logits, (draws, 1)), s.SamplingBatch(rows, [s.NO_TABLES] * draws))
    counts = np.bincount(found.ids, minlength=vocabulary)
    expected = draws * exact_probabilities(logits, 0.9, 0, 0.95, 0.0)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations; the seed is fixed


def test_each_token_holds_its_interval_of_the_random_number():
    rng = np.random.default_rng(7)
    logits, draws = (rng.normal(size=3000) * 4).astype(np.float32), 10_000
    rows = np.repeat(s.NEUTRAL, draws)
    rows["inverse_temperature"], rows["uniform"] = 1, rng.random(draws)
    found = s.sample_cpu(np.tile(logits, (draws, 1)), s.SamplingBatch(rows, [s.NO_TABLES] * draws)).ids
    p = exact_probabilities(logits, 1.0, 0, 1.0, 0.0)
    ends = np.cumsum(p)
    assert (ends[found] > rows["uniform"] - 3e-6).all() and (ends[found] - p[found] < rows["uniform"] + 3e-6).all()


def test_weights_of_known_logits():
    weights = reference_weights(np.array([0, -np.log(2), -1, -21.4, -21.6, -np.inf], np.float32), 1.0)
    assert weights[0] == s.ONE and weights[3:].tolist() == [1, 0, 0]
    np.testing.assert_allclose(weights[1:3] / s.ONE, [0.5, np.exp(-1)], rtol=2e-7)


@given(st.integers(-(2**64), 2**128), st.integers(0, 2**40))
def test_random_numbers_are_numpys_philox(seed: int, position: int):
    rows = s.NEUTRAL.copy()
    rows["seed"], rows["position"] = (seed % 2**64, seed // 2**64 % 2**64), position
    fill_uniforms(rows)
    raw = int(np.random.Philox(key=seed % 2**128, counter=position).random_raw())
    assert rows["uniform"][0] == s.uniform(seed, position) == (raw >> 11) / 2**53


def test_a_token_outside_the_vocabulary_is_reported_and_nothing_written():
    tables = s.RowTables(np.array([3, 10], np.int32), np.ones(2, np.int32), *([np.zeros(0, np.int32)] * 2))
    row = s.NEUTRAL.copy()
    tables.write(row)
    row["presence"] = 1
    logits = np.arange(10, dtype=np.float32)[None]
    found = s.sample_cpu(logits, s.SamplingBatch(row, [tables]))
    assert (found.status[0], found.ids[0]) == (s.BAD_TOKEN, -1) and logits[0].tolist() == list(range(10))


def test_logprobs_of_known_logits():
    logits = np.log(np.array([[0.5, 0.2, 0.2, 0.1], [1, 0, 0, 0]], np.float32) + 1e-45).astype(np.float32)
    logits[1, 1:] = -np.inf
    rows = np.repeat(s.NEUTRAL, 2)
    batch = s.SamplingBatch(rows, [s.NO_TABLES] * 2, logprobs=np.array([3, 1], np.int8))
    found = s.sample_cpu(logits.copy(), batch)
    assert found.ids.tolist() == [0, 0] and found.top is not None and found.logprobs is not None
    np.testing.assert_allclose(found.logprobs, [np.log(0.5), 0], atol=1e-6)
    assert found.top[0].tolist() == [[0, 1, 2], [0, -1, -1]]
    np.testing.assert_allclose(found.top[1][0], np.log([0.5, 0.2, 0.2]), atol=1e-6)
    assert found.top[1][1].tolist() == [0, s.LOGPROB_FLOOR, s.LOGPROB_FLOOR]


def test_a_scored_token_takes_the_place_of_the_sampled_one():
    logits = np.log(np.array([[0.5, 0.2, 0.2, 0.1]] * 2, np.float32)).astype(np.float32)
    batch = s.SamplingBatch(
        np.repeat(s.NEUTRAL, 2), [s.NO_TABLES] * 2, np.full((2, 1), 1, np.uint32), np.zeros(2, np.int8),
        scored=np.array([3, -1], np.int32),
    )  # fmt: skip
    found = s.sample_cpu(logits, batch)
    assert found.ids.tolist() == [0, 0] and found.logprobs is not None and found.top is None
    np.testing.assert_allclose(found.logprobs, np.log([0.1, 0.5]), atol=1e-6)
    np.testing.assert_allclose(s.sample_cpu(np.zeros((1, 4)), batch.take(np.array([0]))).logprobs, np.log(0.25))
    batch.scored = np.array([4, -1], np.int32)
    with pytest.raises(KernelError, match="scored names token 4 of a vocabulary of 4"):
        s.sample_cpu(logits, batch)


def test_of_equal_logits_the_first_tokens_are_the_greatest():
    logits = np.zeros((2, 300), np.float32)
    logits[1, [250, 17]] = 1
    batch = s.SamplingBatch(np.repeat(s.NEUTRAL, 2), [s.NO_TABLES] * 2, logprobs=np.array([3, 3], np.int8))
    found = s.sample_cpu(logits, batch)
    assert found.ids.tolist() == [0, 17] and found.top is not None
    assert found.top[0].tolist() == [[0, 1, 2], [17, 250, 0]]


def test_batches_that_do_not_fit_are_refused():
    batch = s.SamplingBatch(np.repeat(s.NEUTRAL, 2), [s.NO_TABLES] * 2)
    with pytest.raises(KernelError, match=r"logits of shape \[3, 5\]"):
        s.sample_cpu(np.zeros((3, 5), np.float32), batch)
    with pytest.raises(KernelError, match="tables of 1 rows"):
        s.SamplingBatch(np.repeat(s.NEUTRAL, 2), [s.NO_TABLES])
    batch.mask = np.zeros((2, 1), np.uint32)
    with pytest.raises(KernelError, match=r"expected contiguous uint32 \[2, 2\]"):
        s.sample_cpu(np.zeros((2, 33), np.float32), batch)


def test_no_rows():
    assert len(s.sample_cpu(np.zeros((0, 5), np.float32), s.SamplingBatch(np.zeros(0, s.ROW), [])).ids) == 0


@pytest.mark.parametrize(
    "of", [lambda t: t, lambda t: t.t().contiguous().t(), lambda t: t.double(), lambda t: t.double().numpy()]
)
def test_logits_of_every_kind_give_the_same_tokens(of: Callable):
    """A contiguous fp32 tensor is read where it lies; others are converted."""
    logits = np.random.default_rng(0).normal(size=(3, 700)).astype(np.float32)
    batch = s.SamplingBatch(np.repeat(s.NEUTRAL, 3), [s.NO_TABLES] * 3)
    batch.rows["inverse_temperature"], batch.rows["top_p"], batch.rows["uniform"] = 1, 0.9, [0.1, 0.5, 0.9]
    same(s.sample_cpu(of(torch.from_numpy(logits.copy())), batch), sample_reference(logits, batch))


@pytest.mark.parametrize("spread", [0.0, 1e-6, 4.0])
def test_top_p_just_below_one_drops_only_what_it_may(spread: float):
    """The least weight that is known before the total is must not drop a token of the nucleus, even of a flat row."""
    logits = (np.random.default_rng(1).normal(size=(4, 40_003)) * spread).astype(np.float32)
    batch = s.SamplingBatch(np.repeat(s.NEUTRAL, 4), [s.NO_TABLES] * 4)
    batch.rows["inverse_temperature"], batch.rows["uniform"] = 1, [0, 0.3, 0.9, 1 - 2**-53]
    for top_p in (0.5, 0.95, 1 - 1e-6, 1 - 2**-53):
        batch.rows["top_p"] = top_p
        same(s.sample_cpu(logits.copy(), batch), sample_reference(logits, batch))
