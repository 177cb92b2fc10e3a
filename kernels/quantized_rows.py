"""int8 activations (W8A8): x is rounded to int8 before an int8 core, with a scale for each row or each group of columns.

Dynamic and symmetric (per row: Dettmers et al. 2022, without the outlier split; per group: Dai et al., "VS-Quant", 2021).
The sum over what shares a scale is one of whole numbers, exact in int32 and in any order. A scale for each row suits tensor
cores, but costs accuracy wherever a row has outliers, so the GPU's backends have it as an option. A scale for each 16
columns costs a CPU two instructions for every four of its products, and so little accuracy (docs/results.md) that it is the
default of the CPU's kernels where they are faster with it.
"""

from __future__ import annotations

import torch

CODE_GROUP = 16  # columns, of the CPU's kernels; csrc/cpu/kernels.h: kCodeGroup
MOST = {1: 127, 2: 127 * 254 + 127}  # by the codes of an element; csrc/cpu/kernels.h: kFineCodes
LEAST_PEAK = 2.0**-100  # a group whose greatest element is no more is zero, so that 127 / peak is finite


def quantize_rows(x: torch.Tensor, most: int = 127) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] float -> codes int8 [M, K] in -127 to 127 and scale fp32 [M], so that x is about codes * scale[:, None].

    scale = max|row| / 127; a row of zeros has scale 0 and codes 0. Halves round to even. most: instead of 127; above it
    codes are int16.
    """
    wide = x.float()
    peak = wide.abs().amax(dim=1) if x.shape[1] else wide.new_zeros(x.shape[0])
    # A tensor divided by a tensor: torch makes most / peak a multiplication by the reciprocal, which rounds twice.
    inverse = torch.where(peak > 0, torch.full_like(peak, most) / peak, torch.zeros_like(peak))
    codes = (wide * inverse[:, None]).round().clamp(-most, most)
    return codes.to(torch.int8 if most <= 127 else torch.int16), peak / most


def quantize_groups(x: torch.Tensor, codes: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] float -> codes [M, G, 16], padded with zeros, and scale fp32 [M, G], G = ceil(K / 16).

    As `quantize_rows` for each group of columns. codes: of an element: with 2 what is returned is 254 times the one plus the
    other, 32,385 at most and scale max|group| / 32,385, in int16. A group of no element above 2^-100 is zero, one with an
    infinity or a NaN has scale NaN and codes 0.
    """
    rows, columns = x.shape
    count = -(-columns // CODE_GROUP)
    padded = torch.nn.functional.pad(x.float(), (0, count * CODE_GROUP - columns))
    groups = padded.view(rows * count, CODE_GROUP)
    finite = groups.isfinite().all(dim=1)
    usable = finite & (groups.abs().amax(dim=1) > LEAST_PEAK)
    found, scale = quantize_rows(torch.where(usable[:, None], groups, torch.zeros_like(groups)), MOST[codes])
    scale = torch.where(finite, scale, torch.full_like(scale, torch.nan))
    return found.view(rows, count, CODE_GROUP), scale.view(rows, count)


def core_codes(core: int) -> int:
    """How many codes an element has that goes into core number `core` of a linear. Two (16 bits) behind the first core: the
    errors of what comes out of it are magnified by the cores behind: with one, a SmolLM2 at keep 0.8 lost 0.7 %."""
    return 1 if core == 0 else 2


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """x as an int8 core sees it with a scale for each row, in x's dtype: for the reference."""
    codes, scale = quantize_rows(x)
    return codes.to(x.dtype) * scale.to(x.dtype)[:, None]


def rounded_groups(x: torch.Tensor, codes: int = 1) -> torch.Tensor:
    """x as an int8 core sees it with a scale for each group, in x's dtype: for the reference. codes: of an element."""
    found, scale = quantize_groups(x, codes)
    wide = found.to(x.dtype) * scale.to(x.dtype)[:, :, None]
    return wide.flatten(1)[:, : x.shape[1]]
