"""The torch.library operators: opcheck, and the eager bits under torch.compile and torch.export."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from attention_cases import AttentionCase, make_attention, rope_table
from attention_cases import batch_of as attention_batch
from interpreter import needs_interpreter
from kernel_cases import BACKENDS, STORES, bits_equal, random_core, random_linear, using
from torch.library import opcheck

from cai_runtime.errors import KernelError
from cai_runtime.kernels.attention import HeadLayout
from cai_runtime.kernels.batch import FULL, AttentionBatch
from cai_runtime.kernels.embedding import CpuEmbedding
from cai_runtime.kernels.norm import RmsNorm
from cai_runtime.kernels.prepare import prepare
from cai_runtime.kernels.slim_linear import CpuLinear, PreparedLinear, as_dense
from cai_runtime.kernels.torch import frozen, ops
from cai_runtime.kernels.torch.modules import Attention, Linear, torch_module

pytestmark = pytest.mark.slow  # an optional corner that nothing in the package imports

NAMES = ["reference", "cpu"]
INP, OUT = 45, 21


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def group(backend: str, kinds: tuple[str, ...] = ("dense", "lowrank", "interpolative"), **options) -> PreparedLinear:
    """One member of each kind, stores in turn."""
    g, stores = generator(3), STORES
    members = [
        random_linear(kind, INP, OUT, 9, [stores[(2 * i) % len(stores)], stores[(2 * i + 1) % len(stores)]], i != 1, g)
        for i, kind in enumerate(kinds)
    ]
    return prepare(members, backend=backend, **options)


def linear_arguments(backend: str, prologue: str, residual: bool, rows: int = 5) -> tuple:
    prepared = group(backend)
    held = frozen.freeze(prepared)
    x = torch.randn(rows, INP * (2 if prologue == "swiglu" else 1), generator=generator(1))
    weight = torch.rand(INP, generator=generator(2)) if prologue == "norm" else None
    more = torch.randn(rows, prepared.out_features, generator=generator(4)) if residual else None
    sizes = (prepared.in_features, prepared.out_features)
    return (x, more, weight, 1e-5, prologue == "swiglu", list(held.tensors), held.layout, *sizes, held.backend)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(("prologue", "residual"), [("none", False), ("norm", True), ("swiglu", True)])
def test_slim_linear_is_a_proper_operator(prologue: str, residual: bool, backend: str):
    opcheck(torch.ops.cai.slim_linear.default, linear_arguments(backend, prologue, residual))


@pytest.mark.parametrize("backend", NAMES)
def test_row_operations_are_proper_operators(backend: str):
    g = generator()
    x, residual, weight = torch.randn(4, 30, generator=g), torch.randn(4, 30, generator=g), torch.rand(30, generator=g)
    opcheck(torch.ops.cai.rms_norm.default, (x, weight, 1e-5, backend))
    opcheck(torch.ops.cai.add_rms_norm.default, (x, residual, weight, 1e-5, backend))
    opcheck(torch.ops.cai.swiglu.default, (x, backend))
    assert bits_equal(ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5, "cpu"))


@pytest.mark.parametrize("backend", NAMES)
def test_embedding_is_a_proper_operator(backend: str):
    for store in STORES:
        core = random_core(30, 37, store, generator())
        lookup = CpuEmbedding(CpuLinear([as_dense(core)])) if backend == "cpu" else core
        module, ids = torch_module(lookup), torch.tensor([3, 29, 0, 3])
        arguments = (ids, module.tensors(), module._layout, 37, torch.float32, backend)
        opcheck(torch.ops.cai.embedding.default, arguments)
        torch.testing.assert_close(module(ids), core.values(torch.float32)[ids], rtol=1e-6, atol=0)


def attention_step(backend: str, window: int | None = None, sinks: bool = False, norms: bool = False):
    case = AttentionCase(2, 3, 24, 16, 16, torch.float32, window, sinks, ((20, 3, 1),), 7, norms)
    g = case.generator()
    logits = case.sink_logits(g)
    sequences, pages = case.sequences(g)
    attention = make_attention(backend, case.heads, pages, 16, torch.float32, logits, case.head_norms())
    qkv = torch.randn(24, case.heads.qkv_width, generator=g)
    return attention, qkv, attention_batch(sequences, [20, 3, 1], 16), rope_table(16, quarter_turns=False)


def fields(batch: AttentionBatch) -> tuple[torch.Tensor, ...]:
    table = batch.tables[FULL]
    return batch.positions, table.slots, batch.query_start, batch.context_len, table.pages


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(("window", "sinks", "norms"), [(None, False, False), (5, True, False), (None, False, True)])
def test_attention_is_a_proper_operator(window: int | None, sinks: bool, norms: bool, backend: str):
    attention, qkv, batch, table = attention_step(backend, window, sinks, norms)
    attention.cache.k.zero_()  # opcheck compares the mutated caches, and NaN equals nothing
    attention.cache.v.zero_()
    held, heads = torch_module(attention), attention.heads
    arguments = (qkv, *fields(batch), table, 0.2, held.k, held.v, held.sinks, heads.query_heads, heads.kv_heads)
    opcheck(torch.ops.cai.rope_paged_attention.default, (*arguments, 16, window, backend, held.head_norms, 1e-6))


@pytest.mark.parametrize("backend", NAMES)
def test_a_cache_of_int8_is_refused(backend: str):
    attention, qkv, batch, table = attention_step(backend, None, False, False)
    held, heads = torch_module(attention), attention.heads
    codes = torch.zeros(2, *held.k.shape, dtype=torch.int8)
    arguments = (qkv, *fields(batch), table, 0.2, *codes, None, heads.query_heads, heads.kv_heads, 16, None, backend)
    with pytest.raises(KernelError, match="is fp32, bf16 or fp16 here, not int8"):
        torch.ops.cai.rope_paged_attention(*arguments)


@pytest.mark.parametrize("backend", NAMES)
def test_the_attention_module_has_the_eager_bits_and_writes_the_cache(backend: str):
    attention, qkv, batch, table = attention_step(backend, 7, True, True)
    other, *_ = attention_step(backend, 7, True, True)
    before = qkv.clone()
    out = torch_module(other)(qkv, batch, table, 0.2)
    assert torch.equal(qkv, before)
    assert bits_equal(out, attention(qkv.clone(), batch, table, 0.2))
    assert bits_equal(other.cache.k, attention.cache.k) and bits_equal(other.cache.v, attention.cache.v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", [("dense",), ("mpo",), ("lowrank", "mpo", "interpolative", "dense")])
def test_modules_have_the_eager_bits(kinds: tuple[str, ...], backend: str):
    with using(backend) as name:
        prepared = group(name, kinds)
        module, g = torch_module(prepared), generator(5)
        assert (module.in_features, module.out_features) == (INP, OUT * len(kinds))
        norm = RmsNorm(torch.rand(INP, generator=g), 1e-5)
        for rows in (0, 1, 33):
            x, wide = torch.randn(rows, INP, generator=g), torch.randn(rows, 2 * INP, generator=g)
            residual = torch.randn(rows, module.out_features, generator=g)
            assert bits_equal(module(x), prepared(x))
            assert bits_equal(module(x, residual, norm=norm), prepared(x, residual, norm=norm))
            assert bits_equal(module(wide, swiglu=True), prepared(wide, swiglu=True))
        with pytest.raises(KernelError, match="not both"):
            module(x, norm=norm, swiglu=True)


@pytest.mark.parametrize("backend", NAMES)
def test_every_store_freezes(backend: str):
    g, x = generator(8), torch.randn(3, INP, generator=generator(9))
    for store in STORES:
        for kind in ("dense", "lowrank", "interpolative"):
            prepared = prepare([random_linear(kind, INP, OUT, OUT, [store], True, g)], backend=backend)
            assert bits_equal(torch_module(prepared)(x), prepared(x))


@pytest.mark.parametrize("backend", NAMES)
def test_int8_activations_freeze(backend: str):
    w = random_linear("lowrank", INP, OUT, 9, ["int8"], True, generator())
    x = torch.randn(6, INP, generator=generator(1))
    rounded = prepare([w], backend=backend, int8_activations=True)
    assert bits_equal(torch_module(rounded)(x), rounded(x))
    assert not torch.equal(rounded(x), prepare([w], backend=backend)(x))


# ------------------------------------------------------------------------------------------------- compile and export


class Block(torch.nn.Module):
    """A decoder block as a llama's, with the norms in the linears' prologues, between an embedding and a head."""

    def __init__(self, backend: str):
        super().__init__()
        g, stores = generator(11), STORES
        self.heads = HeadLayout(4, 2, 8, 8)

        def linears(kind: str, inp: int, outs: list[int]) -> torch.nn.Module:
            members = [
                random_linear(kind, inp, n, 7, [stores[i % 4], stores[-1]], False, g) for i, n in enumerate(outs)
            ]
            return torch_module(prepare(members, backend=backend))

        table = random_core(50, 32, "int8", g)
        self.embed = torch_module(CpuEmbedding(CpuLinear([as_dense(table)])) if backend == "cpu" else table)
        self.qkv = linears("interpolative", 32, [32, 16, 16])
        self.attention = torch_module(make_attention(backend, self.heads, 9, 16, torch.float32))
        self.output = linears("mpo", 32, [32])
        self.gate_up = linears("lowrank", 32, [48, 48])
        self.down = linears("interpolative", 48, [32])
        self.head = torch_module(prepare([as_dense(table)], backend=backend))
        for name in ("first", "second", "last"):
            self.register_buffer(name, torch.rand(32, generator=g) + 0.5)
        self.register_buffer("cos_sin", rope_table(8, quarter_turns=False))
        self.backend = backend

    def forward(self, ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        x = self.embed(ids)
        qkv = self.qkv(x, norm=RmsNorm(self.first, 1e-5))
        x = self.output(self.attention(qkv, batch, self.cos_sin, 8**-0.5), x)
        x = self.down(self.gate_up(x, norm=RmsNorm(self.second, 1e-5)), x, swiglu=True)
        return self.head(ops.rms_norm(x, self.last, 1e-5, self.backend))


def block_step(tokens: int) -> tuple[torch.Tensor, AttentionBatch]:
    case = AttentionCase(2, 2, 8, 8, 16, torch.float32, None, False, ((tokens - 2, 2),), 1)
    sequences, _ = case.sequences(case.generator())
    return torch.arange(tokens) * 7 % 50, attention_batch(sequences, [tokens - 2, 2], 16)


@pytest.mark.parametrize("backend", NAMES)
def test_a_compiled_block_has_the_eager_bits(backend: str):
    eager, block = Block(backend), Block(backend)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 40, 3):
        ids, batch = block_step(tokens)
        with torch.no_grad():
            assert bits_equal(compiled(ids, batch), eager(ids, batch))
    assert bits_equal(block.attention.k, eager.attention.k) and bits_equal(block.attention.v, eager.attention.v)


@pytest.mark.parametrize("backend", NAMES)
def test_an_exported_block_has_the_eager_bits_after_a_save(backend: str):
    block, file = Block(backend), io.BytesIO()
    ids, batch = block_step(40)
    rows, pages = torch.export.Dim("rows", max=1000), torch.export.Dim("pages", max=32)
    # Of the batch: positions, query_start, context_len, tables.
    moving = [{0: rows}, None, None, {FULL: [{0: rows}, {1: pages}]}]
    program = torch.export.export(block, (ids, batch), dynamic_shapes=({0: rows}, moving))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {"cai.slim_linear.default", "cai.embedding.default", "cai.rms_norm.default"} <= called
    assert "cai.rope_paged_attention.default" in called
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    eager = Block(backend)
    for tokens in (9, 60, 31):
        ids, batch = block_step(tokens)
        with torch.no_grad():
            assert bits_equal(loaded(ids, batch), eager(ids, batch))


@pytest.mark.parametrize("backend", NAMES)
def test_a_compiled_linear_alone(backend: str):
    prepared = group(backend)
    compiled = torch.compile(torch_module(prepared), fullgraph=True, backend="aot_eager")
    for rows in (1, 4, 17):
        x = torch.randn(rows, INP, generator=generator(rows))
        assert bits_equal(compiled(x), prepared(x))


# -------------------------------------------------------------------------------------------------------- ownership


@pytest.mark.parametrize("backend", NAMES)
def test_the_memory_goes_with_the_module(backend: str):
    module = torch_module(group(backend))
    held = weakref.ref(module.tensors()[1])
    module(torch.randn(2, INP))
    assert module.tensors()[0] in frozen._known
    remembered = len(frozen._known)
    del module
    gc.collect()
    assert held() is None
    assert len(frozen._known) < remembered


def test_packed_weights_follow_a_copy_and_refuse_a_cast():
    prepared = group("cpu")
    x = torch.randn(4, INP, generator=generator(6))
    expected = prepared(x)
    module = torch_module(prepared)
    assert bits_equal(module(x), expected)
    for name, old in list(module.named_buffers())[1:]:  # elsewhere in memory, the old place overwritten
        setattr(module, name, old.clone())
        old.zero_()
    assert bits_equal(module(x), expected)
    assert any(t.dtype == torch.float32 and t.numel() for t in module.tensors())
    with pytest.raises(KernelError, match="can't be moved or cast"):
        module.double()(x)


@pytest.mark.parametrize("backend", NAMES)
def test_weights_missing_from_the_arguments_are_refused(backend: str):
    *before, tensors, layout, inp, out, _ = linear_arguments(backend, "none", False)
    with pytest.raises(KernelError, match="tensors, not"):
        torch.ops.cai.slim_linear(*before, [torch.empty(0), *tensors[1:-1]], layout, inp, out, backend)


def test_wrong_width_is_refused_while_tracing():
    compiled = torch.compile(torch_module(group("reference")), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"expected \[rows, 45\]"):
        compiled(torch.randn(3, 44))


def test_backward_says_that_there_is_none():
    x = torch.randn(2, INP, requires_grad=True)
    y = torch_module(group("reference"))(x)
    with pytest.raises(RuntimeError, match="slim_linear"):
        y.sum().backward()


def test_other_objects_are_refused():
    with pytest.raises(KernelError, match="str"):
        torch_module("a linear")
    attention, *_ = attention_step("reference")
    with pytest.raises(KernelError, match="not a cache of the cpu kernels"):
        Attention(attention.heads, attention.cache, backend="cpu")
    assert isinstance(torch_module(group("cpu")), Linear)


INTERPRETED = """
import sys
sys.path.append(sys.argv[1])
import torch
from attention_cases import AttentionCase, batch_of, make_attention, rope_table
from kernel_cases import random_linear
from cai_runtime.kernels.prepare import prepare
from cai_runtime.kernels.torch.modules import Attention, prepare_module

g = torch.Generator().manual_seed(0)
for kinds in (["lowrank", "interpolative"], ["mpo", "dense"]):
    members = [random_linear(kind, 20, 9, 5, ["int8", "fp32"], True, g) for kind in kinds]
    prepared, module = prepare(members, backend="triton"), prepare_module(members, backend="triton")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (1, 3):
        x = torch.randn(rows, 20, generator=g)
        assert torch.equal(module(x), prepared(x)) and torch.equal(compiled(x), prepared(x))
    clone = [t.clone() for t in module.tensors()] if hasattr(module, "tensors") else None
    if clone:  # tensors elsewhere: prepared anew
        arguments = (None, None, 0.0, False, clone, module._layout, 20, 18, "triton")
        assert torch.equal(torch.ops.cai.slim_linear(x, *arguments), prepared(x))

case = AttentionCase(2, 2, 16, 16, 16, torch.float32, 5, True, ((20, 1),), 7)
sequences, pages = case.sequences(g)
reference = make_attention("reference", case.heads, pages, 16, torch.float32, case.sink_logits(g))
for cache in (reference.cache.k, reference.cache.v):
    cache.zero_()
qkv, batch = torch.randn(21, case.heads.qkv_width, generator=g), batch_of(sequences, [20, 1], 16)
attention = Attention(case.heads, reference.cache, reference.sinks, backend="triton")
with torch.no_grad():
    out = torch.compile(attention, fullgraph=True, backend="aot_eager")(qkv, batch, rope_table(16, quarter_turns=False), 0.2)
written = reference.cache.k.clone()
expected = reference(qkv, batch, rope_table(16, quarter_turns=False), 0.2)
torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
torch.testing.assert_close(written, reference.cache.k)
assert written.any()
print("same")
"""


@needs_interpreter
def test_triton_operations_as_modules():
    helpers = str(Path(__file__).parent / "helpers")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", INTERPRETED, helpers], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same"


def test_the_operators_come_with_their_module_alone():
    code = (
        "import cai_runtime, torch, cai_runtime.kernels.slim_linear, cai_runtime.layers.ops\n"
        "assert not hasattr(torch.ops.cai, 'slim_linear')\n"
        "import cai_runtime.kernels.torch.ops as ops, importlib\n"
        "importlib.reload(ops)\n"
        "assert hasattr(torch.ops.cai, 'slim_linear')\n"
        "print(torch.ops.cai.swiglu(torch.ones(2, 6)).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([2, 3])"
