"""Random rows of logits and parameters for the samplers, hard ones among them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from cai_runtime.kernels.sampling import (
    NEUTRAL,
    NO_TABLES,
    RowTables,
    SamplingBatch,
    _function,
    inverse_temperature,
    min_weight,
)


def fill_uniforms(rows: np.ndarray) -> None:
    """Fill the field `uniform` of ROW [n] from seed and position, by the C++ function that `new_batch` calls."""
    _function("sampling_uniforms")(rows.ctypes.data, len(rows))


def make_batch(rng: np.random.Generator, rows: int, vocabulary: int) -> tuple[np.ndarray, SamplingBatch]:
    """Logits fp32 [rows, vocabulary] and how to sample them. -inf, ties, NaN and infinities are among the logits."""
    logits = (rng.normal(size=(rows, vocabulary)) * rng.choice([0.0, 0.1, 4, 30], (rows, 1))).astype(np.float32)
    for i in range(rows):
        kind = rng.integers(8)
        if kind == 0:
            logits[i] = np.round(logits[i])  # ties
        elif kind == 1:
            logits[i, rng.random(vocabulary) < 0.3] = -np.inf
        elif kind == 2:
            logits[i, rng.integers(vocabulary)] = rng.choice([np.nan, -np.nan, np.inf, 3e38, -3e38])
        elif kind == 3:
            logits[i] = rng.choice([-np.inf, 0.0, -0.0], vocabulary)
    params = np.repeat(NEUTRAL, rows)
    params["seed"], params["position"] = rng.integers(0, 2**63, (rows, 2)), rng.integers(0, 10**6, rows)
    fill_uniforms(params)
    params["uniform"] = np.where(rng.random(rows) < 0.1, rng.choice([0.0, 1 - 2.0**-53], rows), params["uniform"])
    temperatures = rng.choice([0, 0.3, 1, 1, 5, 1e-12, 1e9], rows)
    params["inverse_temperature"] = [inverse_temperature(t) for t in temperatures]
    params["top_p"] = rng.choice([1, 1, 0.9, 0.5, 0.0, 1e-9, 0.9999999], rows)
    params["top_k"] = rng.choice([0, 0, 1, 5, 50, 400], rows)
    params["min_weight"] = [min_weight(p) for p in rng.choice([0, 0, 0.05, 1], rows)]
    params["repetition"] = rng.choice([1, 1.3, 0.5], rows)
    params["frequency"], params["presence"] = rng.choice([0, 0.5], rows), rng.choice([0, -0.25], rows)
    tables = [_make_tables(rng, vocabulary) if rng.random() < 0.5 else NO_TABLES for _ in range(rows)]
    for i, own in enumerate(tables):
        own.write(params[i : i + 1])
    mask = None
    if rng.random() < 0.3:
        mask = rng.integers(0, 2**32, (rows, -(-vocabulary // 32)), dtype=np.uint32)
        mask[rng.random(mask.shape) < 0.5] = rng.choice([0, 2**32 - 1])
    logprobs = rng.integers(-1, 6, rows).astype(np.int8) if rng.random() < 0.5 else None
    scored = None
    if logprobs is not None and rng.random() < 0.5:
        scored = np.where(rng.random(rows) < 0.5, rng.integers(vocabulary, size=rows), -1).astype(np.int32)
    return logits, SamplingBatch(params, tables, mask, logprobs, scored=scored)


def _make_tables(rng: np.random.Generator, vocabulary: int) -> RowTables:
    seen = rng.choice(vocabulary, rng.integers(min(vocabulary, 20) + 1), replace=False).astype(np.int32)
    biased = rng.choice(vocabulary, rng.integers(min(vocabulary, 20) + 1), replace=False).astype(np.int32)
    biases = rng.choice([1.5, -3, -np.inf], len(biased)).astype(np.float32)
    return RowTables(seen, rng.integers(0, 4, len(seen)).astype(np.int32), biased, biases)


def batches(vocabularies: st.SearchStrategy[int], max_rows: int = 5) -> st.SearchStrategy:
    """(logits, batch) of numpy's numbers from a drawn seed."""
    return st.builds(
        lambda seed, rows, vocabulary: make_batch(np.random.default_rng(seed), rows, vocabulary),
        st.integers(0, 2**32 - 1),
        st.integers(1, max_rows),
        vocabularies,
    )
