"""The definition of kernels/sampling.py in numpy, written to be read. Tests hold the other backends to it."""

from __future__ import annotations

import numpy as np

from cai_runtime.kernels.sampling import (
    LOGPROB_FLOOR,
    NOT_FINITE,
    NOTHING_ALLOWED,
    OK,
    ONE,
    PROCESSOR_FAILED,
    RowTables,
    Sampled,
    SamplingBatch,
    apply_processors,
    host_logits,
)

_F = np.float32
_POLYNOMIAL = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def reference_weights(logits: np.ndarray, inverse_temperature: float) -> np.ndarray:
    """int64 [vocabulary] weights of finite or -inf logits, fp32 [vocabulary]."""
    with np.errstate(over="ignore", under="ignore"):
        x = np.maximum((logits - logits.max()) * _F(inverse_temperature), _F(-22))
    n = np.rint(x * _F(1.44269504))  # e^x = 2^n e^r
    r = (x - n * _F(0.693359375)) + n * _F(2.12194440e-4)
    p = np.full_like(r, 1.9875691500e-4)
    for coefficient in _POLYNOMIAL:
        p = p * r + _F(coefficient)
    p = (r * r) * p + (r + _F(1))
    return np.trunc(np.ldexp(p, n.astype(np.int32) + 30) + _F(0.5)).astype(np.int64)


def processed_logits(logits: np.ndarray, row: np.void, tables: RowTables, mask: np.ndarray | None) -> np.ndarray:
    """A copy of a row after penalties, bias and bans."""
    out = logits.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        seen, counts = tables.penalty_tokens, tables.penalty_counts.astype(_F)
        values = out[seen]
        values = np.where(values > 0, values / row["repetition"], values * row["repetition"])
        out[seen] = np.where(counts > 0, values - (counts * row["frequency"] + row["presence"]), values)
        banned = np.isneginf(tables.biases)
        out[tables.bias_tokens] = np.where(banned, -np.inf, out[tables.bias_tokens] + tables.biases)
    if mask is not None:
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(out)]
        out[bits == 0] = -np.inf
    return out


def kept_weights(logits: np.ndarray, row: np.void) -> np.ndarray:
    """Weights of processed logits after temperature, top_k, top_p and min_p: 0 for tokens that drop out."""
    weights = reference_weights(logits, row["inverse_temperature"])
    if 0 < row["top_k"] < len(logits):
        weights[logits < np.sort(logits)[-row["top_k"]]] = 0
    if row["top_p"] < 1:
        total = int(weights.sum())
        target = min(max(int(np.ceil(row["top_p"] * float(total))), 1), total)
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= target]] = 0
    weights[weights < row["min_weight"]] = 0
    return weights


def choose(logits: np.ndarray, row: np.void) -> tuple[int, int]:
    """(token, status) of a row of processed logits."""
    if np.isnan(logits).any() or np.isposinf(logits).any():
        return -1, NOT_FINITE
    if np.isneginf(logits).all():
        return -1, NOTHING_ALLOWED
    if row["inverse_temperature"] == 0:
        return int(logits.argmax()), OK
    weights = kept_weights(logits, row)
    total = int(weights.sum())
    target = min(int(row["uniform"] * float(total)), total - 1)
    return int(np.searchsorted(np.cumsum(weights), target, side="right")), OK


def logprobs(logits: np.ndarray) -> np.ndarray:
    """float64 [vocabulary]: log softmax of a row of logits, all at the floor where one is NaN or +inf."""
    if np.isnan(logits).any() or not np.isfinite(logits.max()):
        return np.full(len(logits), LOGPROB_FLOOR)
    total = int(reference_weights(logits, 1.0).sum())
    values = logits.astype(np.float64) - (logits.max() + np.log(total / ONE))
    return np.maximum(values, LOGPROB_FLOOR)


def sample_reference(logits, batch: SamplingBatch) -> Sampled:
    """As `sample_cpu`; leaves the logits alone."""
    batch.check(host_logits(logits).shape)
    logits = host_logits(logits).copy()
    errors = apply_processors(logits, batch.custom)
    count, vocabulary = logits.shape
    ids, status = np.empty(count, np.int32), np.empty(count, np.uint8)
    for i in range(count):
        mask = None if batch.mask is None else batch.mask[i]
        processed = processed_logits(logits[i], batch.rows[i], batch.tables[i], mask)
        ids[i], status[i] = (-1, PROCESSOR_FAILED) if i in errors else choose(processed, batch.rows[i])
    if batch.logprobs is None:
        return Sampled(ids, status, errors=errors)
    k = max(int(batch.logprobs.max(initial=0)), 0)
    found = np.full(count, np.nan, np.float32)
    top = np.full((count, k), -1, np.int32), np.full((count, k), LOGPROB_FLOOR, np.float32)
    for i in np.flatnonzero(batch.logprobs >= 0).tolist():
        values, wanted = logprobs(logits[i]), min(int(batch.logprobs[i]), vocabulary)
        listed = int(batch.listed(ids)[i])
        found[i] = values[listed] if listed >= 0 else LOGPROB_FLOOR
        if np.isfinite(logits[i].max()) and wanted:
            top[0][i, :wanted] = np.argsort(-logits[i], kind="stable")[:wanted]
            top[1][i, :wanted] = values[top[0][i, :wanted]]
    return Sampled(ids, status, found, top if k else None, errors)
