"""Rounds cores to 8 or 4 bits with error feedback, to minimize the error of the outputs.

Columns are rounded in order. The error of each is compensated by the later columns, as far as their inputs are correlated
(Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", 2023). At 8 bits this matters for core_1, whose inputs are strongly correlated outputs of core_0. At 4 bits it
matters for every core.
"""

from __future__ import annotations

import torch

from cai_runtime.compressor.factor.decompose import damped
from cai_runtime.slim.int4 import MAX_CODE, fit_groups, pack
from cai_runtime.slim.spec import STORES
from cai_runtime.slim.stores import INT8_MAX, CoreData, quantize

DAMPING = 1e-2  # of the mean diagonal
# Within a block of this many columns, feedback is applied column by column, beyond it by one matrix product. A multiple of
# every group size.
BLOCK = 128


def round_with_feedback(core: torch.Tensor, input_gram: torch.Tensor, store: str) -> CoreData:
    """The core in `store`, rounded with error feedback.

    int8: scales as in plain rounding, max |row| / 127. int4: a group's scale and zero point are fitted when its first column
    is reached, to the values after feedback, weighted by `_costs`.

    core: [rows, columns], any float dtype. input_gram: [columns, columns], the mean of z z^T of the core's inputs z. store:
    int8 or an int4 store.
    """
    kind = STORES[store]
    w = core.to(torch.float32).clone()
    rows, columns = w.shape
    feedback = _feedback(input_gram)
    weights = _costs(feedback)
    weights = weights / weights.mean()
    codes = torch.empty(rows, columns, dtype=torch.uint8 if kind.group else torch.int8, device=w.device)
    scale = (w.abs().amax(dim=1) / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    zero, least, most = torch.zeros_like(scale), -INT8_MAX, INT8_MAX
    scales, zeros = [], []
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(rows, stop - start, dtype=w.dtype, device=w.device)
        for k in range(start, stop):
            if kind.group and k % kind.group == 0:
                end = min(k + kind.group, columns)
                narrow, zero = fit_groups(w[:, k:end], kind.zeros, weights[k:end])
                scales.append(narrow)
                zeros.append(zero.to(torch.uint8))
                scale, least, most = narrow.float(), 0, MAX_CODE
            code = ((w[:, k] / scale).round_() + zero).clamp_(least, most)
            codes[:, k] = code.to(codes.dtype)
            errors[:, k - start] = (w[:, k] - (code - zero) * scale) / feedback[k, k]
            w[:, k + 1 : stop].addr_(errors[:, k - start], feedback[k, k + 1 : stop], alpha=-1)
        w[:, stop:].addmm_(errors, feedback[start:stop, stop:], alpha=-1)
    if not kind.group:
        return CoreData(codes, scale, store)
    found = torch.stack(zeros, dim=1) if kind.zeros else None
    return CoreData(pack(codes), torch.stack(scales, dim=1), store, found, (rows, columns))


def rounding_ridge(core: torch.Tensor, input_gram: torch.Tensor, store: str) -> float:
    """The ridge for fitting a core that will be rounded: expected squared output error of rounding / sum of core^2.

    Rounding errors grow with the numbers of the core, so that the best fit before rounding is a ridge regression. Arguments
    as in `round_with_feedback`.
    """
    rounded = quantize(core.float(), store).values()
    share = float((rounded - core).square().sum() / core.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
    return share * float(_costs(_feedback(input_gram)).mean())


def _costs(feedback: torch.Tensor) -> torch.Tensor:
    """[columns]: the cost of a squared error in each column after optimal compensation by the later columns. It is the
    variance of the column's input conditioned on theirs."""
    return feedback.diagonal().square().reciprocal()


def _feedback(gram: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor U of the inverse of the damped Gram matrix, fp32. Column k's error, divided by U[k, k], is
    distributed over the later columns with weights U[k, k + 1 :]."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, DAMPING)))
    return torch.linalg.cholesky(inverse, upper=True).float()
