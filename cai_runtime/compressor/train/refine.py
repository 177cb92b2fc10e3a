"""Correction for shifted inputs, and block refinement.

Shifted inputs. Behind compressed layers, a layer reads x' where the dense model reads x. Its output should still be W x. The
least-squares weight on x' is

    W (mean x x'^T) (mean x' x'^T)^-1

("Dobi-SVD", Wang, Ke, Tomizuka, Zhu and Xu, 2025; "AA-SVD" and others use the same solution). Damping both means pulls the
result towards W in directions with little calibration data.

Block refinement. All cores of a block, rounded in every forward pass, are trained together to reproduce the dense block's
output (Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang and Gu, "BRECQ: Pushing the limit of post-training quantization by block
reconstruction", 2021). The error metric is the damped mean of g g^T, g the loss gradient at the block's output. The best
state is selected on held-out batches. A block overfits small texts: a Whisper decoder memorizes a few thousand tokens within
two epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from cai_runtime.compressor.factor.decompose import INPUT_DAMPING
from cai_runtime.compressor.stats.block_stack import Call
from cai_runtime.compressor.stats.moments import GramSum
from cai_runtime.compressor.train.optimizer import Metric, WhitenedMuon

SET_ASIDE = 8  # one batch in this many is held out


class ShiftedMoments:
    """Second moments over pairs of rows x (dense model) and x' (compressed model), [rows, in] each."""

    def __init__(self, features: int, device: torch.device):
        self._own = GramSum(features, device)
        self._cross = torch.zeros(features, features, dtype=torch.float64, device=device)

    def add(self, dense: torch.Tensor, shifted: torch.Tensor) -> None:
        x, y = dense.reshape(-1, dense.shape[-1]).float(), shifted.reshape(-1, shifted.shape[-1]).float()
        self._own.add(y)
        self._cross += x.mT @ y

    @property
    def rows(self) -> int:
        return self._own.rows

    def gram(self) -> torch.Tensor:
        """Mean x' x'^T, [in, in], fp64."""
        return self._own.mean()

    def correction(self) -> torch.Tensor:
        """C [in, in], fp64: W C is the least-squares weight on the shifted inputs. The identity if all inputs were 0."""
        gram, cross = self.gram(), self._cross / max(self._own.rows, 1)
        ridge = INPUT_DAMPING * float(gram.diagonal().mean())
        if ridge == 0:
            return torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
        gram.diagonal().add_(ridge)
        cross.diagonal().add_(ridge)
        return torch.cholesky_solve(cross.mT, torch.linalg.cholesky(gram)).mT


def refine_block(
    block: nn.Module,
    parameters: Sequence[nn.Parameter],
    calls: Sequence[Call],
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    metric: torch.Tensor,
    *,
    inputs_metrics: Mapping[nn.Parameter, Metric],
    epochs: int,
    rate: float,
    seed: int,
    mixed: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Train `parameters` in place so that the block maps `inputs` to `targets`.

    The last eighth of the batches is held out. Of the states before training and after each epoch, the one with the least
    held-out error is kept. With fewer than eight batches none is held out, and the error is taken over all of them.

    Args:
        calls: one per batch, the block's arguments beside the hidden states.
        inputs, targets: one per batch, [batch, tokens, hidden].
        metric: [hidden, hidden], fp64, symmetric positive definite.
        inputs_metrics: metrics for `WhitenedMuon`, by parameter.
        epochs: passes over the batches that are not held out.
        rate: learning rate at a relative error of 1. The initial rate is rate * sqrt(min(initial error, 1)); cosine decay
            to 0.
        seed: of the order of the batches.
        mixed: run an fp32 block in mixed precision.
        tick: called after each of the `refine_steps` steps.

    Returns the held-out error before and after, sum ||targets - outputs||^2 / sum ||targets - inputs||^2 in the metric.
    """
    root = torch.linalg.cholesky(metric).float()
    learned = range(_learned(len(inputs)))
    held = range(len(learned), len(inputs)) or learned

    def distance(of: Sequence[int]) -> float:
        total = sum(float(((targets[n] - inputs[n]).float() @ root).square().sum()) for n in of)
        return max(total, torch.finfo(torch.float32).tiny)

    scale = distance(learned) / len(learned)
    held_scale = distance(held)

    def error(number: int) -> torch.Tensor:
        with torch.autocast(inputs[number].device.type, torch.bfloat16, enabled=mixed):
            found = calls[number](block, inputs[number])
        difference = found - targets[number]
        return (difference.float() @ root).square().sum()

    def judged() -> float:
        with torch.no_grad():
            return sum(float(error(number)) for number in held) / held_scale

    begin = least = judged()
    optimizer = WhitenedMuon(parameters, rate * min(begin, 1.0) ** 0.5, inputs_metrics)
    generator = torch.Generator().manual_seed(seed)
    best = [p.detach().clone() for p in parameters]
    steps = refine_steps(epochs, len(inputs))
    for step in range(steps):
        if step % len(learned) == 0:
            order = torch.randperm(len(learned), generator=generator).tolist()
        optimizer.set_rate(0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.enable_grad():
            (error(order[step % len(learned)]) / scale).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % len(learned) == 0:
            now = judged()
            if now < least:
                least = now
                for kept, p in zip(best, parameters, strict=True):
                    kept.copy_(p.detach())
        tick()
    with torch.no_grad():
        for kept, p in zip(best, parameters, strict=True):
            p.copy_(kept)
    return begin, least


def refine_steps(epochs: int, batches: int) -> int:
    """Number of steps of `refine_block`."""
    return epochs * _learned(batches)


def _learned(batches: int) -> int:
    return batches - batches // SET_ASIDE
