"""Median filter, normalization and dynamic time warping, against plain definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_runtime.speech.alignment import FILTER_WIDTH, median_filter, token_matrix, token_starts


def plain_path(cost, free_start=False):
    """Total and first columns of the cheapest path, by the quadratic recurrence and every predecessor kept."""
    rows, columns = cost.shape
    total = np.full((rows, columns), np.inf)
    came = {}
    for i, j in itertools.product(range(rows), range(columns)):
        before = [(total[a, b], (a, b)) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
        if i == 0 and (j == 0 or free_start):
            before.append((0.0, None))
        best, came[i, j] = min(before, key=lambda item: item[0])
        total[i, j] = best + cost[i, j]
    starts, place = np.zeros(rows, int), (rows - 1, columns - 1)
    while place is not None:
        starts[place[0]] = place[1]
        place = came[place]
    return total[-1, -1], starts


def total_of(cost, starts):
    """Cost of the cheapest path whose rows begin at these columns."""
    rows, columns = cost.shape
    total = 0.0
    for row, start in enumerate(starts):
        if row + 1 == rows:
            total += cost[row, start:columns].sum()
            continue
        # The next row begins in the column of this row's last cell, or one further.
        after = starts[row + 1]
        ends = [end for end in (after, after - 1) if end >= start]
        total += min(cost[row, start : end + 1].sum() for end in ends)
    return total


@given(st.integers(1, 7), st.integers(1, 12), st.booleans(), st.integers(0, 2**32 - 1))
def test_path_is_the_cheapest(rows, columns, free, seed):
    cost = np.random.default_rng(seed).standard_normal((rows, columns))
    total, expected = plain_path(cost, free)
    starts = token_starts(cost, free_start=free)
    assert np.array_equal(starts, expected)
    assert total_of(cost, starts) == pytest.approx(total)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_path_costs_the_least_where_costs_tie(rows, columns, seed):
    cost = np.random.default_rng(seed).integers(-1, 2, (rows, columns)).astype(float)
    starts = token_starts(cost)
    assert starts[0] == 0
    assert (np.diff(starts) >= 0).all()
    assert total_of(cost, starts) == pytest.approx(plain_path(cost)[0])


@pytest.mark.parametrize("length", [1, 3, 4, 7, 100])
def test_median_filter(length):
    values = np.random.default_rng(length).standard_normal((3, 2, length)).astype(np.float32)
    half = FILTER_WIDTH // 2
    expected = values
    if length > half:
        padded = np.pad(values, ((0, 0), (0, 0), (half, half)), mode="reflect")
        expected = np.median(np.lib.stride_tricks.sliding_window_view(padded, FILTER_WIDTH, axis=2), axis=-1)
    assert np.array_equal(median_filter(values), expected)


def test_median_network_sorts_every_order_of_zeros_and_ones():
    # A network of compare-exchange steps that does so for zeros and ones does so for all values.
    columns = np.array(list(itertools.product((0, 1), repeat=7)), np.float32)
    middle = median_filter(columns)[:, 3]
    assert np.array_equal(middle, np.median(columns, axis=1))


def test_matrix_is_of_the_audio_alone():
    weights = np.random.default_rng(0).random((3, 5, 40), np.float32)
    louder = weights.copy()
    louder[:, :, 30:] += 9.0
    weights /= weights.sum(axis=2, keepdims=True)
    louder /= louder.sum(axis=2, keepdims=True)
    assert np.allclose(token_matrix(weights, 30), token_matrix(louder, 30), atol=1e-4)
    assert token_matrix(weights, 30).shape == (5, 30)


def test_weights_are_not_changed():
    weights = np.random.default_rng(0).random((2, 3, 20), np.float32)
    kept = weights.copy()
    token_matrix(weights, 20)
    assert np.array_equal(weights, kept)


def test_a_row_without_weight_makes_no_nan():
    assert np.isfinite(token_matrix(np.zeros((1, 2, 10), np.float32), 10)).all()
