"""Attention to encoder outputs in pages: within a derived bound of float64, and on the CPU kernels the same bits alone, in a
batch, beside beams of the same output, with any number of threads and in a recorded pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from error_bounds import Bounded, check
from full_attention import all_heads, weighted
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import BACKENDS, CPU, bits_equal, bounded, sizes, threads, using

from cai_runtime.errors import KernelError
from cai_runtime.kernels.activation import swiglu_cpu
from cai_runtime.kernels.attention import HeadLayout, ReferenceKVCache
from cai_runtime.kernels.batch import AttentionBatch, PageTable
from cai_runtime.kernels.cross_attention import TorchCrossAttention
from cai_runtime.kernels.program import Axis, Input, Program, record
from cai_runtime.kernels.slim_linear import CpuLinear
from cai_runtime.kernels.weights import Core, LinearWeights
from cai_runtime.layers.ops import make_ops

CPU_DEVICE = torch.device("cpu")
GROUP = "encoder"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """Encoder outputs in pages dealt at random, and sequences over them. sequences: (output, rows of q) of each."""

    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    rows: int
    outputs: int
    sequences: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.float32
    reach: float = 1.0  # the standard deviation of scores
    seed: int = 0

    @property
    def heads(self) -> HeadLayout:
        return HeadLayout(self.kv_heads * self.group, self.kv_heads, self.head_dim, 0)

    @property
    def scale(self) -> float:
        return self.reach * self.head_dim**-0.5

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, kv, and pages [outputs, pages of one], out of a few more than are needed."""
        g = torch.Generator().manual_seed(self.seed)
        kv = torch.randn(self.outputs * self.rows, 2 * self.kv_heads * self.head_dim, generator=g)
        q = torch.randn(sum(n for _, n in self.sequences), self.heads.query_width, generator=g)
        each = -(-self.rows // self.page_size)
        pages = torch.randperm(self.outputs * each + 3, generator=g)[: self.outputs * each].view(-1, each).int()
        return q, kv, pages

    def layer(self, name: str) -> Any:
        """A layer whose cache is full of NaN: what another output left behind must not matter."""
        ops = make_ops(name, CPU_DEVICE)
        cache: Any = ops.kv_cache(
            self.heads, self.outputs * -(-self.rows // self.page_size) + 3, self.page_size, self.dtype
        )
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
        return ops.cross_attention(self.heads, cache, self.rows, GROUP)


def batch_of(sequences: list[tuple[torch.Tensor, int]]) -> AttentionBatch:
    """(pages of its output, rows) of each sequence. The encoder's group has no slots; the table has a column more."""

    def ints(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    counts = [n for _, n in sequences]
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    pages = torch.stack([torch.cat([p, ints([-1])]) for p, _ in sequences])
    positions = ints([i for n in counts for i in range(n)])
    return AttentionBatch(positions, ints(starts), ints(counts), {GROUP: PageTable(ints([]), pages)})


def check_case(case: Case, attention: Any) -> None:
    q, kv, pages = case.tensors()
    attention.write(kv, pages)
    out = attention(q, batch_of([(pages[o], n) for o, n in case.sequences]), case.scale)
    stored = kv.to(case.dtype).double().view(case.outputs, case.rows, 2, case.kv_heads, case.head_dim)

    def within(growth) -> Bounded:
        parts, start = [], 0
        for output, n in case.sequences:
            rows = q[start : start + n].view(n, case.heads.query_heads, case.head_dim)
            parts.append(all_heads(rows, *stored[output].unbind(1), case.scale, growth))
            start += n
        return Bounded(torch.cat([p.value for p in parts]), torch.cat([p.error for p in parts]))

    check(out, within)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    outputs = draw(st.integers(1, 3))
    sequence = st.tuples(st.integers(0, outputs - 1), st.sampled_from([1, 1, 1, 0, 2, 7, 8, 9, 17, 40]))
    return Case(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 9)),
        draw(sizes(200)),
        draw(st.sampled_from([16, 32, 48, 64])),
        draw(sizes(200) | st.sampled_from([255, 256, 257, 600])),
        outputs,
        tuple(draw(st.lists(sequence, min_size=1, max_size=9))),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([0.1, 1, 30])),
        draw(st.integers(0, 2**31)),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
@bounded(50)
def test_batches_are_within_the_bound(backend: str, case: Case):
    with using(backend) as name:
        check_case(case, case.layer(name))


def test_torch_on_another_device():
    """What a GPU runs, here on the CPU: steps of single rows, and one with a prompt."""
    for sequences in (((0, 1), (1, 1), (0, 1)), ((0, 0), (1, 2)), ((0, 1), (1, 5))):
        for group in (1, 2):
            case = Case(2, group, 16, 16, 40, 2, sequences)
            cache = ReferenceKVCache(9, 16, case.heads, torch.float32, CPU_DEVICE)
            check_case(case, TorchCrossAttention(case.heads, cache, 40, GROUP))


def test_the_reference_computes_in_float64():
    case = Case(2, 1, 16, 16, 40, 1, ((0, 3),), torch.float64)
    q, kv, pages = (t if t.dtype == torch.int32 else t.double() for t in case.tensors())
    layer = case.layer("reference")
    layer.write(kv, pages)
    k, v = kv.view(40, 2, 2, 16).transpose(0, 2).unbind(1)
    expected = (q.view(3, 2, 16).transpose(0, 1) @ k.mT * 0.3).softmax(-1) @ v
    out = layer(q, batch_of([(pages[0], 3)]), 0.3)
    torch.testing.assert_close(out, expected.transpose(0, 1).reshape(3, -1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), data=st.data())
@bounded(20)
def test_weights_are_the_softmax_of_the_heads(backend: str, case: Case, data: st.DataObject):
    q, kv, pages = case.tensors()
    heads = data.draw(st.lists(st.integers(0, case.heads.query_heads - 1), min_size=1, max_size=4))
    with using(backend) as name:
        layer = case.layer(name)
        layer.write(kv, pages)
        got = layer.weights(q, pages[0], heads, case.scale)
    assert got.dtype == torch.float32 and got.shape == (len(heads), len(q), case.rows)
    k = kv.to(case.dtype)[: case.rows].view(case.rows, 2, case.kv_heads, case.head_dim)[:, 0]
    for found, head in zip(got, heads, strict=True):
        rows = q.view(len(q), case.heads.query_heads, case.head_dim)[:, head]
        check(found, lambda g, rows=rows, head=head: weighted(rows, k[:, head // case.group], case.scale, g))


def recorded(layer: Any, case: Case) -> tuple[Program, Program]:
    """The write and the attention."""
    write = record(
        lambda kv, pages: layer.write(kv, pages),
        {"kv": Input(Axis.ENCODER, layer.kv_width), "pages": Input(Axis.SEQUENCES, layer.pages, torch.int32)},
    )
    attend = record(lambda q: layer(q, None, case.scale), {"q": Input(Axis.TOKENS, case.heads.query_width)})
    return write, attend


@pytest.mark.parametrize("backend", CPU)
@given(case=cases())
@bounded(25)
def test_neighbours_beams_threads_and_recording_do_not_change_the_bits(backend: str, case: Case):
    """Each sequence alone on one thread, against all of them in two orders: as drawn, and by output, where beams are next to
    each other. Outputs are written one by one and together."""
    q, kv, pages = case.tensors()
    starts = [sum(n for _, n in case.sequences[:i]) for i in range(len(case.sequences))]
    rows = [q[a : a + n] for a, (_, n) in zip(starts, case.sequences, strict=True)]
    outputs = [o for o, _ in case.sequences]
    with using(backend) as name:
        apart, layer, other = case.layer(name), case.layer(name), case.layer(name)
        write, attend = recorded(other, case)
        with threads(1):
            for window, its in zip(kv.split(case.rows), pages.split(1), strict=True):
                apart.write(window, its)
            alone = [apart(r, batch_of([(pages[o], len(r))]), case.scale) for r, o in zip(rows, outputs, strict=True)]
            weights = apart.weights(q[:1], pages[0], [0], case.scale)
        layer.write(kv, pages)
        assert write(kv=kv, pages=pages).tolist() == [[0.0]] * case.outputs
        for mine, theirs in ((layer.cache, apart.cache), (other.cache, apart.cache)):
            assert bits_equal(mine.k, theirs.k) and bits_equal(mine.v, theirs.v)
        for order in (range(len(rows)), sorted(range(len(rows)), key=lambda i: outputs[i])):
            batch = batch_of([(pages[outputs[i]], len(rows[i])) for i in order])
            together = torch.cat([rows[i] for i in order])
            expected = torch.cat([alone[i] for i in order])
            for n in (1, 2, 5):
                with threads(n):
                    assert bits_equal(layer(together, batch, case.scale), expected)
                    assert bits_equal(attend(batch, q=together), expected)
                    assert bits_equal(layer.weights(q, pages[0], [0], case.scale)[:, :1], weights)


@pytest.mark.parametrize("backend", CPU)
def test_nan_stays_in_its_row_or_output(backend: str):
    case = Case(2, 1, 16, 16, 300, 3, ((0, 1), (0, 1), (1, 1), (2, 1)))
    q, kv, pages = case.tensors()
    q, kv = q.clone(), kv.clone()
    with using(backend) as name:
        layer = case.layer(name)
        batch = batch_of([(pages[o], n) for o, n in case.sequences])
        layer.write(kv, pages)
        clean = layer(q, batch, case.scale)
        q[0, 0] = float("nan")  # head 0 of a beam
        kv[599, 0] = float("nan")  # head 0 of the last key of output 1
        kv[600, 32 + 16] = float("inf")  # head 1 of the first value of output 2
        layer.write(kv, pages)
        out = layer(q, batch, case.scale)
    spoilt = torch.zeros(4, 32, dtype=torch.bool)
    spoilt[0, :16] = spoilt[2, :16] = spoilt[3, 16] = True
    assert not out[spoilt].isfinite().any()
    assert bits_equal(out[~spoilt], clean[~spoilt])


def test_a_decoder_and_its_encoder_share_a_program():
    """Self-attention with slots and cross-attention without, over cache groups of their own in one recorded pass. In the
    second step both attend by splits, whose states lie in the same memory."""
    heads, g = HeadLayout(2, 2, 16, 16), torch.Generator().manual_seed(0)
    case = Case(2, 1, 16, 16, 300, 2, ())
    _, kv, pages = case.tensors()
    cross = [case.layer("cpu") for _ in range(2)]
    ops = make_ops("cpu", CPU_DEVICE)
    own = [ops.attention(heads, ops.kv_cache(heads, 24, 16, torch.float32)) for _ in range(2)]
    cos_sin = torch.cat([torch.ones(400, 8), torch.zeros(400, 8)], 1)
    for layer in cross:
        layer.write(kv, pages)

    def decoder(qkv, batch=None):
        for attention, layer in zip(own, cross, strict=True):
            qkv = swiglu_cpu(cross_qkv(layer(attention(qkv, batch, cos_sin, 0.25), batch, 0.25)))
        return qkv

    weight = Core(torch.randn(2 * heads.qkv_width, heads.query_width, generator=g) / 6)
    cross_qkv = CpuLinear([LinearWeights("dense", heads.query_width, 2 * heads.qkv_width, (weight,))])
    program = record(decoder, {"qkv": Input(Axis.TOKENS, heads.qkv_width)})
    for rows, length in ((299, 299), (1, 300)):
        batch = batch_of([(pages[0], rows), (pages[1], 1)])
        positions = torch.tensor([*range(length - rows, length), 0], dtype=torch.int32)
        table = torch.stack([torch.arange(20), torch.arange(4, 24)]).int()
        slots = torch.cat([positions[:-1], torch.tensor([23 * 16])]).int()
        table[1, 0] = 23
        tables = {**batch.tables, "full": PageTable(slots, table)}
        lengths = torch.tensor([length, 1], dtype=torch.int32)
        batch = AttentionBatch(positions, batch.query_start, lengths, tables)
        qkv = torch.randn(rows + 1, heads.qkv_width, generator=g)
        with threads(3):
            assert bits_equal(program(batch, qkv=qkv.clone()), decoder(qkv.clone(), batch))
        tables["full"] = PageTable(slots[:0], table)
        with pytest.raises(KernelError, match="slots must be int32 of .* where keys and values are written, not empty"):
            program(batch, qkv=qkv)


def test_batches_that_do_not_fit_are_refused():
    case = Case(2, 1, 16, 16, 40, 2, ((0, 2), (1, 1)))
    q, kv, pages = case.tensors()
    layer = case.layer("cpu")
    layer.write(kv, pages)
    write, attend = recorded(layer, case)
    good = batch_of([(pages[0], 2), (pages[1], 1)])

    def changed(starts: list[int] | None = None, table: torch.Tensor | None = None) -> AttentionBatch:
        start = good.query_start if starts is None else torch.tensor(starts, dtype=torch.int32)
        its = PageTable(good.tables[GROUP].slots, good.tables[GROUP].pages if table is None else table)
        return AttentionBatch(good.positions, start, good.context_len, {GROUP: its})

    outside = good.tables[GROUP].pages.clone()
    outside[1, 2] = layer.cache.pages
    for batch, why in (
        (changed([0, 2, 4]), "sequence 1 has rows 2 to 4 of 3"),
        (changed([0, 2, 1]), "sequence 1 has rows 2 to 1 of 3"),
        (changed([-1, 2, 3]), "query_start"),
        (changed(table=outside), "page 9 is outside the cache's 9"),
        (changed(table=pages[:, :2].contiguous()), "40 positions take 3 pages, and page_table has 2"),
    ):
        for run in (lambda b=batch: layer(q, b, 1.0), lambda b=batch: attend(b, q=q)):
            with pytest.raises(KernelError, match=why):
                run()
    for run in (lambda: layer.write(kv, pages + 8), lambda: write(kv=kv, pages=pages + 8)):
        with pytest.raises(KernelError, match="is outside the cache's 9"):
            run()
    with pytest.raises(KernelError, match="2 encoder outputs have 80 rows of keys and values, not 79"):
        write(kv=kv[:79], pages=pages)
    with pytest.raises(KernelError, match="is outside the cache's 9"):
        layer.weights(q, pages[0] - 9, [0], 1.0)
    with pytest.raises(KernelError, match="attends rows of tokens"):
        record(lambda q: layer(q, None, 1.0), {"q": Input(Axis.SEQUENCES, case.heads.query_width)})


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_what_does_not_fit_is_refused(name: str):
    case = Case(2, 2, 16, 16, 40, 2, ((0, 3),))
    q, kv, pages = case.tensors()
    layer = case.layer(name)
    with pytest.raises(KernelError, match=r"\[outputs \* 40, 64\], not \[39, 64\]"):
        layer.write(kv[:39], pages)
    with pytest.raises(KernelError, match=r"pages of 2 outputs are int32 \[2, 3\], not torch.int32 \[1, 3\]"):
        layer.write(kv, pages[:1])
    with pytest.raises(KernelError, match="not torch.int64"):
        layer.write(kv, pages.long())
    with pytest.raises(KernelError, match="query head 4 is none of the layer's 4"):
        layer.weights(q, pages[0], [4], 1.0)
    ops, cache = make_ops(name, CPU_DEVICE), layer.cache
    with pytest.raises(KernelError, match="no sliding window"):
        ops.cross_attention(HeadLayout(2, 2, 16, 0, window=4), cache, 40, GROUP)
    with pytest.raises(KernelError, match="whole groups"):
        ops.cross_attention(HeadLayout(3, 2, 16, 0), cache, 40, GROUP)
    with pytest.raises(KernelError, match="1 position or more, not 0"):
        ops.cross_attention(case.heads, cache, 0, GROUP)
