"""Recorded passes: typed values, their places in the workspace, and the bits of the single calls."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_cases import Sequence, batch_of, rope_table
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import random_linear

from cai_runtime.errors import KernelError
from cai_runtime.kernels.activation import swiglu_cpu
from cai_runtime.kernels.attention import CpuAttention, CpuKVCache, HeadLayout, HeadNorms
from cai_runtime.kernels.batch import AttentionBatch, PageTable
from cai_runtime.kernels.embedding import CpuEmbedding, take_rows
from cai_runtime.kernels.norm import RmsNorm, rms_norm_cpu
from cai_runtime.kernels.prepare import prepare
from cai_runtime.kernels.program import Axis, Input, NotRecordable, Program, Recorder, Value, place, record
from cai_runtime.kernels.slim_linear import CpuLinear

WIDTH = 24
HEADS = HeadLayout(4, 2, 6, 6)
IDS, WANTED = Input(Axis.TOKENS, 1, torch.int32), Input(Axis.WANTED, 1, torch.int32)


def linear(inp: int, out: int, seed: int = 0) -> CpuLinear:
    g = torch.Generator().manual_seed(seed)
    weights = random_linear("interpolative", inp, out, 9, ["fp32", "int8"], True, g)
    prepared = prepare([weights], backend="cpu")
    assert isinstance(prepared, CpuLinear)
    return prepared


class Model:
    """Embedding, two attention layers over cache groups of their own, an MLP, and the head."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        self.head = CpuLinear([random_linear("dense", WIDTH, 50, 0, ["fp32"], False, g)])
        self.embed = CpuEmbedding(self.head)
        self.qkv = [linear(WIDTH, HEADS.qkv_width, i) for i in (2, 3)]
        norms = HeadNorms(torch.rand(2, HEADS.head_dim, generator=g) + 0.5, 1e-6)
        self.attention = [
            CpuAttention(HEADS, CpuKVCache(12, 16, HEADS, torch.float32), None, name, its)
            for name, its in (("a", None), ("b", norms))
        ]
        self.output = [linear(HEADS.query_width, WIDTH, i) for i in (4, 5)]
        self.up, self.down = linear(WIDTH, 64, 6), linear(32, WIDTH, 7)
        self.norm = RmsNorm(torch.rand(WIDTH, generator=g) + 0.5, 1e-5)
        self.cos_sin = rope_table(6, quarter_turns=False)

    def __call__(self, ids, wanted, batch=None):
        x = self.embed(ids)
        for qkv, attention, output in zip(self.qkv, self.attention, self.output, strict=True):
            x = output(attention(qkv(x, norm=self.norm), batch, self.cos_sin, 0.4), x)
        x = self.down(swiglu_cpu(self.up(x)), x)
        rows = rms_norm_cpu(take_rows(x, wanted), self.norm.weight, self.norm.eps)
        return self.head(rows)


def step(counts: list[int], sequences: list[Sequence]) -> AttentionBatch:
    """A batch whose second cache group has the same pages in another order."""
    batch = batch_of(sequences, counts, 16)
    full = batch.tables["full"]
    turned = PageTable(((11 - full.slots // 16) * 16 + full.slots % 16).int(), (11 - full.pages).contiguous())
    return AttentionBatch(batch.positions, batch.query_start, batch.context_len, {"a": full, "b": turned})


def test_a_program_has_the_bits_of_the_single_calls():
    model, twin = Model(), Model()
    program = record(twin, {"ids": IDS, "wanted": WANTED})
    sequences, others = ([Sequence([3, 0, 5]), Sequence([7, 2])] for _ in range(2))
    for counts, rows in (([20, 3], [19, 22]), ([1, 1], [1, 0]), ([1, 4], [0]), ([2, 0], [])):
        ids = torch.arange(sum(counts), dtype=torch.int32) * 7 % 50
        wanted = torch.tensor(rows, dtype=torch.int32)
        expected = model(ids, wanted, step(counts, sequences))
        assert torch.equal(program(step(counts, others), ids=ids, wanted=wanted), expected)
    for ours, theirs in zip(model.attention, twin.attention, strict=True):
        assert torch.equal(ours.cache.k, theirs.cache.k) and torch.equal(ours.cache.v, theirs.cache.v)


def test_a_program_may_run_in_several_threads():
    up, down, norm = linear(WIDTH, 64), linear(32, WIDTH), torch.ones(WIDTH)
    program = record(lambda x: rms_norm_cpu(down(up(x), swiglu=True), norm, 1e-5), {"x": Input(Axis.TOKENS, WIDTH)})
    inputs = [torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)) for rows in range(1, 9)]
    expected = [program(x=x) for x in inputs]
    start = threading.Barrier(len(inputs))

    def work(i: int) -> bool:
        start.wait(60)
        return all(torch.equal(program(x=inputs[i]), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(work, range(len(inputs))))


@pytest.mark.parametrize("axis", [Axis.ENCODER, Axis.EXPERT, Axis.WANTED, Axis.SEQUENCES])
def test_rows_may_be_of_any_axis(axis: Axis):
    norm = torch.rand(WIDTH)
    program = record(lambda x: rms_norm_cpu(x, norm, 1e-5), {"x": Input(axis, WIDTH)})
    x = torch.randn(5, WIDTH)
    assert torch.equal(program(x=x), rms_norm_cpu(x, norm, 1e-5))


def test_wrong_tensors_are_named():
    model = Model()
    program = record(model, {"ids": IDS, "wanted": WANTED})
    ids, wanted = torch.arange(3, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)

    def batch() -> AttentionBatch:
        return step([3], [Sequence([1])])

    with pytest.raises(KernelError, match="takes ids, wanted, not ids"):
        program(batch(), ids=ids)
    with pytest.raises(KernelError, match=r"ids must be .* int32 \[3, 1\].*not int64"):
        program(batch(), ids=ids.long(), wanted=wanted)
    with pytest.raises(KernelError, match="ids has 2 rows where the step has 3"):
        program(batch(), ids=ids[:2], wanted=wanted)
    with pytest.raises(KernelError, match="row 3 is wanted of 3"):
        program(batch(), ids=ids, wanted=wanted + 1)
    with pytest.raises(KernelError, match="token id 50 is outside the embedding's 50 rows"):
        program(batch(), ids=ids + 48, wanted=wanted)
    with pytest.raises(KernelError, match="no page table of the cache group 'b'"):
        one = batch()
        short = AttentionBatch(one.positions, one.query_start, one.context_len, {"a": one.tables["a"]})
        program(short, ids=ids, wanted=wanted)
    with pytest.raises(KernelError, match="needs a batch"):
        program(ids=ids, wanted=wanted)
    with pytest.raises(KernelError, match="positions must be contiguous int32 of 3"):
        one = batch()
        wide = AttentionBatch(one.positions.long(), one.query_start, one.context_len, one.tables)
        program(wide, ids=ids, wanted=wanted)
    with pytest.raises(KernelError, match="meta"):
        program(batch(), ids=ids.to("meta"), wanted=wanted)


def one_operation(name: str, width: int = WIDTH, **noted) -> Program:
    return record(lambda x: x.recorder.note(name, [x], width, **noted), {"x": Input(Axis.TOKENS, WIDTH)})


def test_operations_that_do_not_fit_are_refused_when_noted():
    weight = torch.ones(WIDTH)
    with pytest.raises(KernelError, match="no operation is registered as group_norm"):
        one_operation("group_norm")
    with pytest.raises(KernelError, match="rms_norm lacks the attribute eps"):
        one_operation("rms_norm", bindings={"weight": weight})
    with pytest.raises(KernelError, match="rms_norm lacks the binding weight"):
        one_operation("rms_norm", attributes={"eps": 1e-5})
    with pytest.raises(KernelError, match="norm's weight must be contiguous float32 of 24 elements .*not float64"):
        one_operation("rms_norm", attributes={"eps": 1e-5}, bindings={"weight": weight.double()})
    with pytest.raises(KernelError, match="swiglu takes 48 columns of float32 as input 0, not 24"):
        one_operation("swiglu")
    with pytest.raises(KernelError, match="other rows as input than as output"):
        one_operation("rms_norm", axis=Axis.WANTED, attributes={"eps": 1e-5}, bindings={"weight": weight})
    with pytest.raises(KernelError, match="float32 or int32, not torch.float64"):
        record(lambda x: x, {"x": Input(Axis.TOKENS, WIDTH, torch.float64)})
    with pytest.raises(KernelError, match="nothing was recorded"):
        record(lambda x: x, {"x": Input(Axis.TOKENS, WIDTH)})


def test_an_operation_that_needs_python_is_not_recordable():
    g = torch.Generator().manual_seed(0)
    mpo = prepare([random_linear("mpo", 20, 9, 5, ["fp32"], True, g)], backend="cpu")
    with pytest.raises(NotRecordable):
        record(mpo, {"x": Input(Axis.TOKENS, mpo.in_features)})


@given(st.lists(st.tuples(st.sampled_from(Axis), st.integers(1, 70), st.integers(0, 5)), min_size=1, max_size=25))
@settings(max_examples=200, deadline=None)
def test_values_that_live_together_lie_apart(shapes: list[tuple[Axis, int, int]]):
    """Each operation reads the value `back` operations ago."""
    recorder = Recorder()
    values: list[Value] = [recorder.value(Axis.TOKENS, 8)]
    for axis, width, back in shapes:
        values.append(recorder.note("any", [values[max(0, len(values) - 1 - back)]], width, axis=axis))
    places, columns = place(recorder.operations, [values[0], values[-1]])
    assert places[values[0].index] == -1 and places[values[-1].index] == -2
    last = {v.index: i for i, o in enumerate(recorder.operations) for v in (o.output, *o.inputs)}
    for i, one in enumerate(values[1:-1]):
        assert places[one.index] >= 0 and places[one.index] + one.width <= columns[one.axis]
        for j, other in enumerate(values[1 : i + 1]):
            if one.axis is other.axis and last[other.index] >= i:  # alive when operation i makes `one`
                a, b = places[one.index], places[other.index]
                assert a + one.width <= b or b + other.width <= a, (i, j)
