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
from kernel_cases import BACKENDS, bounded, sizes, using

from cai_runtime.errors import KernelError
from cai_runtime.kernels.attention import HeadLayout, ReferenceKVCache
from cai_runtime.kernels.batch import AttentionBatch, PageTable
from cai_runtime.kernels.cross_attention import TorchCrossAttention
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
