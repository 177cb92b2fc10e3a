"""4-bit codes in groups: two to a byte, and the scale (and zero point) of each group of columns.

value = (code - zero) * scale, codes 0 to 15, the scale bf16 and positive, the zero point an integer from 0 to 15 (8 where
the store has none). The scale is rounded to bf16 before the codes are computed, so that they make up for its rounding.
"""

from __future__ import annotations

import torch

MAX_CODE = 15
SYMMETRIC_ZERO = 8  # codes stand for -8 .. 7
_SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny  # of a group of zeros or denormals: no division by zero
# A narrower range than the group's own is finer for the many small values and clips the few large ones; which one is best
# is tried out. A wider one is best when the values happen to lie on its grid.
_RANGES = tuple(1.05 - 0.5 * k / 20 for k in range(21))
_CHUNK = 1 << 18  # values whose candidates are tried at once: the temporaries stay in the cache


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [rows, columns] -> uint8 [rows, ceil(columns / 2)]: column 2 j in the low half of byte j, 2 j + 1 in the
    high half, which is zero behind an odd last column."""
    data = codes[:, ::2].clone()
    data[:, : codes.shape[1] // 2] |= codes[:, 1::2] << 4
    return data.contiguous()


def unpack(data: torch.Tensor, columns: int) -> torch.Tensor:
    """The codes, uint8 [rows, columns], of what `pack` made."""
    return torch.stack([data & MAX_CODE, data >> 4], dim=-1).flatten(1)[:, :columns]


def fit_groups(
    values: torch.Tensor, zeros: bool, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the zero point with which a group's values are rounded best, in (weighted) squared error.

    values: fp32 [..., group], finite. zeros: choose zero points; otherwise they are 8. weights: [group], what a squared
    error in each place counts; None: the same everywhere. Returns two tensors [...]: the scale, bf16, and the zero point,
    fp32 with an integer from 0 to 15.
    """
    low, high = values.amin(-1).clamp_max(0), values.amax(-1).clamp_min(0)
    if zeros:
        whole = high / MAX_CODE - low / MAX_CODE
        middle = torch.where(whole > 0, (-low / whole.clamp_min(_SMALLEST_SCALE)).round(), SYMMETRIC_ZERO)
        middle = middle.clamp(0, MAX_CODE)
        shifts: tuple[float, ...] = (-1.0, 0.0, 1.0)  # a range may be clipped on one side alone
    else:
        whole = torch.maximum(-low / SYMMETRIC_ZERO, high / (MAX_CODE - SYMMETRIC_ZERO))
        middle = torch.full_like(whole, SYMMETRIC_ZERO)
        shifts = (0.0,)
    best_scale, best_zero = torch.empty_like(whole), torch.empty_like(whole)
    least = torch.full_like(whole, torch.inf)
    for share in _RANGES:
        scale = (whole * share).clamp_min(_SMALLEST_SCALE).bfloat16().float()
        steps = (values / scale[..., None]).round_()
        for shift in shifts:
            zero = (middle + shift).clamp(0, MAX_CODE) if zeros else middle
            kept = torch.minimum(torch.maximum(steps, -zero[..., None]), (MAX_CODE - zero)[..., None])
            # In units of the whole range: a square of the values' own size may leave fp32's range.
            unit = whole.clamp_min(_SMALLEST_SCALE)
            error = (kept * (scale / unit)[..., None] - values / unit[..., None]).square_()
            total = error.sum(-1) if weights is None else error @ weights
            better = total < least
            least = torch.where(better, total, least)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale.bfloat16(), best_zero


def quantize_int4(
    matrix: torch.Tensor, group: int, zeros: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Round every value to the nearest of its group's. matrix: fp32 [rows, columns], finite.

    Returns data uint8 [rows, ceil(columns / 2)], scale bf16 [rows, ceil(columns / group)], and zero, uint8 of the scale's
    shape, or None unless `zeros`.
    """
    rows, columns = matrix.shape
    groups = -(-columns // group)
    data = torch.empty(rows, -(-columns // 2), dtype=torch.uint8, device=matrix.device)
    scale = torch.empty(rows, groups, dtype=torch.bfloat16, device=matrix.device)
    zero = torch.empty(rows, groups, dtype=torch.uint8, device=matrix.device)
    at_once = max(1, _CHUNK // max(1, groups * group))
    for start in range(0, rows, at_once):
        part = slice(start, min(start + at_once, rows))
        # Filled up with zeros, which widen no range and are rounded without an error.
        values = torch.nn.functional.pad(matrix[part], (0, groups * group - columns)).unflatten(1, (groups, group))
        scale[part], middle = fit_groups(values, zeros)
        steps = (values / scale[part].float()[..., None]).round_()
        codes = (steps + middle[..., None]).clamp_(0, MAX_CODE).to(torch.uint8)
        data[part], zero[part] = pack(codes.flatten(1)[:, :columns]), middle.to(torch.uint8)
    return data, scale, zero if zeros else None


def dequantize_int4(
    data: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    columns: int,
    group: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The matrix [rows, columns] in a float dtype. Arguments as `quantize_int4` returns them."""
    codes = unpack(data, columns).to(dtype)

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).repeat_interleave(group, dim=1)[:, :columns]

    return (codes - (SYMMETRIC_ZERO if zero is None else spread(zero))) * spread(scale)
