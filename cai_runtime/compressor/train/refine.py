"""One block after another: compressed for the inputs that the compressed blocks before it give, then trained as a whole
to give the dense block's output.

Shifted inputs. The layers before have been compressed, so a layer gets x' where the dense one got x. What it is to say
is still W x: the matrix that comes closest to that, given x', is W (mean x x'^T) (mean x' x'^T)^-1 ("Dobi-SVD", Wang, Ke,
Tomizuka, Zhu and Xu, 2025; "AA-SVD" and others name the same least squares). Both means are damped, which draws it to W
where the calibration text says little.

Block refinement. All cores of a block, in their rounding, are trained together by gradient descent so that the block's
output comes closest to the dense model's (Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang and Gu, "BRECQ: Pushing the limit of
post-training quantization by block reconstruction", 2021). An error counts by what it does to the loss: the metric is
the damped mean of g g^T, g the loss gradient at the block's output. Some sequences are set aside, and the error on them is
what counts: a block learns a small text by heart (a Whisper decoder's few thousand tokens within two epochs), and is worse
on any other for it.
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

SET_ASIDE = 8  # one batch of so many is not trained on


class ShiftedMoments:
    """Sums over pairs of rows x (of the dense model) and x' (of the compressed one), [rows, in] each."""

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
        """[in, in], fp64: W times this is what stands for W on the shifted inputs."""
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
    """Train `parameters` so that the block gives `targets` on `inputs`; of the states before and after each epoch that one
    is kept which is best on the last eighth of the batches, which are not trained on (of fewer than eight, none is set
    aside, and all are what counts).

    calls, inputs, targets: one for each batch, [batch, tokens, hidden]. metric: [hidden, hidden], fp64, symmetric and
    positive definite. inputs_metrics: of the optimizer, see `WhitenedMuon`. rate: of its first step, if nothing were right:
    it goes with the root of the error before, and falls to 0 along a cosine. seed: of the batches' order. mixed: whether an
    fp32 block is run in mixed precision. tick: called after each of `refine_steps`.

    Returns the error before and after, on the batches that count: the mean squared error in the metric over the mean square
    of the targets' distance from the inputs in it.
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
    """How many steps `refine_block` takes."""
    return epochs * _learned(batches)


def _learned(batches: int) -> int:
    return batches - batches // SET_ASIDE
