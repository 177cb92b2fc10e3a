"""Sampling on the device: the definition of kernels/sampling.py, the same tokens as the CPU's. Ids come to the host, and the
logprobs that are wanted.

One program per row. It reads the row several times, from the second-level cache: greatest logit, weights, then one pass for
each halving of the range in which the k-th greatest logit (top_k) or the least kept weight (top_p) lies. No sort, and no
result depends on the number of rows or on the block size, as all sums are of integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from cai_runtime.errors import KernelError
from cai_runtime.kernels.sampling import RowTables, Sampled, SamplingBatch, logprobs_of_rows, sample_cpu
from cai_runtime.kernels.triton.checks import check_tensor
from cai_runtime.kernels.triton.launch import on_device
from cai_runtime.kernels.triton.logprobs import DeviceLogprobs, row_numbers
from cai_runtime.kernels.triton.weigh import INFINITY, OPTIONS, block_of, key, logit_of, weigh

_OK, _NOT_FINITE, _NOTHING_ALLOWED, _BAD_TOKEN = (tl.constexpr(status) for status in range(4))


@triton.jit
def _count_from(logits, vocabulary, lowest, BLOCK: tl.constexpr):
    """How many logits have a key of at least `lowest`."""
    at = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, vocabulary, BLOCK):
        ok = start + at < vocabulary
        bits = tl.load(logits + start + at, mask=ok, other=0).to(tl.int32, bitcast=True)
        count += (ok & (key(bits) >= lowest)).to(tl.int32)
    return tl.sum(count, axis=0).to(tl.int64)


@triton.jit
def _sum_from(weights, vocabulary, lowest, BLOCK: tl.constexpr):
    """The sum of the weights of at least `lowest`."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in range(0, vocabulary, BLOCK):
        w = tl.load(weights + start + at, mask=start + at < vocabulary, other=0)
        total += tl.where(w >= lowest, w, 0).to(tl.int64)
    return tl.sum(total, axis=0)


@triton.jit
def sample_kernel(
    logits, shares, numbers, limits, penalty_start, penalty_token, penalty_count, bias_start, bias_token, bias, mask,
    weights, ids, statuses, vocabulary, ld, mask_words, BLOCK: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Logits [rows, vocabulary] are overwritten; weights is scratch of the same shape. See `DeviceBatch` for the rest."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * ld
    weights += row * vocabulary
    inverse_temperature = tl.load(numbers + row * 4)
    repetition = tl.load(numbers + row * 4 + 1)
    frequency = tl.load(numbers + row * 4 + 2)
    presence = tl.load(numbers + row * 4 + 3)
    top_k = tl.load(limits + row * 2)
    min_weight = tl.load(limits + row * 2 + 1).to(tl.int64)
    uniform = tl.load(shares + row * 2)
    top_p = tl.load(shares + row * 2 + 1)

    entry = tl.arange(0, TABLE)
    bad = tl.zeros((TABLE,), dtype=tl.int32)
    end = tl.load(penalty_start + row + 1)
    for start in range(tl.load(penalty_start + row), end, TABLE):
        ok = start + entry < end
        token = tl.load(penalty_token + start + entry, mask=ok, other=0)
        count = tl.load(penalty_count + start + entry, mask=ok, other=0).to(tl.float32)
        outside = (token < 0) | (token >= vocabulary)
        bad |= outside.to(tl.int32)
        ok &= ~outside
        logit = tl.load(logits + token, mask=ok, other=0.0)
        logit = tl.where(logit > 0, tl.div_rn(logit, repetition), logit * repetition)
        logit = tl.where(count > 0, logit - (count * frequency + presence), logit)
        tl.store(logits + token, logit, mask=ok)
    tl.debug_barrier()  # the same token may be in both tables
    end = tl.load(bias_start + row + 1)
    for start in range(tl.load(bias_start + row), end, TABLE):
        ok = start + entry < end
        token = tl.load(bias_token + start + entry, mask=ok, other=0)
        value = tl.load(bias + start + entry, mask=ok, other=0.0)
        outside = (token < 0) | (token >= vocabulary)
        bad |= outside.to(tl.int32)
        ok &= ~outside
        logit = tl.load(logits + token, mask=ok, other=0.0)
        tl.store(logits + token, tl.where(value == float("-inf"), value, logit + value), mask=ok)
    tl.debug_barrier()

    at = tl.arange(0, BLOCK)
    keys = tl.full((BLOCK,), -2147483648, dtype=tl.int32)
    magnitudes = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, vocabulary, BLOCK):
        ok = start + at < vocabulary
        logit = tl.load(logits + start + at, mask=ok, other=float("-inf"))
        if mask is not None:
            word = tl.load(mask + row * mask_words + ((start + at) >> 5), mask=ok, other=0)
            logit = tl.where(((word >> ((start + at) & 31)) & 1) != 0, logit, float("-inf"))
            tl.store(logits + start + at, logit, mask=ok)
        bits = logit.to(tl.int32, bitcast=True)
        keys = tl.maximum(keys, key(bits))
        magnitudes = tl.maximum(magnitudes, bits & 0x7FFFFFFF)
    tl.debug_barrier()
    best = tl.max(keys, axis=0)
    status = tl.where(best == -INFINITY, _NOTHING_ALLOWED, _OK)
    status = tl.where((best == INFINITY) | (tl.max(magnitudes, axis=0) > INFINITY), _NOT_FINITE, status)
    status = tl.where(tl.max(bad, axis=0) > 0, _BAD_TOKEN, status)

    found = tl.full((BLOCK,), 2147483647, dtype=tl.int32)
    if status == _OK:
        if inverse_temperature == 0:
            for start in range(0, vocabulary, BLOCK):
                ok = start + at < vocabulary
                bits = tl.load(logits + start + at, mask=ok, other=0.0).to(tl.int32, bitcast=True)
                found = tl.minimum(found, tl.where(ok & (key(bits) == best), start + at, 2147483647))
        else:
            low = tl.full((), -2147483648, dtype=tl.int64)
            if (top_k > 0) & (top_k < vocabulary):
                # The greatest key that top_k logits reach.
                low = tl.full((), -INFINITY, dtype=tl.int64)
                high = best.to(tl.int64)
                while low < high:
                    middle = high - (high - low) // 2
                    enough = _count_from(logits, vocabulary, middle, BLOCK) >= top_k
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle - 1)
            greatest = logit_of(best)
            sums = tl.zeros((BLOCK,), dtype=tl.int64)
            for start in range(0, vocabulary, BLOCK):
                ok = start + at < vocabulary
                logit = tl.load(logits + start + at, mask=ok, other=float("-inf"))
                kept = key(logit.to(tl.int32, bitcast=True)) >= low
                w = tl.where(kept, weigh(logit, greatest, inverse_temperature), 0)
                tl.store(weights + start + at, w, mask=ok)
                sums += w.to(tl.int64)
            total = tl.sum(sums, axis=0)
            tl.debug_barrier()
            # Weights above `cut` stay, and the first `ties` of those equal to it.
            cut = tl.full((), 0, dtype=tl.int64)
            ties = tl.full((), 0, dtype=tl.int64)
            if top_p < 1.0:
                product = top_p * total.to(tl.float64)
                target = product.to(tl.int64)
                target += (target.to(tl.float64) < product).to(tl.int64)
                target = tl.minimum(tl.maximum(target, 1), total)
                cut = (total - target) // vocabulary + 1  # lighter tokens weigh no more than what is left out
                high = tl.full((), 1 << 30, dtype=tl.int64)
                while cut < high:
                    middle = high - (high - cut) // 2
                    enough = _sum_from(weights, vocabulary, middle, BLOCK) >= target
                    cut = tl.where(enough, middle, cut)
                    high = tl.where(enough, high, middle - 1)
                ties = (target - _sum_from(weights, vocabulary, cut + 1, BLOCK) + cut - 1) // cut
            if min_weight > cut:
                cut = min_weight - 1
                ties = tl.full((), 0, dtype=tl.int64)
            total = _sum_from(weights, vocabulary, cut + 1, BLOCK) + ties * cut
            left = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
            running = tl.full((), 0, dtype=tl.int64)
            ties_before = tl.full((), 0, dtype=tl.int64)
            for start in range(0, vocabulary, BLOCK):
                ok = start + at < vocabulary
                w = tl.load(weights + start + at, mask=ok, other=0).to(tl.int64)
                tie = (ok & (w == cut)).to(tl.int64)
                first = ties_before + tl.cumsum(tie, axis=0) <= ties
                kept = tl.where((w > cut) | ((tie > 0) & first), w, 0)
                ends = running + tl.cumsum(kept, axis=0)
                found = tl.minimum(found, tl.where(ok & (ends > left), start + at, 2147483647))
                running += tl.sum(kept, axis=0)
                ties_before += tl.sum(tie, axis=0)
    token = tl.min(found, axis=0)
    tl.store(ids + row, tl.where(status == _OK, token, -1))
    tl.store(statuses + row, status.to(tl.uint8))


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """A `SamplingBatch` of `rows` rows on a device.

    shares: fp64 [rows, 2]: uniform, top_p. numbers: fp32 [rows, 4]: inverse temperature, repetition, frequency, presence.
    limits: int32 [rows, 2]: top_k, min_weight. penalty_*: int32; row r's entries are penalty_start[r] to
    penalty_start[r + 1]. bias_*: likewise, the biases fp32. mask: int32 [rows, words] or None.
    """

    rows: int
    shares: torch.Tensor
    numbers: torch.Tensor
    limits: torch.Tensor
    penalty_start: torch.Tensor
    penalty_token: torch.Tensor
    penalty_count: torch.Tensor
    bias_start: torch.Tensor
    bias_token: torch.Tensor
    bias: torch.Tensor
    mask: torch.Tensor | None

    @classmethod
    def of(cls, batch: SamplingBatch, device: torch.device) -> DeviceBatch:
        """Copied to the device in one piece."""
        rows, tables = batch.rows, batch.tables
        columns = [
            np.stack([rows["uniform"], rows["top_p"]], axis=1),
            np.stack([rows[name] for name in ("inverse_temperature", "repetition", "frequency", "presence")], axis=1),
            np.stack([rows["top_k"], rows["min_weight"]], axis=1),
            _starts([len(t.penalty_tokens) for t in tables]),
            _joined(tables, "penalty_tokens"),
            _joined(tables, "penalty_counts"),
            _starts([len(t.bias_tokens) for t in tables]),
            _joined(tables, "bias_tokens"),
            _joined(tables, "biases"),
        ]
        if batch.mask is not None:
            columns.append(batch.mask.view(np.int32))
        ends = np.cumsum([-(-column.nbytes // 16) * 16 for column in columns])
        packed = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda", device="cpu")
        there = torch.empty(int(ends[-1]), dtype=torch.uint8, device=device)
        views = []
        for column, begin in zip(columns, [0, *ends[:-1]], strict=True):
            packed[begin : begin + column.nbytes].numpy()[:] = column.reshape(-1).view(np.uint8)
            view = there[begin : begin + column.nbytes].view(_DTYPES[column.dtype.str]).view(column.shape)
            views.append(view)
        there.copy_(packed, non_blocking=True)
        return cls(len(rows), *views[:9], views[9] if batch.mask is not None else None)


_DTYPES = {"<f8": torch.float64, "<f4": torch.float32, "<i4": torch.int32}


def _starts(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


def _joined(tables: Sequence[RowTables], name: str) -> np.ndarray:
    """One table after the other; never empty, so that its address is valid."""
    arrays = [getattr(t, name) for t in tables]
    return np.concatenate([*arrays, np.zeros(1, arrays[0].dtype if arrays else np.int32)])


def launch_sample(
    logits: torch.Tensor, batch: DeviceBatch, weights: torch.Tensor, ids: torch.Tensor, status: torch.Tensor
) -> None:
    """Choose a token from each row, without waiting: tensors of one device in, so that a CUDA graph can hold it.

    logits: fp32 [rows, vocabulary], overwritten. weights: int32, scratch of at least as many elements. ids: int32 [rows],
    -1 where the status is not OK. status: uint8 [rows]. Raises KernelError for a tensor that doesn't fit."""
    device, shape = logits.device, (batch.rows, logits.shape[1] if logits.dim() == 2 else None)
    check_tensor("logits", logits, shape=shape, device=device, dtypes=(torch.float32,))
    check_tensor("ids", ids, shape=(batch.rows,), device=device, dtypes=(torch.int32,))
    check_tensor("status", status, shape=(batch.rows,), device=device, dtypes=(torch.uint8,))
    check_tensor("weights", weights, shape=(None,), device=device, dtypes=(torch.int32,))
    rows, vocabulary = logits.shape
    if weights.numel() < rows * vocabulary:
        raise KernelError(f"weights has {weights.numel()} elements, logits {rows * vocabulary}")
    words = -(-vocabulary // 32)
    if batch.mask is not None:
        check_tensor("mask", batch.mask, shape=(rows, words), device=device, dtypes=(torch.int32,))
    if rows == 0:
        return
    with on_device(logits):
        sample_kernel[(rows,)](
            logits, batch.shares, batch.numbers, batch.limits, batch.penalty_start, batch.penalty_token,
            batch.penalty_count, batch.bias_start, batch.bias_token, batch.bias, batch.mask, weights, ids, status,
            vocabulary, logits.stride(0), words, block_of(vocabulary), 256, **OPTIONS,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class SampledOnDevice:
    """Tokens that a device is choosing, and those of `host_rows` (row numbers) that the host has chosen. `wait` brings them
    together on the host.

    tensors: "ids" int32 [rows], "status" uint8 [rows], and where `wanted` (`SamplingBatch.logprobs`) is not
    None what `DeviceLogprobs.of` gives for the other rows that want logprobs."""

    tensors: Mapping[str, torch.Tensor]
    wanted: np.ndarray | None
    host_rows: np.ndarray
    by_host: Sampled | None

    @property
    def ids(self) -> torch.Tensor:
        return self.tensors["ids"]

    def wait(self) -> Sampled:
        """Raises what the device reports."""
        others = dict(self.tensors)
        ids, status = (others.pop(name).cpu().numpy() for name in ("ids", "status"))
        host, rows = self.by_host, self.host_rows
        errors: dict[int, Exception] = {}
        if host is not None:
            ids[rows], status[rows] = host.ids, host.status
            errors = {int(rows[i]): error for i, error in host.errors.items()}
        if self.wanted is None:
            return Sampled(ids, status, errors=errors)
        scored = np.setdiff1d(np.flatnonzero(self.wanted >= 0), rows)
        logprobs, top = logprobs_of_rows(len(ids), row_numbers(scored, others), self.wanted)
        if host is not None and host.logprobs is not None:
            logprobs[rows] = host.logprobs
            if top is not None and host.top is not None:
                k = host.top[0].shape[1]
                top[0][rows, :k], top[1][rows, :k] = host.top
        return Sampled(ids, status, logprobs, top, errors)


class TritonSampler:
    """Samples on a device, with scratch memory that it keeps between calls. Rows that have a logits processor are copied to
    the host and sampled there."""

    def __init__(self, device: torch.device):
        self._device = device
        self._weights = torch.empty(0, dtype=torch.int32, device=device)

    def __call__(self, logits: torch.Tensor, batch: SamplingBatch) -> SampledOnDevice:
        """logits: fp32 [rows, vocabulary] on the device, overwritten. Raises KernelError for a batch that doesn't fit."""
        batch.check(tuple(logits.shape))
        on_host = np.zeros(len(batch), bool)
        on_host[list(batch.custom)] = True
        host_rows, by_host = np.flatnonzero(on_host), None
        if len(host_rows):
            theirs = logits[torch.from_numpy(host_rows).to(self._device)].cpu()
            by_host = sample_cpu(theirs, batch.take(host_rows))
        scored = None
        if batch.logprobs is not None:
            scored = DeviceLogprobs.begin(logits, batch, np.flatnonzero((batch.logprobs >= 0) & ~on_host))
        if self._weights.numel() < logits.numel():
            self._weights = torch.empty(logits.numel(), dtype=torch.int32, device=self._device)
        ids = torch.empty(len(batch), dtype=torch.int32, device=self._device)
        status = torch.empty(len(batch), dtype=torch.uint8, device=self._device)
        launch_sample(logits, DeviceBatch.of(batch, self._device), self._weights, ids, status)
        tensors = {"ids": ids, "status": status} | ({} if scored is None else scored.of(ids, batch))
        return SampledOnDevice(tensors, batch.logprobs, host_rows, by_host)
