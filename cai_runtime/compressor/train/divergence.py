"""The divergence of a student's distribution from a teacher's, and its gradient, in memory that is used again.

Of a vocabulary of 50,000 the logits of 256 positions are 50 MB, a dozen times over if autograd runs the softmax, its
logarithm, the divergence and their gradients; and memory of that size is had from the system, and given back, each time.
Here the gradient is written down: for logits z of the student, d KL(p || softmax z) / dz = softmax z - p.
"""

from __future__ import annotations

import torch

LEAST = -1e4  # nats: a model may give a token no chance at all, whose logarithm times that chance would be no number


class Divergence:
    """Kullback-Leibler divergence of softmax(`found`) from softmax(`wanted`), in nats, over fp32 buffers that stay."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Of the logits of some positions, [positions, vocabulary], any float dtype: the sum over the positions, and its
        gradient at `found`, [positions, vocabulary] fp32, which is there until the next call."""
        a, b, c = self._room(found)
        log_q = torch.log_softmax(a.copy_(found.detach()), -1, out=b).clamp_(min=LEAST)
        log_p = torch.log_softmax(a.copy_(wanted), -1, out=c).clamp_(min=LEAST)
        p = torch.exp(log_p, out=a)
        total = float(log_p.sub_(log_q).mul_(p).sum())
        return total, log_q.exp_().sub_(p)

    def _room(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Three buffers of its shape."""
        count = like.numel()
        if not self._buffers or self._buffers[0].numel() < count or self._buffers[0].device != like.device:
            self._buffers = [torch.empty(count, dtype=torch.float32, device=like.device) for _ in range(3)]
        return [buffer[:count].view(like.shape) for buffer in self._buffers]
