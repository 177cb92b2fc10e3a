"""KL divergence of teacher and student with an explicit gradient, in reused buffers.

The logits of 256 positions over a vocabulary of 50,000 take 50 MB. Autograd would hold about twelve such tensors, and the
allocator returns blocks of that size to the system after each use. For student logits z the gradient is

    d KL(p || softmax z) / dz = softmax z - p.
"""

from __future__ import annotations

import torch

LEAST = -1e4  # nats: lower bound of log probabilities, because 0 * log 0 would be NaN


class Divergence:
    """KL(softmax `wanted` || softmax `found`) in nats. Holds three fp32 buffers of the largest logits seen."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The divergence summed over positions, and its gradient with respect to `found`.

        found, wanted: logits [positions, vocabulary] of student and teacher, any float dtype. The gradient is fp32
        [positions, vocabulary] and valid until the next call.
        """
        a, b, c = self._room(found)
        log_q = torch.log_softmax(a.copy_(found.detach()), -1, out=b).clamp_(min=LEAST)
        log_p = torch.log_softmax(a.copy_(wanted), -1, out=c).clamp_(min=LEAST)
        p = torch.exp(log_p, out=a)
        total = float(log_p.sub_(log_q).mul_(p).sum())
        return total, log_q.exp_().sub_(p)

    def _room(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Three fp32 buffers of the shape and device of `like`."""
        count = like.numel()
        if not self._buffers or self._buffers[0].numel() < count or self._buffers[0].device != like.device:
            self._buffers = [torch.empty(count, dtype=torch.float32, device=like.device) for _ in range(3)]
        return [buffer[:count].view(like.shape) for buffer in self._buffers]
