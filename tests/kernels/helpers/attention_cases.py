"""Random paged-attention steps, with and without norms of heads, and how far their result may be from float64's.

The judge is written from the definition: it keeps every sequence's keys and values in a row and knows no pages. Queries and
keys are rotated by whole quarter turns where the cache is narrower than fp32: those are exact in any arithmetic, so that a
key rounds to the same number in the judge and in the kernel.

The bound. A score is a sum of D products, off by d <= scale (gamma_D |q||k| + the rotations' errors) + u|s|. Its weight
e^(s - max) is then off by a factor e^d, and by a few u for each page that rescales it and for each unit of the range of the
scores; the sums over L keys add gamma_L. With r the sum of these, the result is off by at most sum_j w_j r_j |v_j| + |out|
sum_j w_j r_j, where w is the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from error_bounds import U32, Bounded, Growth, gamma, normed
from hypothesis import strategies as st

from cai_runtime.kernels.attention import (
    CACHE_DTYPES,
    CpuAttention,
    CpuKVCache,
    HeadLayout,
    HeadNorms,
    ReferenceAttention,
    ReferenceKVCache,
)
from cai_runtime.kernels.batch import AttentionBatch
from cai_runtime.kernels.norm import RmsNorm
from cai_runtime.kernels.quantized_rows import quantize_rows

POSITIONS = 512
HEAD_DIMS = [2, 3, 5, 8, 15, 16, 17, 24, 33, 40, 63, 64, 65, 80, 96, 100, 127, 128, 129, 160, 191, 192]


def fill_with_nan(pages: torch.Tensor | None) -> None:
    """All bits set: NaN in a float, and so in the scales of an int8 cache."""
    if pages is not None:
        pages.view(torch.uint8).fill_(255)


def cached(x: Bounded, dtype: torch.dtype) -> Bounded:
    """Keys or values [T, heads, D] as a cache holds them. int8 takes exact ones: one that is off may fall to the next code,
    and a whole code is too much for a bound on the softmax."""
    is_exact = not bool((x.error > 0).any())
    if dtype == torch.int8:
        assert is_exact
        codes, scale = quantize_rows(x.value.float().flatten(0, 1))
        return Bounded.exact((codes.double() * scale.double()[:, None]).view(x.value.shape))
    if not is_exact:
        return x if dtype == torch.float32 else x.rounded(dtype)
    return Bounded.exact(x.value.float().to(dtype).double())


def make_attention(
    name: str,
    heads: HeadLayout,
    pages: int,
    page_size: int,
    dtype: torch.dtype,
    sinks: torch.Tensor | None = None,
    norms: HeadNorms | None = None,
) -> CpuAttention | ReferenceAttention:
    """With a cache full of NaN: what another sequence left behind must not matter."""
    if name == "cpu":
        cache = CpuKVCache(pages, page_size, heads, dtype)
        for part in (cache.k, cache.v):
            fill_with_nan(part)
        return CpuAttention(heads, cache, sinks, norms=norms)
    plain = ReferenceKVCache(pages, page_size, heads, dtype, torch.device("cpu"))
    for held in (plain.k, plain.v, plain.k_scale, plain.v_scale):
        fill_with_nan(held)
    return ReferenceAttention(heads, plain, sinks, norms=norms)


def rope_table(rotary_dim: int, *, quarter_turns: bool) -> torch.Tensor:
    """fp32 [POSITIONS, rotary_dim], cosines first; another frequency for each pair of dimensions."""
    pair, position = torch.arange(rotary_dim // 2), torch.arange(POSITIONS)[:, None]
    if quarter_turns:
        turns = position * (pair + 1) % 4
        return torch.cat([torch.tensor([1.0, 0, -1, 0])[turns], torch.tensor([0.0, 1, 0, -1])[turns]], dim=1)
    angle = position * 10000.0 ** (-2 * pair / max(rotary_dim, 1))
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


@dataclass
class Sequence:
    """One sequence's pages, and its keys and values so far as the judge sees them."""

    pages: list[int]
    length: int = 0
    k: list[Bounded] = field(default_factory=list)  # of a step: [tokens, kv_heads, D]
    v: list[torch.Tensor] = field(default_factory=list)


def batch_of(sequences: list[Sequence], counts: list[int], page_size: int) -> AttentionBatch:
    """The next counts[i] tokens of each sequence, whose lengths it moves on."""
    positions, slots, starts, lengths = [], [], [0], []
    for s, count in zip(sequences, counts, strict=True):
        span = range(s.length, s.length + count)
        positions += span
        slots += [s.pages[p // page_size] * page_size + p % page_size for p in span]
        starts.append(starts[-1] + count)
        s.length += count
        lengths.append(s.length)
    width = max(len(s.pages) for s in sequences)
    table = [s.pages + [0] * (width - len(s.pages)) for s in sequences]
    return AttentionBatch.of(*(torch.tensor(t, dtype=torch.int32) for t in (positions, slots, starts, lengths, table)))


def rotated(x: Bounded, positions: torch.Tensor, cos_sin: torch.Tensor, *, exact: bool) -> Bounded:
    """x [T, heads, D] in float64, the rotate-half convention."""
    half = cos_sin.shape[1] // 2
    turn = cos_sin[positions.long()].double()[:, None]
    cos, sin = turn[..., :half], turn[..., half:]
    parts = [half, half, x.value.shape[2] - 2 * half]
    (a, b, rest), (a_error, b_error, rest_error) = x.value.split(parts, dim=2), x.error.split(parts, dim=2)
    value = torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=2)
    low, high = ((u * cos).abs() + (w * sin).abs() for u, w in ((a_error, b_error), (b_error, a_error)))
    error = torch.cat([low, high, rest_error], dim=2)
    if exact:
        return Bounded(value, error)
    terms = torch.cat([(a * cos).abs() + (b * sin).abs(), (b * cos).abs() + (a * sin).abs(), 0 * rest], dim=2)
    return Bounded(value, error + 3 * U32 * (terms + error))


def normed_heads(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Bounded:
    """RMSNorm of each head of x [T, heads, D], rounded to x's dtype."""
    found = normed(x.reshape(-1, x.shape[2]), RmsNorm(weight, eps), x.dtype)
    return Bounded(found.value.view(x.shape), found.error.view(x.shape))


@dataclass
class Judge:
    """What a step's result may be. Feed it the steps in order."""

    heads: HeadLayout
    cache_dtype: torch.dtype
    cos_sin: torch.Tensor
    exact_rotation: bool
    scale: float
    sinks: torch.Tensor | None
    page_size: int
    norms: HeadNorms | None = None

    def remember(
        self, qkv: torch.Tensor, batch: AttentionBatch, sequences: list[Sequence]
    ) -> list[tuple[Bounded, Bounded, torch.Tensor]]:
        """Take in a step's keys and values; of each sequence its rotated queries, all keys, all values."""
        h = self.heads
        x = qkv.view(len(qkv), h.query_heads + 2 * h.kv_heads, h.head_dim)
        q, k, v = x.split([h.query_heads, h.kv_heads, h.kv_heads], dim=1)
        if self.norms is None:
            heads = [Bounded.exact(part) for part in (q, k)]
        else:
            pairs = zip((q, k), self.norms.weight, strict=True)
            heads = [normed_heads(part, weight, self.norms.eps) for part, weight in pairs]
        q_rot, k_rot = (rotated(part, batch.positions, self.cos_sin, exact=self.exact_rotation) for part in heads)
        k_rot = cached(k_rot, self.cache_dtype)
        v = cached(Bounded.exact(v), self.cache_dtype).value
        starts, found = batch.query_start.tolist(), []
        for i, s in enumerate(sequences):
            rows = slice(starts[i], starts[i + 1])
            s.k.append(Bounded(k_rot.value[rows], k_rot.error[rows]))
            s.v.append(v[rows])
            keys = Bounded(torch.cat([b.value for b in s.k]), torch.cat([b.error for b in s.k]))
            found.append((Bounded(q_rot.value[rows], q_rot.error[rows]), keys, torch.cat(s.v)))
        return found

    def attended(self, q: Bounded, k: Bounded, v: torch.Tensor, growth: Growth) -> Bounded:
        """One sequence: q [T, Hq, D] at its last T positions -> [T, Hq D]."""
        h, (tokens, length) = self.heads, (len(q.value), len(k.value))
        if tokens == 0:
            return Bounded.exact(torch.empty(0, h.query_width))
        group = h.query_heads // h.kv_heads
        qv, qe = q.value.transpose(0, 1), q.error.transpose(0, 1)  # [Hq, T, D]
        kv, ke, vv = (t.transpose(0, 1).repeat_interleave(group, 0) for t in (k.value, k.error, v))
        score = self.scale * (qv @ kv.mT)
        seen_q, seen_k = qv.abs() + qe, kv.abs() + ke
        products = gamma(h.head_dim + 2, growth) * (seen_q @ seen_k.mT)
        d = self.scale * (products + qe @ seen_k.mT + seen_q @ ke.mT) + 2 * U32 * score.abs()
        distance = torch.arange(length - tokens, length)[:, None] - torch.arange(length)
        hidden = distance < 0 if h.window is None else (distance < 0) | (distance >= h.window)
        score = score.masked_fill(hidden, -torch.inf)
        if self.sinks is not None:  # one more key without a value
            sink = self.sinks.double()[:, None, None].expand(-1, tokens, 1)
            score, d = torch.cat([score, sink], dim=2), torch.cat([d, torch.zeros_like(sink)], dim=2)
            vv = torch.cat([vv, torch.zeros(len(vv), 1, h.head_dim, dtype=vv.dtype)], dim=1)
        weight = score.softmax(-1)
        finite = score.masked_fill(score.isinf(), torch.nan)
        lowest = finite.nan_to_num(torch.inf).amin(-1, keepdim=True)
        spread = (score.amax(-1, keepdim=True) - lowest) * (3 * U32)
        pages = -(-length // self.page_size)
        r = torch.expm1(d + spread + (6 * pages + 20) * U32 + gamma(length, growth))
        out = weight @ vv
        error = (weight * r) @ vv.abs() + out.abs() * (weight * r).sum(-1, keepdim=True)
        error = error / (1 - float(r.max())) + 2.0**-120 * length * vv.abs().amax()
        return Bounded(*(t.transpose(0, 1).reshape(tokens, -1) for t in (out, error)))


@dataclass(frozen=True)
class AttentionCase:
    """The recipe of a random layer and its steps: what a failing example prints. counts[t][i]: tokens of sequence i in step
    t."""

    kv_heads: int
    group: int
    head_dim: int
    rotary_dim: int
    page_size: int
    cache_dtype: torch.dtype
    window: int | None
    sinks: bool
    counts: tuple[tuple[int, ...], ...]
    seed: int
    norms: bool = False

    @property
    def heads(self) -> HeadLayout:
        return HeadLayout(self.kv_heads * self.group, self.kv_heads, self.head_dim, self.rotary_dim, self.window)

    @property
    def lengths(self) -> list[int]:
        return [sum(column) for column in zip(*self.counts, strict=True)]

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def sink_logits(self, g: torch.Generator) -> torch.Tensor | None:
        return torch.randn(self.heads.query_heads, generator=g) * 2 if self.sinks else None

    def head_norms(self, dtype: torch.dtype = torch.float32) -> HeadNorms | None:
        """Weights in `dtype`; a generator of their own."""
        weight = torch.rand(2, self.head_dim, generator=torch.Generator().manual_seed(self.seed)) + 0.5
        return HeadNorms(weight.to(dtype), 1e-6) if self.norms else None

    def sequences(self, g: torch.Generator) -> tuple[list[Sequence], int]:
        """Their pages dealt at random out of a few more than are needed, and how many pages there are."""
        needed = [-(-n // self.page_size) for n in self.lengths]
        order = torch.randperm(sum(needed) + 3, generator=g).tolist()
        starts = [sum(needed[:i]) for i in range(len(needed))]
        return [Sequence(order[a : a + n] or [0]) for a, n in zip(starts, needed, strict=True)], len(order)


@st.composite
def attention_cases(draw: st.DrawFn, backend: str) -> AttentionCase:
    dim = draw(st.sampled_from(HEAD_DIMS) | st.integers(2, 192))
    page = draw(st.sampled_from([16, 32, 48, 64] if backend != "reference" else [1, 7, 16, 64]))
    dtype = draw(st.sampled_from(CACHE_DTYPES))
    near = [1, 2, page - 1, page, page + 1, 2 * page, 2 * page + 1]
    chunk = st.sampled_from([0, 1, 1, *[n for n in near if n > 0]]) | st.integers(1, 70)
    sequences = draw(st.integers(1, 4))
    first = [draw(chunk.filter(bool)) for _ in range(sequences)]
    later = [[draw(chunk) for _ in range(sequences)] for _ in range(draw(st.integers(0, 2)))]
    return AttentionCase(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 8)),
        dim,
        draw(st.sampled_from([dim // 2 * 2, dim // 4 * 2, 2, 0])),
        page,
        dtype,
        draw(st.none() | st.sampled_from([1, 2, page, page + 1]) | st.integers(1, 100)),
        draw(st.booleans()),
        tuple(tuple(row) for row in (first, *later)),
        draw(st.integers(0, 2**31)),
        dtype != torch.int8 and draw(st.booleans()),  # see `cached`
    )
