"""Aligns tokens to encoder positions by dynamic time warping over cross-attention weights.

Method: word times of https://github.com/openai/whisper (whisper/timing.py). The dynamic program works on whole rows of
numpy, because a row's recurrence is a running minimum once the row's prefix sums are taken off.
"""

from __future__ import annotations

import numpy as np

FILTER_WIDTH = 7  # positions of the median filter
_HALF = FILTER_WIDTH // 2
_BLOCK = 1 << 15  # weights filtered at once: seven shifted copies of them stay in the processor's cache
# Compare-exchange steps of (low, high) after which index 3 of seven values holds their median.
_MEDIAN_STEPS = (
    (0, 5), (0, 3), (1, 6), (2, 4), (0, 1), (3, 5), (2, 6), (2, 3), (3, 6), (4, 5), (1, 4), (1, 3), (3, 4),
)  # fmt: skip


def token_matrix(attention: np.ndarray, positions: int) -> np.ndarray:
    """How much each token attends to each encoder position, beside other tokens.

    attention: [heads, tokens, rows], softmax over rows. positions: how many rows hold audio, 1 to rows.
    Returns fp32 [tokens, positions]: the weights within the audio, each column of a head shifted and scaled to mean 0 and
    deviation 1 over the tokens, averaged over heads, filtered by the running median along positions. (OpenAI's filters
    each head before: the same within the noise for many heads, at a multiple of the time.)
    """
    weights = np.array(attention[:, :, :positions], dtype=np.float32)
    total = weights.sum(axis=2, keepdims=True)
    weights /= np.maximum(total, np.finfo(np.float32).tiny)
    weights -= weights.mean(axis=1, keepdims=True)
    deviation = np.sqrt(np.square(weights).mean(axis=1, keepdims=True))
    weights /= np.maximum(deviation, np.finfo(np.float32).tiny)
    return median_filter(weights.mean(axis=0))


def median_filter(values: np.ndarray) -> np.ndarray:
    """Running median of seven along the last axis, whose ends are mirrored; fp32 of the shape of `values`.

    An axis of three values or fewer has nothing to mirror and comes back as it is.
    """
    length = values.shape[-1]
    if length <= _HALF:
        return values.astype(np.float32)
    rows = values.reshape(-1, length)
    found = np.empty(rows.shape, np.float32)
    step = max(1, _BLOCK // length)
    for begin in range(0, len(rows), step):
        padded = np.pad(rows[begin : begin + step], ((0, 0), (_HALF, _HALF)), mode="reflect")
        taps = [padded[:, shift : shift + length].astype(np.float32) for shift in range(FILTER_WIDTH)]
        spare = np.empty_like(taps[0])
        for low, high in _MEDIAN_STEPS:
            np.minimum(taps[low], taps[high], out=spare)
            np.maximum(taps[low], taps[high], out=taps[high])
            taps[low], spare = spare, taps[low]
        found[begin : begin + step] = taps[_HALF]
    return found.reshape(values.shape)


def token_starts(cost: np.ndarray, *, free_start: bool = False) -> np.ndarray:
    """First column of each row on the cheapest monotonic path through a matrix of costs.

    cost: [rows, columns], both at least 1. A path goes from the first row and column to the last ones; each step moves to
    the next row, the next column or both. With `free_start` it may begin at any column of the first row, at no cost.
    Returns int64 [rows], not falling.
    """
    rows, columns = cost.shape
    sums = np.zeros((rows, columns + 1))
    np.cumsum(cost, axis=1, out=sums[:, 1:])
    # Entering a row at column k and walking to j costs entry[k] - sums[k] + sums[j + 1]: the best k for every j is a
    # running minimum. `entries` keeps entry[k] - sums[k] of every row.
    entries = np.empty((rows, columns))
    entry = np.zeros(columns) if free_start else np.full(columns, np.inf)
    entry[0] = 0.0
    for row in range(rows):
        np.subtract(entry, sums[row, :-1], out=entries[row])
        best = np.minimum.accumulate(entries[row])
        best += sums[row, 1:]
        entry = best  # from above, into the same column
        entry[1:] = np.minimum(best[1:], best[:-1])  # or from above and left
    starts = np.empty(rows, np.int64)
    column = columns - 1
    totals = sums[:, 1:]
    for row in range(rows - 1, -1, -1):
        column = starts[row] = int(entries[row, : column + 1].argmin())
        if row and column:
            above = entries[row - 1, : column + 1].min() + totals[row - 1, column]
            left = entries[row - 1, :column].min() + totals[row - 1, column - 1]
            column -= int(left <= above)
    return starts
