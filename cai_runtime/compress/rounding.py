"""Rounding cores to 8 bits so that the outputs, not the numbers, change least.

Rounded one column at a time, each column's error is made up for by the columns still to come, as far as their inputs are
correlated (Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", 2023). It matters for core_1: its inputs are a few hundred outputs of core_0, strongly correlated.
"""

from __future__ import annotations

import torch

from cai_runtime.slim.module import CoreData
from cai_runtime.slim.stores import INT8_MAX

DAMPING = 1e-2  # of the mean diagonal
BLOCK = 128  # columns whose feedback is applied one by one; beyond them, by one matrix product a block


def round_int8(core: torch.Tensor, input_gram: torch.Tensor) -> CoreData:
    """core: [rows, columns], any float; input_gram: [columns, columns], mean of z z^T of the core's inputs z.

    The scales are those of plain rounding (max |row| / 127).
    """
    w = core.to(torch.float32).clone()
    rows, columns = w.shape
    scale = (w.abs().amax(dim=1) / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=w.device)
    feedback = _feedback(input_gram)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(rows, stop - start, device=w.device)
        for k in range(start, stop):
            code = (w[:, k] / scale).round_().clamp_(-INT8_MAX, INT8_MAX)
            codes[:, k] = code.to(torch.int8)
            errors[:, k - start] = (w[:, k] - code * scale) / feedback[k, k]
            w[:, k + 1 : stop].addr_(errors[:, k - start], feedback[k, k + 1 : stop], alpha=-1)
        w[:, stop:].addmm_(errors, feedback[start:stop, stop:], alpha=-1)
    return CoreData(codes, scale, "int8")


def _feedback(gram: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor, fp32, of the inverse of the damped Gram matrix: row k tells how column k's error, divided by
    [k, k], is shared out over the columns after it."""
    gram = gram.to(torch.float64)
    mean = float(gram.diagonal().mean())
    eye = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + (DAMPING * mean or 1.0) * eye))
    return torch.linalg.cholesky(inverse, upper=True).float()
