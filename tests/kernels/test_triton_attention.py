"""Triton paged attention against float64: interpreted on the CPU, or compiled where there is a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_triton_interpreted.py runs these with TRITON_INTERPRET=1", allow_module_level=True)

from cai_runtime.errors import KernelError
from cai_runtime.kernels import triton as backend
from cai_runtime.kernels.quantized_rows import quantize_rows
from cai_runtime.kernels.triton import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass
class Batch:
    """Sequences of (new tokens, context length) over shuffled pages; pages that nobody owns hold NaN."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    page_table: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    scales: list[torch.Tensor] | None = None  # of an int8 cache

    def run(self, scale: float, **options) -> torch.Tensor:
        arguments = (self.q, self.k_cache, self.v_cache, self.query_start, self.context_len, self.page_table)
        if self.scales is not None:
            options |= {"k_scale": self.scales[0], "v_scale": self.scales[1]}
        return backend.paged_attention(*arguments, scale, **options)

    def in_int8(self) -> Batch:
        """The same with an int8 cache, and the keys and values that it holds."""
        caches, scales, kept = [], [], []
        for cache, side in ((self.k_cache, self.keys), (self.v_cache, self.values)):
            codes, scale = quantize_rows(cache.flatten(0, 2))  # a page of NaN has NaN scales
            caches.append(codes.view(cache.shape))
            scales.append(scale.view(cache.shape[:3]))
            held = [quantize_rows(x.flatten(0, 1)) for x in side]
            kept.append(
                [(c.double() * s.double()[:, None]).view(x.shape) for (c, s), x in zip(held, side, strict=True)]
            )
        return replace(self, k_cache=caches[0], v_cache=caches[1], keys=kept[0], values=kept[1], scales=scales)

    def expected(self, scale: float, window: int | None = None, sinks: torch.Tensor | None = None) -> torch.Tensor:
        out = []
        starts = self.query_start.tolist()
        for s, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            q = self.q[starts[s] : starts[s + 1]].double()
            new, context = q.shape[0], k.shape[0]
            group = q.shape[1] // k.shape[1]
            k, v = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            at = torch.arange(context, device=q.device)
            distance = at[context - new :, None] - at[None, :]
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            scores = scores.masked_fill(hidden, float("-inf"))
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, new, 1)], dim=-1)
            weights = scores.softmax(-1)[..., :context]
            out.append(torch.einsum("hqk,khd->qhd", weights, v).reshape(new, -1))
        return torch.cat(out)


def batch(
    sequences: list[tuple[int, int]],
    heads: tuple[int, int, int],
    page_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
) -> Batch:
    q_heads, kv_heads, dim = heads
    counts = [-(-context // page_size) for _, context in sequences]
    order = torch.randperm(sum(counts) + 2).tolist()
    shape = (len(order), kv_heads, page_size, dim)
    caches = [torch.full(shape, torch.nan, dtype=cache_dtype or dtype) for _ in range(2)]
    table = torch.full((len(sequences), max(counts) + 1), 10**6, dtype=torch.int32)
    kept: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for s, (_, context) in enumerate(sequences):
        pages = [order.pop() for _ in range(counts[s])]
        table[s, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        for cache, side in zip(caches, kept, strict=True):
            x = torch.randn(context, kv_heads, dim).to(cache.dtype)
            side.append(x.to(DEVICE))
            for p in range(context):
                cache[pages[p // page_size], :, p % page_size] = x[p]
    new = torch.tensor([0] + [n for n, _ in sequences]).cumsum(0).to(torch.int32)
    q = torch.randn(int(new[-1]), q_heads + 1, dim).to(dtype)[:, :q_heads]  # rows lie apart
    context_len = torch.tensor([c for _, c in sequences], dtype=torch.int32)
    moved = (t.to(DEVICE) for t in (q, *caches, new, context_len, table))
    return Batch(*moved, *kept)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - wanted).norm() / wanted.norm())


RAGGED = [(3, 3), (1, 70), (11, 40), (1, 1), (5, 21)]
DECODE = [(1, 1), (1, 16), (1, 17), (1, 131)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("sequences", [RAGGED, DECODE, [(40, 40)]], ids=["ragged", "decode", "prompt"])
def test_matches_float64(dtype: torch.dtype, sequences: list[tuple[int, int]]):
    torch.manual_seed(0)
    b = batch(sequences, (6, 2, 32), 16, dtype)
    assert relative_error(b.run(32**-0.5), b.expected(32**-0.5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [(1, 1, 8), (7, 1, 48), (4, 4, 20), (40, 1, 16), (2, 1, 256)])
@pytest.mark.parametrize("page_size", [1, 5, 32])
def test_head_counts_and_page_sizes(heads: tuple[int, int, int], page_size: int):
    torch.manual_seed(1)
    b = batch([(2, 9), (1, 33), (7, 7)], heads, page_size, torch.float32)
    assert relative_error(b.run(0.3), b.expected(0.3)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("sequences", [RAGGED, DECODE, [(40, 40)]], ids=["ragged", "decode", "prompt"])
def test_a_cache_of_int8(dtype: torch.dtype, sequences: list[tuple[int, int]]):
    torch.manual_seed(0)
    b = batch(sequences, (6, 2, 32), 16, dtype).in_int8()
    assert relative_error(b.run(32**-0.5), b.expected(32**-0.5)) < TOLERANCE[dtype]


def test_scales_that_do_not_fit_the_cache_are_refused():
    torch.manual_seed(0)
    plain = batch(RAGGED, (4, 2, 16), 16, torch.float32)
    b = plain.in_int8()
    ones = torch.ones_like(b.scales[0])
    for wrong, message in (
        (replace(b, scales=None), "an int8 cache needs k_scale"),
        (replace(plain, scales=b.scales), "k_scale is of an int8 cache"),
        (replace(b, scales=[ones[:-1], ones]), "k_scale has shape"),
        (replace(b, scales=[ones, ones.double()]), "v_scale is torch.float64"),
    ):
        with pytest.raises(KernelError, match=message):
            wrong.run(0.25)


def test_cache_of_another_dtype():
    torch.manual_seed(2)
    b = batch(RAGGED, (4, 2, 16), 16, torch.float32, torch.bfloat16)
    assert relative_error(b.run(0.25), b.expected(0.25)) < TOLERANCE[torch.float32]


def test_sequences_without_new_tokens():
    torch.manual_seed(3)
    b = batch([(0, 5), (2, 6), (0, 0), (0, 1), (1, 3), (0, 4)], (2, 1, 16), 4, torch.float32)
    busy = batch([(0, 0)], (2, 1, 16), 4, torch.float32)
    keep = [1, 4]
    expected = Batch(
        b.q, b.k_cache, b.v_cache, torch.tensor([0, 2, 3]), b.context_len[keep], b.page_table[keep],
        [b.keys[i] for i in keep], [b.values[i] for i in keep],
    ).expected(0.25)  # fmt: skip
    assert relative_error(b.run(0.25), expected) < TOLERANCE[torch.float32]
    assert busy.run(0.25).shape == (0, 32)


LONG = [(1, 1030), (1, 256), (1, 257)]  # five splits, one, two


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("window", [None, 600])
def test_decode_over_several_splits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int | None):
    """Each split by a program of its own, then all by one: against float64, and the same bits."""
    torch.manual_seed(6)
    b = batch(LONG, (4, 2, 16), 16, dtype)
    sinks = torch.randn(4, device=DEVICE) if window else None
    apart = b.run(0.25, window=window, sinks=sinks)
    assert relative_error(apart, b.expected(0.25, window, sinks)) < TOLERANCE[dtype]
    for name in ("FULL_GRID", "MOST_SCRATCH"):
        with monkeypatch.context() as patch:
            patch.setattr(attention, name, 0)
            assert torch.equal(b.run(0.25, window=window, sinks=sinks), apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.skipif(DEVICE != "cuda", reason="products of warp groups, which an interpreter knows nothing of")
def test_bits_do_not_depend_on_the_instruction(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int | None):
    """Of a prompt whose tiles have 128 rows on Hopper: those of tiles of 32 rows."""
    torch.manual_seed(8)
    b = batch([(700, 900), (1, 530), (300, 300)], (8, 2, 128), 16, dtype)
    many = b.run(128**-0.5, window=window)
    assert relative_error(many, b.expected(128**-0.5, window)) < TOLERANCE[dtype]
    monkeypatch.setattr(attention, "MANY_TOKENS", 1 << 30)
    assert torch.equal(b.run(128**-0.5, window=window), many)


@pytest.mark.parametrize("window", [1, 7, 16, 33])
def test_sliding_window_and_sinks_of_a_ragged_step(window: int):
    torch.manual_seed(7)
    b = batch(RAGGED, (6, 2, 16), 16, torch.float32)
    sinks = 2 * torch.randn(6, device=DEVICE)
    for options in ({"window": window}, {"window": window, "sinks": sinks}, {"sinks": sinks}):
        assert relative_error(b.run(0.25, **options), b.expected(0.25, **options)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("one_program", [False, True])
@pytest.mark.parametrize("window", [7, 33, 600])
def test_what_lies_before_the_window_is_not_read(monkeypatch: pytest.MonkeyPatch, window: int, one_program: bool):
    """The page table names another sequence's page there, which holds NaN; so do keys of the page where the window begins.
    Decode, in splits and in one program, and a prompt's rows."""
    if one_program:
        monkeypatch.setattr(attention, "FULL_GRID", 0)
    for sequences in ([(1, 70), (1, 1030)], [(11, 90)]):
        torch.manual_seed(7)
        b = batch(sequences, (6, 2, 16), 16, torch.float32)
        wanted = b.expected(0.25, window)
        nobodys = next(
            p for p in range(len(b.k_cache)) if p not in b.page_table.tolist()[0] + b.page_table.tolist()[-1]
        )
        for s, (new, context) in enumerate(sequences):
            first = max(0, context - new - window + 1)
            page = int(b.page_table[s, first // 16])
            b.k_cache[page, :, : first % 16] = b.v_cache[page, :, : first % 16] = torch.nan
            b.page_table[s, : first // 16] = nobodys
        assert relative_error(b.run(0.25, window=window), wanted) < TOLERANCE[torch.float32]


def test_rows_beyond_the_last_sequence_are_left_alone():
    """Padding of a captured graph: rows that no sequence owns, and sequences without tokens."""
    torch.manual_seed(8)
    b = batch([(1, 700), (1, 3), (0, 0)], (2, 1, 16), 16, torch.float32)
    wanted = b.run(0.25)
    b.q = torch.cat([b.q, torch.full_like(b.q[:1], torch.nan)])
    assert torch.equal(b.run(0.25)[:2], wanted)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("window", [None, 40])
def test_bits_do_not_depend_on_chunking_or_on_the_batch(ordered_sums, dtype: torch.dtype, window: int | None):
    """Rows of a prompt, alone as decode steps (split and not) and in chunks; across the border of a split."""
    torch.manual_seed(4)
    big = DEVICE == "cuda"
    b = batch([(20, 530), (9, 77)], (6, 2, 64) if big else (2, 1, 16), 16, dtype)
    options = {"window": window, "sinks": torch.randn(b.q.shape[1], device=DEVICE)}
    whole = b.run(0.125, **options)
    for start, stop in ((0, 20), (0, 1), (1, 2), (2, 3), (19, 20), (0, 17), (3, 20)):
        length = torch.tensor([510 + stop], dtype=torch.int32, device=DEVICE)
        rows = torch.tensor([0, stop - start], dtype=torch.int32, device=DEVICE)
        alone = backend.paged_attention(
            b.q[start:stop], b.k_cache, b.v_cache, rows, length, b.page_table[:1], 0.125, **options
        )
        assert torch.equal(alone, whole[start:stop])


def test_bad_arguments_are_named():
    torch.manual_seed(5)
    b = batch([(2, 5)], (4, 2, 8), 4, torch.float32)
    ok = [b.q, b.k_cache, b.v_cache, b.query_start, b.context_len, b.page_table, 0.3]
    cases = [
        (0, b.q[0], r"q must be a tensor of shape \[M, Hq, D\]"),
        (0, b.q[:, :3], "q's 3 heads|no multiple|not a multiple"),
        (0, b.q.double(), "q is torch.float64"),
        (1, b.k_cache[..., :7], "k_cache has shape"),
        (2, b.v_cache[:, :1], "v_cache has shape"),
        (3, b.query_start.long(), "query_start is torch.int64"),
        (3, b.query_start[:1], "query_start has shape"),
        (4, b.context_len.long(), "context_len is torch.int64"),
        (5, b.page_table[0], "page_table has shape"),
    ]
    for at, bad, message in cases:
        arguments = [*ok[:at], bad, *ok[at + 1 :]]
        with pytest.raises(KernelError, match=message):
            backend.paged_attention(*arguments)
    with pytest.raises(KernelError, match="at least 1 position"):
        backend.paged_attention(*ok, window=0)
    with pytest.raises(KernelError, match="sinks has shape"):
        backend.paged_attention(*ok, sinks=torch.zeros(3, device=DEVICE))
