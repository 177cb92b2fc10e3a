"""Logprobs on the device, by the definition of kernels/sampling.py. A few numbers of a row come to the host, not the row.

A kernel finds each row's greatest logit and the sum of its weights, a whole number, and torch's topk the greatest logits,
as integers that hold the logit above and the token below, so that equal logits come by token. The host makes logprobs of
these numbers in the same way as of its own, so they are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from cai_runtime.kernels.sampling import RowNumbers, SamplingBatch
from cai_runtime.kernels.triton.launch import on_device
from cai_runtime.kernels.triton.weigh import INFINITY, OPTIONS, block_of, key, logit_of, weigh


@triton.jit
def row_totals_kernel(logits, greatest, total, vocabulary, ld, BLOCK: tl.constexpr):
    """Of each row of logits [rows, vocabulary] the greatest and the sum of the weights at temperature 1; 0 and 0 where a
    logit is NaN or +inf, or all are -inf. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * ld
    at = tl.arange(0, BLOCK)
    keys = tl.full((BLOCK,), -2147483648, dtype=tl.int32)
    magnitudes = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, vocabulary, BLOCK):
        logit = tl.load(logits + start + at, mask=start + at < vocabulary, other=float("-inf"))
        bits = logit.to(tl.int32, bitcast=True)
        keys = tl.maximum(keys, key(bits))
        magnitudes = tl.maximum(magnitudes, bits & 0x7FFFFFFF)
    best = tl.max(keys, axis=0)
    sums = tl.zeros((BLOCK,), dtype=tl.int64)
    first = tl.zeros((), dtype=tl.float32)
    if (best != -INFINITY) & (best != INFINITY) & (tl.max(magnitudes, axis=0) <= INFINITY):
        first = logit_of(best)
        for start in range(0, vocabulary, BLOCK):
            ok = start + at < vocabulary
            logit = tl.load(logits + start + at, mask=ok, other=float("-inf"))
            sums += tl.where(ok, weigh(logit, first, 1.0), 0).to(tl.int64)
    tl.store(greatest + row, first)
    tl.store(total + row, tl.sum(sums, axis=0))


def row_totals(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(greatest fp32 [rows], total int64 [rows]) of logits fp32 [rows, vocabulary], contiguous in the vocabulary."""
    rows, vocabulary = logits.shape
    greatest = torch.empty(rows, dtype=torch.float32, device=logits.device)
    total = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        with on_device(logits):
            row_totals_kernel[(rows,)](
                logits, greatest, total, vocabulary, logits.stride(0), block_of(vocabulary), **OPTIONS
            )
    return greatest, total


def top_tokens(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int32 [rows, k], logits fp32 [rows, k]): the k greatest of each row, falling, equal ones by id."""
    if k == 0:
        none = logits[:, :0]
        return none.int(), none
    bits = logits.view(torch.int32)
    sign = bits >> 31
    order = (((bits & 0x7FFFFFFF) ^ sign) - sign).long() << 32
    last = logits.shape[1] - 1
    order |= torch.arange(last, -1, -1, dtype=torch.int64, device=logits.device)
    ids = last - (order.topk(k, dim=1).values & 0xFFFFFFFF)
    return ids.int(), logits.gather(1, ids)


@dataclass(frozen=True, eq=False)
class DeviceLogprobs:
    """What the logprobs of the rows `which` need, on the device. Made before a step's logits are overwritten; `of` is called
    when the tokens are sampled."""

    which: np.ndarray
    at: torch.Tensor  # the same, on the device
    rows: torch.Tensor  # fp32 [w, vocabulary], as the model gave them
    numbers: Mapping[str, torch.Tensor]

    @classmethod
    def begin(cls, logits: torch.Tensor, batch: SamplingBatch, which: np.ndarray) -> DeviceLogprobs:
        assert batch.logprobs is not None
        at = torch.from_numpy(which).to(logits.device, non_blocking=True)
        rows = logits.index_select(0, at)
        greatest, total = row_totals(rows)
        numbers = {"greatest": greatest, "total": total}
        k = min(int(batch.logprobs[which].max(initial=0)), logits.shape[1])
        numbers["top_ids"], numbers["top_logits"] = top_tokens(rows, k)
        return cls(which, at, rows, numbers)

    def of(self, ids: torch.Tensor, batch: SamplingBatch) -> dict[str, torch.Tensor]:
        """The numbers, with those of the sampled ids int32 [rows of the step], or of the scored ones."""
        own = ids.index_select(0, self.at).long()
        if batch.scored is not None:
            scored = torch.from_numpy(batch.scored[self.which].astype(np.int64)).to(ids.device, non_blocking=True)
            own = torch.where(scored >= 0, scored, own)
        listed = self.rows.gather(1, own.clamp_min(0)[:, None])[:, 0]
        return {**self.numbers, "listed_ids": own.int(), "listed_logits": listed}


def row_numbers(which: np.ndarray, found: Mapping[str, torch.Tensor]) -> RowNumbers:
    """On the host. found: as `DeviceLogprobs.of` gives it, copied there or not."""
    return RowNumbers(which, **{name: tensor.cpu().numpy() for name, tensor in found.items()})
