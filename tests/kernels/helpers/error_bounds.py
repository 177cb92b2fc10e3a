"""How far a kernel's result may be from float64's: running error analysis, element by element.

A value of the computation is a pair (value, error): what exact arithmetic gives in float64, and a bound on how far the
computed number may be from it. Rules, with u the unit roundoff (2^-24 for fp32) and Higham 2002, chapters 2 and 3:

- A sum of n products formed and added in any order, with or without fused multiply-add, is off by at most
  gamma_n sum|w||x|, where gamma_n = n u / (1 - n u). No order of reduction is assumed, so that a kernel may change its own.
- An error of the input passes through a product as |W| error.
- Storing a result in the activation dtype, and adding a bias or a residual to it, is one rounding each.

That bound is never exceeded by a correct kernel and is about sqrt(n) above what is seen. So a second, sharper one is stated
for the norm over all elements: rounding errors behave like independent ones, and n of them add up to sqrt(n) u (Higham and
Mary 2019); `growth=math.sqrt` selects it.

What is *not* a rounding error, a wrong column at the edge of a tile, a scale of the neighbouring group, is as large as the
value of one product and stands orders above both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cai_runtime.kernels.norm import LayerNorm, RmsNorm
from cai_runtime.kernels.quantized_rows import CODE_GROUP, LEAST_PEAK, MOST, core_codes, quantize_rows
from cai_runtime.kernels.slim_linear import contract_mpo
from cai_runtime.kernels.weights import Core, LinearWeights

U32 = 2.0**-24
SUBNORMAL = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
Growth = Callable[[float], float]


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def worst_case(n: float) -> float:
    return n


@dataclass
class Bounded:
    """What exact arithmetic gives, and how far the computed value may be from it; both float64, of one shape."""

    value: torch.Tensor
    error: torch.Tensor

    @classmethod
    def exact(cls, x: torch.Tensor) -> Bounded:
        return cls(x.double(), torch.zeros(x.shape, dtype=torch.float64))

    def rounded(self, dtype: torch.dtype, times: int = 1) -> Bounded:
        """After `times` roundings to dtype."""
        u = times * unit_roundoff(dtype)
        return Bounded(self.value, self.error + u * (self.value.abs() + self.error) + times * SUBNORMAL[dtype])

    def plus(self, other: torch.Tensor, dtype: torch.dtype) -> Bounded:
        """Plus an exact tensor, and the sum's rounding."""
        return Bounded(self.value + other.double(), self.error).rounded(dtype)


def gamma(n: float, growth: Growth = worst_case) -> float:
    n = growth(n)
    return n * U32 / (1 - n * U32)


def magnitude(core: Core) -> torch.Tensor:
    """|W| as far as a kernel's sums may see it. int4: (code + zero) * scale, since a kernel may sum codes and take the
    zero point's share off afterwards."""
    if not core.is_int4:
        return core.values(torch.float64).abs()
    assert core.scale is not None
    plain = Core(core.data, core.scale, torch.zeros(core.scale.shape, dtype=torch.uint8), core.group, core.columns)
    codes = plain.values(torch.float64).abs()  # code * |scale|
    zero = torch.full(core.scale.shape, 8.0) if core.zero is None else core.zero
    share = (zero.double() * core.scale.double().abs()).repeat_interleave(core.group, 1)[:, : core.shape[1]]
    return codes + share


def multiplied(core: Core, x: Bounded, dtype: torch.dtype, growth: Growth) -> Bounded:
    """x W^T, summed in fp32. A backend that computes in a narrow dtype first rounds the weights to it: twice at most (an
    int8 core's scale, and its product with the code)."""
    weights, size = core.values(torch.float64), magnitude(core)
    per_product = gamma(core.shape[1] + 6, growth)
    if dtype != torch.float32:
        per_product += 2.1 * unit_roundoff(dtype)
    seen = (x.value.abs() + x.error) @ size.T
    underflow = (core.shape[1] + 4) * SUBNORMAL[torch.float32]
    if dtype == torch.float16:  # a weight below 2^-14 has fewer bits there
        underflow = SUBNORMAL[dtype] * (x.value.abs() + x.error).sum(1, keepdim=True)
    return Bounded(x.value @ weights.T, x.error @ weights.abs().T + per_product * seen + underflow)


def quantized(x: Bounded, dtype: torch.dtype, most: int = 127) -> Bounded:
    """Rounded to int8 by rows. Exact input gives exact codes; else a code may be the next one where its value is, within
    its error, at a half."""
    v = x.value.float()
    codes, scale = quantize_rows(v, most)
    value = codes.double() * scale.double()[:, None]
    if not x.error.any() and torch.equal(v.double(), x.value):
        return Bounded(value, torch.zeros_like(value)).rounded(dtype, 2)
    error = x.error + U32 * x.value.abs()
    peak = v.double().abs().amax(1, keepdim=True).clamp_min(1e-300)
    peak_error = error.amax(1, keepdim=True)
    step = (peak + peak_error) / most
    delta = most / peak * (error + x.value.abs() * peak_error / peak) + most * 4 * U32
    at = x.value * most / peak
    to_half = ((at - at.floor()) - 0.5).abs()
    steps = torch.where(to_half <= delta, delta.floor() + 1, delta.floor())
    return Bounded(value, step * steps + codes.double().abs() * (peak_error / most + 4 * U32 * step)).rounded(dtype, 2)


def quantized_groups(x: Bounded, dtype: torch.dtype, most: int) -> Bounded:
    """Rounded to int8 by groups of columns: each is a row of its own, but for the smallest, which are zero."""
    rows, columns = x.value.shape
    pad = -columns % CODE_GROUP

    def split(t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(t, (0, pad)).view(-1, CODE_GROUP)

    def whole(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(rows, columns + pad)[:, :columns]

    groups = Bounded(split(x.value), split(x.error))
    found = quantized(groups, dtype, most)
    # Near 2^-100 either side of the limit may be taken: all of the group, or nothing of it.
    small = groups.value.abs().amax(1, keepdim=True) - groups.error.amax(1, keepdim=True) <= LEAST_PEAK
    lost = torch.where(small, found.value.abs() + found.error + LEAST_PEAK, torch.zeros_like(found.value))
    return Bounded(whole(found.value), whole(found.error + lost))


def normed(x: torch.Tensor, norm: RmsNorm, dtype: torch.dtype, growth: Growth = worst_case) -> Bounded:
    """RMSNorm of exact rows. The mean of H squares has no cancellation: relative error gamma_H, halved by the root."""
    wide = x.double()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    value = wide * scale * norm.weight.double()
    return Bounded(value, value.abs() * (gamma(x.shape[1], growth) / 2 + 6 * U32)).rounded(dtype)


def layer_normed(x: torch.Tensor, norm: LayerNorm, dtype: torch.dtype, growth: Growth = worst_case) -> Bounded:
    """LayerNorm of exact rows. The mean is off by gamma_H mean|x|, and so is every deviation; the variance of the
    deviations has no cancellation, and what the mean is off adds at most the square of that."""
    wide = x.double()
    deviation = wide - wide.mean(-1, keepdim=True)
    variance = deviation.pow(2).mean(-1, keepdim=True)
    off = gamma(x.shape[1] + 2, growth) * wide.abs().mean(-1, keepdim=True) + 2 * U32 * wide.abs()
    spread = off.pow(2).mean(-1, keepdim=True) + 2 * (deviation.abs() * off).mean(-1, keepdim=True)
    scale = torch.rsqrt(variance + norm.eps)
    relative = spread / (variance + norm.eps) + gamma(x.shape[1], growth) + 8 * U32
    weight = norm.weight.double()
    scaled = deviation * scale * weight
    error = (off * scale * weight.abs() + scaled.abs() * relative) * (1 + relative)
    return Bounded(scaled, error + 2 * U32 * scaled.abs()).plus(norm.bias, torch.float32).rounded(dtype)


def gelued(x: torch.Tensor, dtype: torch.dtype) -> Bounded:
    """x Phi(x) of exact numbers. Phi is good to 8 units of 1."""
    wide = x.double()
    value = torch.nn.functional.gelu(wide)
    return Bounded(value, 8 * U32 * wide.abs()).rounded(dtype, 2)


def gated(gate_up: torch.Tensor, dtype: torch.dtype) -> Bounded:
    """silu(gate) * up of exact rows. e^x is good to 4 units and clamped at e^87, so a weight of 2^-125 may be left."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    value = gate * torch.sigmoid(gate) * up
    return Bounded(value, 8 * U32 * value.abs() + 2.0**-125 * (gate * up).abs()).rounded(dtype, 2)


def halves(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values' rows and the errors'."""
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def linear(
    x: Bounded,
    w: LinearWeights,
    dtype: torch.dtype = torch.float32,
    *,
    int8_activations: bool = False,
    scale_rows: bool = False,
    growth: Growth = worst_case,
) -> Bounded:
    """W x (+ bias) with what a kernel that sums in fp32 and keeps its intermediates in `dtype` may be off. scale_rows: as
    for the reference."""

    def apply(core: Core, v: Bounded) -> Bounded:
        if int8_activations and core.store == "int8":
            number = next(i for i, c in enumerate(w.cores) if c is core)
            v = quantized(v, dtype) if scale_rows else quantized_groups(v, dtype, MOST[core_codes(number)])
        return multiplied(core, v, dtype, growth).rounded(dtype)

    match w.kind:
        case "dense":
            y = apply(w.cores[0], x)
        case "lowrank":
            y = apply(w.cores[1], apply(w.cores[0], x))
        case "interpolative":
            assert w.pivot is not None
            z = apply(w.cores[0], x)
            rest = apply(w.cores[1], z)
            value, error = torch.empty(2, len(x.value), w.out_features, dtype=torch.float64)
            value[:, w.pivot.long()] = torch.cat([z.value, rest.value], dim=1)
            error[:, w.pivot.long()] = torch.cat([z.error, rest.error], dim=1)
            y = Bounded(value, error)
        case "mpo":

            def pair(core: Core) -> Callable[[torch.Tensor], torch.Tensor]:
                def multiply(rows: torch.Tensor) -> torch.Tensor:
                    out = apply(core, Bounded(*halves(rows)))
                    return torch.cat([out.value, out.error])

                return multiply

            both = contract_mpo(torch.cat([x.value, x.error]), w, [pair(c) for c in w.cores])
            y = Bounded(*halves(both))
    if w.bias is None:
        return y
    bias = Bounded.exact(w.bias) if dtype == torch.float32 else Bounded.exact(w.bias).rounded(dtype)
    return Bounded(y.value + bias.value, y.error + bias.error).rounded(dtype)


def check(got: torch.Tensor, within: Callable[[Growth], Bounded], *, sharp: bool = True) -> None:
    """Assert that `got` is within the bound at every element and, if `sharp`, within the sharper one as a whole."""
    bound = within(worst_case)
    assert got.shape == bound.value.shape
    error = (got.double() - bound.value).abs()
    allowed = bound.error
    wrong = ~(error <= allowed)  # NaN is wrong too
    if wrong.any():
        worst = torch.where(wrong, error / allowed.clamp_min(1e-300), -1).nan_to_num(math.inf).argmax().item()
        at = divmod(int(worst), got.shape[1])
        raise AssertionError(
            f"{int(wrong.sum())} of {got.numel()} elements are out of bounds, the worst at {at}: {got[at].item()} where "
            f"{bound.value[at].item()} +- {allowed[at].item()} is right"
        )
    if sharp and got.numel():
        norm, limit = float(error.norm()), float(within(math.sqrt).error.norm())
        assert norm <= limit, f"the error's norm is {norm}, and should be below {limit}"
