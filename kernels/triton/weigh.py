"""Weights of logits as whole numbers, for the sampler and for logprobs: kernels/sampling.py, step 7."""

from __future__ import annotations

import triton
import triton.language as tl

from cai_runtime.kernels.triton.launch import interpreting

# Products and sums must not be fused: the weights would differ from the CPU's.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
BLOCK = 2048
INFINITY = tl.constexpr(0x7F800000)


def block_of(vocabulary: int) -> int:
    """Logits that a program takes at a time. The interpreter takes as long for those beyond the last one."""
    return min(BLOCK, triton.next_power_of_2(vocabulary)) if interpreting() else BLOCK


@triton.jit
def key(bits):
    """Integers in the order of the floats, -0 and +0 the same one."""
    sign = bits >> 31
    return ((bits & 0x7FFFFFFF) ^ sign) - sign


@triton.jit
def logit_of(order):
    """The float that `key` made this integer of; +0 for either zero."""
    sign = order >> 31
    return tl.where(order < 0, (-order) | (sign << 31), order).to(tl.float32, bitcast=True)


@triton.jit
def weigh(logits, greatest, inverse_temperature):
    x = tl.maximum((logits - greatest) * inverse_temperature, -22.0)
    n = (x * 1.44269504 + 12582912.0) - 12582912.0  # rounds: 1.5 x 2^23
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = (r * r) * p + (r + 1.0)
    power = ((n.to(tl.int32) + 157) << 23).to(tl.float32, bitcast=True)
    return (p * power + 0.5).to(tl.int32)
