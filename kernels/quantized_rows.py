"""int8 activations (W8A8, opt-in): each row of x is rounded to int8 with a scale of its own before an int8 core.

Dynamic and symmetric, per row (Dettmers et al. 2022, without the outlier split): the sums of an int8 core are then exact in
int32, and one multiplication by both scales makes them real. What it costs in accuracy depends on the model's outliers,
which is why it is never a default.
"""

from __future__ import annotations

import torch


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] float -> codes int8 [M, K] in -127 to 127 and scale fp32 [M], so that x is about codes * scale[:, None].

    scale = max|row| / 127; a row of zeros has scale 0 and codes 0. Halves round to even.
    """
    wide = x.float()
    peak = wide.abs().amax(dim=1) if x.shape[1] else wide.new_zeros(x.shape[0])
    # A tensor divided by a tensor: torch makes 127.0 / peak a multiplication by the reciprocal, which rounds twice.
    inverse = torch.where(peak > 0, torch.full_like(peak, 127.0) / peak, torch.zeros_like(peak))
    codes = (wide * inverse[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes, peak / 127.0


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """x as an int8 core sees it, in x's dtype: for the reference."""
    codes, scale = quantize_rows(x)
    return codes.to(x.dtype) * scale.to(x.dtype)[:, None]
