"""Norms of heads, RoPE, cache write and paged attention on random ragged batches: within a derived bound of float64
(helpers/attention_cases.py); and, on the CPU kernels, the same bits however a prompt is cut and whatever is beside it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from attention_cases import AttentionCase, Judge, Sequence, attention_cases, batch_of, make_attention, rope_table
from error_bounds import Bounded, check
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import BACKENDS, CPU, bits_equal, bounded, threads, using

from cai_runtime.errors import KernelError
from cai_runtime.kernels.attention import HeadLayout, HeadNorms

DTYPES = {"reference": [torch.float32, torch.bfloat16, torch.float16]}  # others: fp32


def check_steps(backend: str, case: AttentionCase, dtype: torch.dtype) -> None:
    g = case.generator()
    heads, sinks = case.heads, case.sink_logits(g)
    sequences, pages = case.sequences(g)
    quarter_turns = case.cache_dtype != torch.float32 or dtype != torch.float32
    table = rope_table(case.rotary_dim, quarter_turns=quarter_turns)
    scale = float(torch.tensor(heads.head_dim**-0.5))
    norms = case.head_norms(dtype)
    judge = Judge(heads, case.cache_dtype, table, quarter_turns, scale, sinks, case.page_size, norms)
    with using(backend) as name:
        attention = make_attention(name, heads, pages, case.page_size, case.cache_dtype, sinks, norms)
        for counts in case.counts:
            batch = batch_of(sequences, list(counts), case.page_size)
            qkv = torch.randn(sum(counts), heads.qkv_width, generator=g).to(dtype)
            out = attention(qkv.clone(), batch, table, scale)
            assert out.dtype == dtype
            seen = judge.remember(qkv, batch, sequences)

            def within(growth, seen=seen) -> Bounded:
                parts = [judge.attended(q, k, v, growth) for q, k, v in seen]
                whole = Bounded(torch.cat([p.value for p in parts]), torch.cat([p.error for p in parts]))
                return whole if dtype == torch.float32 else whole.rounded(dtype)

            check(out, within)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@bounded(40)
def test_ragged_steps_are_within_the_bound(backend: str, data: st.DataObject):
    dtype = data.draw(st.sampled_from(DTYPES.get(backend, [torch.float32])))
    check_steps(backend, data.draw(attention_cases(backend)), dtype)


@pytest.mark.parametrize("backend", CPU)
@given(data=st.data())
@bounded(40)
def test_chunks_neighbours_and_pages_do_not_change_the_bits(backend: str, data: st.DataObject):
    """The first sequence of a case, whole and alone in pages 0, 1, 2..., against random chunks in the case's company."""
    case = data.draw(attention_cases(backend))
    g = case.generator()
    heads, sinks, length = case.heads, case.sink_logits(g), case.lengths[0]
    sequences, pages = case.sequences(g)
    table = rope_table(case.rotary_dim, quarter_turns=False)
    qkv = torch.randn(length, heads.qkv_width, generator=g)
    with using(backend) as name:
        alone = make_attention(name, heads, pages, case.page_size, case.cache_dtype, sinks, case.head_norms())
        batch = batch_of([Sequence(list(range(pages)))], [length], case.page_size)
        whole = alone(qkv.clone(), batch, table, 0.3)

        cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=5))})
        company = make_attention(name, heads, pages, case.page_size, case.cache_dtype, sinks, case.head_norms())
        pieces, place = [], data.draw(st.integers(0, len(sequences) - 1))
        for step, (a, b) in enumerate(pairwise(cuts)):
            others = list(case.counts[step][1:]) if step < len(case.counts) else [0] * (len(sequences) - 1)
            order = sequences[1 : place + 1] + sequences[:1] + sequences[place + 1 :]
            counts = [*others[:place], b - a, *others[place:]]
            rows = [torch.randn(n, heads.qkv_width, generator=g) for n in counts]
            rows[place] = qkv[a:b]
            batch = batch_of(order, counts, case.page_size)
            with threads(data.draw(st.integers(1, 3))):
                out = company(torch.cat(rows), batch, table, 0.3)
            start = sum(counts[:place])
            pieces.append(out[start : start + b - a])
        assert bits_equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_prompt_among_single_tokens(backend: str):
    """400 positions, 25 pages; head_dim and rotary_dim that fill no vector."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = AttentionCase(2, 3, 37, 22, 16, dtype, None, False, ((1, 333, 17), (1, 1, 15), (1, 66, 1)), 5)
        check_steps(backend, case, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_sequence(backend: str):
    case = AttentionCase(1, 2, 16, 16, 16, torch.float32, None, False, ((20, 20),), 1)
    g = case.generator()
    sequences, pages = case.sequences(g)
    table, heads = rope_table(16, quarter_turns=False), case.heads
    qkv = torch.randn(40, heads.qkv_width, generator=g)
    bad = qkv.clone()
    bad[7, 0] = float("nan")  # head 0 of one query of the first sequence
    bad[12, heads.query_width] = float("inf")  # and a key: every later query of it
    with using(backend) as name:
        batch = batch_of(sequences, [20, 20], 16)
        clean = make_attention(name, heads, pages, 16, torch.float32)(qkv.clone(), batch, table, 0.25)
        out = make_attention(name, heads, pages, 16, torch.float32)(bad.clone(), batch, table, 0.25)
    assert bits_equal(out[20:], clean[20:])
    if backend != "reference":  # torch's products promise no bits when a neighbour changes
        assert bits_equal(out[:7], clean[:7])
        assert bits_equal(out[7, 16:], clean[7, 16:])
    assert out[7, :16].isnan().all()
    assert out[:7].isfinite().all() and out[8:12].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_pick_one_key(backend: str):
    """Scores of +-1e4: all weight on one key, none lost to overflow."""
    case = AttentionCase(1, 1, 8, 2, 16, torch.float32, None, False, ((40,),), 0)
    heads = case.heads
    sequences, pages = case.sequences(case.generator())
    qkv = torch.zeros(40, heads.qkv_width)
    qkv[:, 7] = 100.0  # of q, beyond the rotated dimensions
    qkv[:, 15] = torch.linspace(-100, 100, 40)  # of k: each later key fits better
    qkv[:, 16:] = torch.arange(40.0)[:, None]
    with using(backend) as name:
        attention = make_attention(name, heads, pages, 16, torch.float32)
        out = attention(qkv, batch_of(sequences, [40], 16), rope_table(2, quarter_turns=True), 1.0)
    assert torch.equal(out, torch.arange(40.0)[:, None].expand(40, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_heads_that_do_not_fit_are_refused(backend: str):
    norms = HeadNorms(torch.ones(2, 15), 1e-6)
    with using(backend) as name, pytest.raises(KernelError, match=r"\[2, 16\], not \[2, 15\]"):
        make_attention(name, HeadLayout(2, 1, 16, 16), 4, 16, torch.float32, norms=norms)
