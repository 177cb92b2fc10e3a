"""Attention without a causal limit in float64, and how far a kernel may be from it; attention_cases.py derives the bound."""

from __future__ import annotations

import torch
from error_bounds import U32, Bounded, Growth, gamma


def weighted(q: torch.Tensor, k: torch.Tensor, scale: float, growth: Growth) -> Bounded:
    """The softmax [T, rows] of one head's queries [T, D] over keys [rows, D]."""
    q, k = q.double(), k.double()
    score = scale * (q @ k.mT)
    products = gamma(q.shape[1] + 2, growth) * abs(scale) * (q.abs() @ k.abs().mT)
    spread = (score.amax(-1, keepdim=True) - score.amin(-1, keepdim=True)) * (3 * U32)
    rescaled = (6 * -(-len(k) // 16) + 20) * U32  # at most once for 16 keys
    weight = score.softmax(-1)
    r = torch.expm1(products + 3 * U32 * score.abs() + spread + rescaled + gamma(len(k), growth))
    total = (weight * r).sum(-1, keepdim=True)  # of the normalizing sum
    return Bounded(weight, (weight * r + weight * total) / (1 - r.amax(-1, keepdim=True)) + 2.0**-120)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, growth: Growth) -> Bounded:
    """One head: queries [T, D], keys and values [rows, D] -> [T, D]."""
    weights, v = weighted(q, k, scale, growth), v.double()
    error = weights.error @ v.abs() + gamma(len(k), growth) * (weights.value @ v.abs())
    return Bounded(weights.value @ v, error + 2.0**-140)


def all_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, growth: Growth) -> Bounded:
    """q [T, Hq, D], k and v [rows, Hkv, D] -> [T, Hq D]."""
    shared = q.shape[1] // k.shape[1]
    heads = [attended(q[:, h], k[:, h // shared], v[:, h // shared], scale, growth) for h in range(q.shape[1])]
    return Bounded(torch.cat([h.value for h in heads], 1), torch.cat([h.error for h in heads], 1))
