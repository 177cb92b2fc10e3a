"""RoPE, KV cache write and paged attention: the CPU kernels against the reference, and bit for bit against themselves."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import fill_with_nan

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.attention import (
    CACHE_DTYPES,
    CpuAttention,
    CpuKVCache,
    HeadLayout,
    ReferenceAttention,
    ReferenceKVCache,
)
from cai_runtime.kernels.batch import AttentionBatch

PAGE = 16


def rope_table(positions: int, rotary_dim: int) -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angle = torch.arange(positions)[:, None] * frequency[None]
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


def batch_of(chunks: list[tuple[int, int, list[int]]]) -> AttentionBatch:
    """chunks: (start, count, pages) of each sequence."""
    positions, slots, starts, lengths = [], [], [0], []
    for start, count, pages in chunks:
        span = range(start, start + count)
        positions += span
        slots += [pages[p // PAGE] * PAGE + p % PAGE for p in span]
        starts.append(starts[-1] + count)
        lengths.append(start + count)
    width = max(len(pages) for *_, pages in chunks)
    table = [pages + [0] * (width - len(pages)) for *_, pages in chunks]
    return AttentionBatch.of(*(torch.tensor(t, dtype=torch.int32) for t in (positions, slots, starts, lengths, table)))


@pytest.mark.parametrize("isa", cpu_library.instruction_sets())
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(
    ("hq", "hkv", "dim", "rotary"), [(4, 4, 16, 16), (9, 3, 64, 64), (6, 2, 80, 32), (8, 1, 24, 24)]
)
def test_ragged_batches_match_float64(hq: int, hkv: int, dim: int, rotary: int, dtype: torch.dtype, isa: str):
    best = cpu_library.instruction_set()
    cpu_library.use_instruction_set(isa)
    try:
        g = torch.Generator().manual_seed(hq * dim)
        heads = HeadLayout(hq, hkv, dim, rotary)
        cpu = CpuAttention(heads, CpuKVCache(40, PAGE, heads, dtype))
        judge = ReferenceAttention(heads, ReferenceKVCache(40, PAGE, heads, dtype, torch.device("cpu")))
        table = rope_table(256, rotary)
        order = torch.randperm(40, generator=g).tolist()
        pages = [order[:8], order[8:16], order[16:20]]
        done = [0, 0, 0]
        for counts in ([37, 5, 16], [1, 60, 1], [1, 1, 1], [50, 1, 30], [3, 2, 1]):
            batch = batch_of([(done[i], n, pages[i]) for i, n in enumerate(counts)])
            qkv = torch.randn(sum(counts), heads.qkv_width, generator=g)
            out = cpu(qkv.clone(), batch, table, 1 / math.sqrt(dim))
            expected = judge(qkv.double(), batch, table.double(), 1 / math.sqrt(dim))
            # Keys are rounded into a narrower cache from values that differ in the last bit of fp32.
            tolerance = 2e-6 if dtype == torch.float32 else 2e-3
            assert float((out.double() - expected).norm() / expected.norm()) < tolerance
            done = [d + n for d, n in zip(done, counts, strict=True)]
    finally:
        cpu_library.use_instruction_set(best)


@pytest.mark.parametrize("isa", cpu_library.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_chunks_batches_and_page_ids_do_not_change_the_bits(dtype: torch.dtype, isa: str):
    best = cpu_library.instruction_set()
    cpu_library.use_instruction_set(isa)
    try:
        g = torch.Generator().manual_seed(5)
        heads = HeadLayout(6, 2, 32, 32)
        table = rope_table(128, 32)
        qkv = torch.randn(100, heads.qkv_width, generator=g)
        other = torch.randn(41, heads.qkv_width, generator=g)

        whole = CpuAttention(heads, CpuKVCache(20, PAGE, heads, dtype))
        expected = whole(qkv.clone(), batch_of([(0, 100, list(range(7)))]), table, 0.2)

        pieces = CpuAttention(heads, CpuKVCache(20, PAGE, heads, dtype))
        for cache in (pieces.cache.k, pieces.cache.v):
            fill_with_nan(cache)  # what another sequence left behind must not matter
        pages = [13, 2, 19, 5, 11, 0, 7]
        start, outs = 0, []
        for n in (1, 30, 2, 17, 1, 1, 48):
            chunk = torch.cat([qkv[start : start + n], other])
            batch = batch_of([(start, n, pages), (0, 41, [1, 3, 4])])
            outs.append(pieces(chunk, batch, table, 0.2)[:n])
            start += n
        assert torch.equal(torch.cat(outs), expected)
    finally:
        cpu_library.use_instruction_set(best)


@pytest.mark.parametrize("made", [CpuKVCache, ReferenceKVCache])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_copied_pages_are_the_same(dtype: torch.dtype, made: type):
    """41 pages take no whole number of the system's own pages: the memory has more than was asked for."""
    heads = HeadLayout(2, 1, 16, 16)
    device = (torch.device("cpu"),) if made is ReferenceKVCache else ()
    cache = made(41, PAGE, heads, dtype, *device)
    parts = [cache.k, cache.v]
    if made is ReferenceKVCache and dtype == torch.int8:
        parts += [cache.k_scale, cache.v_scale]
    for part in parts:
        part.copy_((torch.arange(part.numel()) % 97).view(part.shape))
    before = [part.clone().view(41, -1) for part in parts]
    cache.copy_pages(torch.tensor([0, 40, 3]), torch.tensor([7, 8, 39]))
    for part, old in zip(parts, before, strict=True):
        old[[7, 8, 39]] = old[[0, 40, 3]]
        assert torch.equal(part.view(41, -1), old)


def test_pages_before_the_window_may_be_gone():
    """A cache group that slides frees them; their entries in the page table mean nothing any more."""
    heads, g = HeadLayout(4, 2, 16, 16, window=20), torch.Generator().manual_seed(2)
    table, qkv = rope_table(128, 16), torch.randn(101, heads.qkv_width, generator=g)
    attention = CpuAttention(heads, CpuKVCache(8, PAGE, heads, torch.float32))
    pages = [3, 1, 5, 0, 2, 6, 4]
    attention(qkv[:100].clone(), batch_of([(0, 100, pages)]), table, 0.2)
    expected = attention(qkv[100:].clone(), batch_of([(100, 1, pages)]), table, 0.2)
    gone = batch_of([(100, 1, [-1, 99, -1, -1, -1, *pages[5:]])])  # the window begins at position 81, on page 5
    assert torch.equal(attention(qkv[100:].clone(), gone, table, 0.2), expected)
    with pytest.raises(KernelError, match="page -1 is outside the cache's 8"):
        attention(qkv[100:].clone(), batch_of([(100, 1, [-1, -1, -1, -1, -1, -1, 4])]), table, 0.2)


@pytest.mark.parametrize("made", [CpuKVCache, ReferenceKVCache])
@pytest.mark.parametrize("rows", [1, 30])
def test_what_lies_before_the_window_is_not_read(made: type, rows: int):
    """The page table names another sequence's page there, which holds NaN; so does the page where the window begins."""
    heads, g = HeadLayout(4, 2, 16, 16, window=20), torch.Generator().manual_seed(2)
    table, qkv = rope_table(160, 16), torch.randn(100 + rows, heads.qkv_width, generator=g)
    if made is CpuKVCache:
        attention: CpuAttention | ReferenceAttention = CpuAttention(heads, CpuKVCache(10, PAGE, heads, torch.float32))
    else:
        cache = ReferenceKVCache(10, PAGE, heads, torch.float32, torch.device("cpu"))
        attention = ReferenceAttention(heads, cache)
    pages = [3, 1, 5, 0, 2, 6, 4, 8, 9]
    attention(qkv[:100].clone(), batch_of([(0, 100, pages)]), table, 0.2)
    expected = attention(qkv[100:].clone(), batch_of([(100, rows, pages)]), table, 0.2)
    bad = qkv[:100].clone()
    bad[81:] = torch.nan  # another sequence, in a page of its own and in the beginning of page 6
    attention(bad[84:].clone(), batch_of([(0, 16, [7])]), table, 0.2)
    attention(bad[99:].clone(), batch_of([(80, 1, pages)]), table, 0.2)
    slid = batch_of([(100, rows, [7, 7, 7, 7, 7, *pages[5:]])])  # the window begins at position 81
    assert torch.equal(attention(qkv[100:].clone(), slid, table, 0.2), expected)


@pytest.mark.parametrize("isa", cpu_library.instruction_sets())
def test_what_no_code_can_hold_makes_a_cache_of_int8_nan(isa: str):
    """An infinite or NaN key must not vanish in the rounding: the engine finds such a sequence by its logits."""
    best = cpu_library.instruction_set()
    cpu_library.use_instruction_set(isa)
    try:
        heads = HeadLayout(2, 1, 16, 16)
        for bad in (math.inf, math.nan):
            for column in (2 * 16 + 3, 3 * 16 + 5):  # of a key, of a value
                attention = CpuAttention(heads, CpuKVCache(2, PAGE, heads, torch.int8))
                qkv = torch.randn(20, heads.qkv_width, generator=torch.Generator().manual_seed(1))
                qkv[4, column] = bad
                out = attention(qkv, batch_of([(0, 20, [0, 1])]), rope_table(32, 16), 0.2)
                assert out[:4].isfinite().all() and out[4:].isnan().any(dim=1).all()
    finally:
        cpu_library.use_instruction_set(best)


def test_unsupported_shapes_are_refused():
    heads = HeadLayout(4, 2, 32, 32)
    with pytest.raises(KernelError, match="page_size"):
        CpuKVCache(4, 24, heads, torch.float32)
    with pytest.raises(KernelError, match="head_dim"):
        CpuKVCache(4, 16, HeadLayout(4, 2, 1024, 64), torch.float32)
    with pytest.raises(KernelError, match="fp32, bf16, fp16 or int8"):
        CpuKVCache(4, 16, heads, torch.float64)
