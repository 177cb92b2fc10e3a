"""The Triton kernels as compiled for sm_90, executed by the PTX interpreter in `ptx/`: against float64, within the bounds of
`helpers/error_bounds.py`. Masks, layouts and addresses are the compiled ones, which Triton's own interpreter knows not."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)

from attention_cases import Judge, normed_heads, rotated
from error_bounds import Bounded, Growth, check, gated, linear, multiplied, normed, unit_roundoff
from kernel_cases import STORES, random_linear
from ptx.device import Device, put_in_place
from sampling_cases import make_batch

from cai_runtime.kernels import triton as backend
from cai_runtime.kernels.attention import HeadLayout, HeadNorms
from cai_runtime.kernels.norm import RmsNorm
from cai_runtime.kernels.quantized_rows import quantize_rows
from cai_runtime.kernels.sampling import sample_cpu
from cai_runtime.kernels.sampling_reference import sample_reference
from cai_runtime.kernels.triton import attention
from cai_runtime.kernels.triton.sampling import TritonSampler
from cai_runtime.kernels.weights import LinearWeights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = (1, 3, 16, 20)  # the last by the tiles of many rows, the others by those of decode


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return put_in_place(monkeypatch)


@pytest.fixture
def g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(*shape: int, dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=g).to(dtype)


def dense(x: Bounded, w: LinearWeights, residual: torch.Tensor | None, dtype: torch.dtype, growth: Growth) -> Bounded:
    """Weights are exact in the products' dtype, sums are float32, the result is rounded once."""
    y = multiplied(w.cores[0], x, torch.float32, growth)
    for summand in (w.bias, residual):
        y = y if summand is None else y.plus(summand, torch.float32)
    return y.rounded(dtype)


@pytest.mark.parametrize("prologue", ["none", "norm", "gate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("store", STORES)
def test_linear(g: torch.Generator, store: str, dtype: torch.dtype, prologue: str):
    """Every store, activation and class of rows. A row has the same bits whatever the number of rows, which tiles of decode
    and of many rows decide."""
    inputs, outputs = 208, 40  # a part of a step, of a group and of a tile at the ends
    w = random_linear("dense", inputs, outputs, 0, [store], True, g)
    x = normal(max(ROWS), inputs * (2 if prologue == "gate" else 1), dtype=dtype, g=g)
    residual = normal(max(ROWS), outputs, dtype=dtype, g=g)
    norm = RmsNorm(normal(inputs, dtype=dtype, g=g), 1e-5) if prologue == "norm" else None
    group = backend.TritonLinear([w])

    def given(growth: Growth) -> Bounded:
        if norm is not None:
            return normed(x, norm, dtype, growth)
        return gated(x, dtype) if prologue == "gate" else Bounded.exact(x)

    whole = group(x, residual, norm=norm, swiglu=prologue == "gate")
    check(whole, lambda growth: dense(given(growth), w, residual, dtype, growth))
    for rows in ROWS:
        some = group(x[:rows], residual[:rows], norm=norm, swiglu=prologue == "gate")
        assert torch.equal(some, whole[:rows]), rows


@pytest.mark.parametrize("store", ["bf16", "int8", "int4-64-zero"])
def test_linear_of_odd_width(g: torch.Generator, store: str):
    """Nothing is a multiple of 16: other loads, without asynchronous copies of x."""
    w = random_linear("dense", 131, 19, 0, [store], False, g)
    x = normal(18, 131, dtype=torch.bfloat16, g=g)
    for rows in (2, 18):
        check(
            backend.slim_linear(x[:rows], w),
            lambda growth, rows=rows: dense(Bounded.exact(x[:rows]), w, None, torch.bfloat16, growth),
        )


@pytest.mark.parametrize("store", ["bf16", "int8", "int4-32-zero"])
def test_group_of_slim_linears(g: torch.Generator, store: str):
    """Both stages, of several members in a launch."""
    kinds = [("interpolative", 48, 21), ("lowrank", 35, 16)]
    members = [random_linear(kind, 96, out, rank, [store], True, g) for kind, out, rank in kinds]
    x = normal(18, 96, dtype=torch.bfloat16, g=g)
    group = backend.TritonLinear(members)
    for rows in (3, 18):
        y = group(x[:rows])
        for w, part in zip(members, y.split([out for _, out, _ in kinds], dim=1), strict=True):
            check(
                part, lambda growth, w=w, rows=rows: linear(Bounded.exact(x[:rows]), w, torch.bfloat16, growth=growth)
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_activations(g: torch.Generator, device: Device, dtype: torch.dtype):
    """Many rows by wgmma, whose operands lie swizzled in shared memory; decode by mma."""
    w = random_linear("dense", 208, 40, 0, ["int8"], True, g)
    x = normal(70, 208, dtype=dtype, g=g)
    group = backend.TritonLinear([w], True)
    for rows, unit in ((3, "mma.sync"), (70, "wgmma.mma_async")):
        y = group(x[:rows])
        check(
            y,
            lambda growth, rows=rows: linear(
                Bounded.exact(x[:rows]), w, dtype, int8_activations=True, scale_rows=True, growth=growth
            ),
        )
        assert unit in device.launches[-1][1]


@pytest.mark.parametrize(("store", "int8_activations"), [("int8", False), ("int8", True), ("int4-32-zero", False)])
def test_linear_for_ampere(g: torch.Generator, monkeypatch: pytest.MonkeyPatch, store: str, int8_activations: bool):
    """Compiled for sm_80, which has no wgmma."""
    put_in_place(monkeypatch, 80)
    w = random_linear("dense", 208, 40, 0, [store], True, g)
    x = normal(20, 208, dtype=torch.bfloat16, g=g)
    group = backend.TritonLinear([w], int8_activations)
    whole = group(x)
    check(
        whole,
        lambda growth: linear(
            Bounded.exact(x), w, torch.bfloat16, int8_activations=int8_activations, scale_rows=True, growth=growth
        ),
    )
    assert torch.equal(group(x[:3]), whole[:3])


@dataclass
class Step:
    """A step of attention over shuffled pages of 16; what no sequence owns is NaN."""

    heads: HeadLayout
    q: torch.Tensor
    caches: list[torch.Tensor]
    query_start: torch.Tensor
    context_len: torch.Tensor
    page_table: torch.Tensor
    sinks: torch.Tensor | None
    scales: list[torch.Tensor] | None = None  # of an int8 cache

    @classmethod
    def of(
        cls, sequences: list[tuple[int, int]], heads: HeadLayout, dtype: torch.dtype, sinks: bool, g: torch.Generator
    ) -> Step:
        """sequences: new tokens and context of each."""
        pages = [-(-context // 16) for _, context in sequences]
        order = (1 + torch.randperm(sum(pages), generator=g)).to(torch.int32)
        table = torch.zeros(len(sequences), max(pages), dtype=torch.int32)
        caches = [
            torch.full((sum(pages) + 1, heads.kv_heads, 16, heads.head_dim), torch.nan, dtype=dtype) for _ in "kv"
        ]
        for s, own in enumerate(order.split(pages)):
            table[s, : pages[s]] = own
            for cache in caches:
                values = torch.randn(pages[s] * 16, heads.kv_heads, heads.head_dim, generator=g).to(dtype)
                values[sequences[s][1] :] = torch.nan
                cache[own.long()] = values.view(pages[s], 16, heads.kv_heads, heads.head_dim).transpose(1, 2)
        starts = torch.tensor([0] + [new for new, _ in sequences]).cumsum(0).to(torch.int32)
        lengths = torch.tensor([context for _, context in sequences], dtype=torch.int32)
        q = normal(int(starts[-1]), heads.query_heads, heads.head_dim, dtype=dtype, g=g)
        logits = torch.randn(heads.query_heads, generator=g) if sinks else None
        return cls(heads, q, caches, starts, lengths, table, logits)

    def run(self) -> torch.Tensor:
        scale = self.heads.head_dim**-0.5
        lists = (self.query_start, self.context_len, self.page_table)
        scales = {} if self.scales is None else {"k_scale": self.scales[0], "v_scale": self.scales[1]}
        return backend.paged_attention(
            self.q, *self.caches, *lists, scale, window=self.heads.window, sinks=self.sinks, **scales
        )

    def in_int8(self) -> Step:
        """The same with an int8 cache."""
        found = [quantize_rows(cache.flatten(0, 2)) for cache in self.caches]
        codes = [c.view(self.caches[0].shape) for c, _ in found]
        return replace(self, caches=codes, scales=[s.view(codes[0].shape[:3]) for _, s in found])

    def held(self) -> list[torch.Tensor]:
        """The caches in float64."""
        if self.scales is None:
            return [cache.double() for cache in self.caches]
        return [c.double() * s.double()[..., None] for c, s in zip(self.caches, self.scales, strict=True)]

    def bound(self, growth: Growth) -> Bounded:
        """The softmax's weights are rounded to the dtype, in the numerator and in the denominator alike."""
        heads, dtype = self.heads, self.q.dtype
        judge = Judge(heads, dtype, torch.empty(0, 0), True, heads.head_dim**-0.5, self.sinks, 16)
        found = []
        for s, queries in enumerate(self.q.split(self.query_start.diff().tolist())):
            length = int(self.context_len[s])
            own = self.page_table[s, : -(-length // 16)].long()
            k, v = (c[own].transpose(1, 2).reshape(-1, heads.kv_heads, heads.head_dim)[:length] for c in self.held())
            exact = judge.attended(Bounded.exact(queries), Bounded.exact(k), v, growth)
            size = judge.attended(Bounded.exact(queries), Bounded.exact(k), v.abs(), growth)
            rounding = 0 if dtype == torch.float32 else 2.1 * unit_roundoff(dtype)
            found.append(Bounded(exact.value, exact.error + rounding * (size.value + size.error)).rounded(dtype))
        return Bounded(torch.cat([f.value for f in found]), torch.cat([f.error for f in found]))


DECODE = [(1, 37), (1, 1090)]
PREFILL = [(20, 45), (1, 520), (7, 7)]
PLAIN = HeadLayout(3, 1, 64, 64)
WINDOWED = HeadLayout(4, 2, 32, 32, window=40)
WIDE = HeadLayout(2, 1, 128, 128, window=70)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "sinks"), [(PLAIN, False), (WINDOWED, True)], ids=["plain", "window and sinks"])
@pytest.mark.parametrize("sequences", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8 cache"])
def test_attention(
    g: torch.Generator, monkeypatch: pytest.MonkeyPatch, device: Device, sequences: list[tuple[int, int]],
    heads: HeadLayout, sinks: bool, dtype: torch.dtype, int8: bool,
):  # fmt: skip
    """Decode by a program for each split of the keys, and by one for all; the same bits."""
    step = Step.of(sequences, heads, dtype, sinks, g)
    step = step.in_int8() if int8 else step
    out = step.run()
    check(out, step.bound)
    apart = sequences is DECODE
    names = [name for name, _ in device.launches]
    assert names == ["paged_attention_kernel"] + ["merge_splits_kernel"] * apart
    if apart:
        monkeypatch.setattr(attention, "FULL_GRID", 0)
        assert torch.equal(step.run(), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "sinks"), [(PLAIN, False), (WIDE, True)], ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8 cache"])
def test_attention_of_many_tokens(
    g: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    device: Device,
    heads: HeadLayout,
    sinks: bool,
    dtype: torch.dtype,
    int8: bool,
):
    """A tile of 128 rows, by products of warp groups; the small tile's numbers to within the rounding of sums, which here
    are exact and on Hopper cut off alike."""
    monkeypatch.setattr(attention, "MANY_TOKENS", 40)
    step = Step.of([(60, 90), (1, 300), (7, 7)], heads, dtype, sinks, g)
    step = step.in_int8() if int8 else step
    out = step.run()
    check(out, step.bound)
    assert "wgmma.mma_async" in device.launches[0][1]
    monkeypatch.setattr(attention, "MANY_TOKENS", 1000)
    small = step.run()
    assert "wgmma" not in device.launches[1][1]
    assert float((small.double() - out.double()).abs().max() / out.double().abs().max()) < 1e-2
    assert float((small == out).double().mean()) > 0.98


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 77), (2, 576)])
def test_norms_and_swiglu(g: torch.Generator, dtype: torch.dtype, shape: tuple[int, int]):
    x, residual = normal(*shape, dtype=dtype, g=g), normal(*shape, dtype=dtype, g=g)
    norm = RmsNorm(torch.rand(shape[1], generator=g) + 0.5, 1e-5)
    check(backend.rms_norm(x, norm.weight, norm.eps), lambda growth: normed(x, norm, dtype, growth))
    result, total = backend.add_rms_norm(x, residual, norm.weight, norm.eps)
    assert torch.equal(total, x + residual)
    check(result, lambda growth: normed(total, norm, dtype, growth))
    wide = torch.cat([3 * x, residual], dim=1)
    check(backend.swiglu(wide), lambda _: gated(wide, dtype))


def test_norm_of_rows_wider_than_a_block(g: torch.Generator):
    x = normal(2, 9000, dtype=torch.bfloat16, g=g)
    norm = RmsNorm(torch.ones(9000), 1e-5)
    check(backend.rms_norm(x, norm.weight, norm.eps), lambda growth: normed(x, norm, torch.bfloat16, growth))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_rows(g: torch.Generator, dtype: torch.dtype):
    x = normal(4, 1104, dtype=dtype, g=g)
    x[1] = 0
    x[2, :5] = torch.tensor([127, 0.5, 1.5, -2.5, 126.5])  # halves round to even
    x[2, 5:] = 1
    codes, scale = backend.quantize_rows(x)
    wanted, wanted_scale = quantize_rows(x)
    assert torch.equal(codes, wanted)
    torch.testing.assert_close(scale, wanted_scale, rtol=2**-23, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "rotary", "norms_too"), [(64, 64, False), (20, 6, False), (64, 64, True), (20, 6, True)]
)
def test_rope_and_kv_write(g: torch.Generator, dtype: torch.dtype, dim: int, rotary: int, norms_too: bool):
    q_heads, kv_heads = 3, 1
    qkv = normal(4, (q_heads + 2 * kv_heads) * dim, dtype=dtype, g=g)
    before = qkv.clone().view(4, -1, dim)
    angle = 6 * torch.rand(50, rotary // 2, generator=g)
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=1)
    positions, slots = torch.tensor([0, 7, 49, 3], dtype=torch.int32), torch.tensor([17, 2, -1, 31], dtype=torch.int32)
    k_cache, v_cache = (torch.full((2, kv_heads, 16, dim), 9.0, dtype=dtype) for _ in "kv")
    norms = HeadNorms((torch.rand(2, dim, generator=g) + 0.5).to(dtype), 1e-6) if norms_too else None
    backend.rope_kv_write(qkv, positions, cos_sin, k_cache, v_cache, slots, q_heads, kv_heads, dim, norms)
    turned, v = qkv.view(4, -1, dim).split([q_heads + kv_heads, kv_heads], dim=1)
    heads = Bounded.exact(before[:, : q_heads + kv_heads])
    if norms is not None:  # in fp32 up to the rotation
        parts = before.float().split([q_heads, kv_heads, kv_heads], dim=1)
        found = [normed_heads(x, w.float(), norms.eps) for x, w in zip(parts, norms.weight, strict=False)]
        heads = Bounded(torch.cat([f.value for f in found], 1), torch.cat([f.error for f in found], 1))
    right = rotated(heads, positions, cos_sin, exact=False)
    flat = Bounded(right.value.flatten(1), right.error.flatten(1))
    check(turned.flatten(1), lambda _: flat.rounded(dtype))
    assert torch.equal(v, before[:, q_heads + kv_heads :])
    for cache, written in ((k_cache, turned[:, q_heads:]), (v_cache, v)):
        expected = torch.full_like(cache, 9.0)
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[slot // 16, :, slot % 16] = written[row]
        assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (20, 6)])
def test_keys_and_values_as_codes(g: torch.Generator, dtype: torch.dtype, dim: int, rotary: int):
    """Of what the same kernel writes to a cache of floats, rounded once; a NaN and an infinity don't vanish."""
    q_heads, kv_heads = 1, 2
    qkv = normal(5, (q_heads + 2 * kv_heads) * dim, dtype=dtype, g=g)
    qkv[3] = 0
    qkv[4, q_heads * dim + 3], qkv[4, -1] = torch.nan, torch.inf  # of the first key head, of the last value head
    turns = torch.tensor([1.0, 0, -1, 0])[(torch.arange(8)[:, None] * torch.arange(1, rotary // 2 + 1)) % 4]
    cos_sin = torch.cat([turns, turns.roll(1, 0)], dim=1)
    positions, slots = torch.arange(5, dtype=torch.int32), torch.tensor([17, 2, -1, 31, 9], dtype=torch.int32)
    lists = (slots, q_heads, kv_heads, dim)
    plain = [torch.full((2, kv_heads, 16, dim), 9.0, dtype=dtype) for _ in "kv"]
    backend.rope_kv_write(qkv.clone(), positions, cos_sin, *plain, *lists)
    codes = [torch.full((2, kv_heads, 16, dim), 9, dtype=torch.int8) for _ in "kv"]
    scales = [torch.full((2, kv_heads, 16), 9.0) for _ in "kv"]
    backend.rope_kv_write(qkv, positions, cos_sin, *codes, *lists, k_scale=scales[0], v_scale=scales[1])
    for i, (values, code, scale) in enumerate(zip(plain, codes, scales, strict=True)):
        wanted, wanted_scale = torch.full_like(code, 9), torch.full_like(scale, 9.0)
        for slot in (17, 2, 31, 9):
            x = values[slot // 16, :, slot % 16].float()
            peak = x.abs().amax(dim=1)
            inverse = torch.where(peak > 0, torch.full_like(peak, 127) / peak, 0)
            codes_of_x = (x.double() * inverse.double()[:, None]).round()
            wanted[slot // 16, :, slot % 16] = codes_of_x.nan_to_num(0).to(torch.int8)
            wanted_scale[slot // 16, :, slot % 16] = peak / 127
        broken = (0, i, 9)  # page, head and place of the NaN among keys, of the infinity among values
        assert not scale[broken].isfinite()
        scale[broken], wanted_scale[broken] = 0, 0
        code[broken], wanted[broken] = 0, 0
        assert torch.equal(code, wanted)
        torch.testing.assert_close(scale, wanted_scale, rtol=2**-23, atol=0)


@pytest.mark.parametrize(("seed", "rows", "vocabulary"), [*((s, 3, 333) for s in range(4)), (4, 12, 5000)])
def test_sampler(seed: int, rows: int, vocabulary: int):
    """The reference's tokens and the CPU's logprobs, of one block of the vocabulary and of several."""
    logits, batch = make_batch(np.random.default_rng(seed), rows, vocabulary)
    batch.logprobs = np.where(np.arange(rows) % 3, 4, -1).astype(np.int8)
    wanted = sample_reference(logits, batch)
    found = TritonSampler(torch.device("cpu"))(torch.from_numpy(logits.copy()), batch).wait()
    np.testing.assert_array_equal(found.status, wanted.status)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    cpu = sample_cpu(logits.copy(), batch)
    assert found.top is not None and cpu.top is not None
    for mine, theirs in zip((found.logprobs, *found.top), (cpu.logprobs, *cpu.top), strict=True):
        np.testing.assert_array_equal(mine, theirs)
