"""The CUDA decode linears on a GPU, against float64. Without one, test_cuda_emulated.py runs the kernel on the CPU."""

from __future__ import annotations

import pytest
import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cuda
from cai_runtime.kernels.activation import swiglu_reference
from cai_runtime.kernels.norm import RmsNorm, rms_norm_reference
from cai_runtime.kernels.slim_linear import reference
from cai_runtime.kernels.weights import Core, LinearWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda.available(), reason="the CUDA library is not built, or there is no NVIDIA GPU"),
]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.2e-3}
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
CODES = ["int8", "int4/32", "int4/64", "int4/128 with zero"]
# Activations by stores: 16-bit weights are of the activations' type.
CASES = [(dtype, store) for own, dtype in FLOATS.items() for store in (own, *CODES)]


def core(rows: int, cols: int, store: str) -> Core:
    if store == "int8":
        scale = (torch.rand(rows, device="cuda") + 0.5) / (60 * cols**0.5)
        return Core(torch.randint(-127, 128, (rows, cols), dtype=torch.int8, device="cuda"), scale)
    if store.startswith("int4"):
        group = int(store.removeprefix("int4/").split()[0])
        groups = (rows, -(-cols // group))
        codes = torch.randint(0, 256, (rows, -(-cols // 2)), dtype=torch.uint8, device="cuda")
        scale = ((torch.rand(groups, device="cuda") + 0.5) / (4 * cols**0.5)).bfloat16()
        zero = torch.randint(4, 12, groups, dtype=torch.uint8, device="cuda") if "zero" in store else None
        return Core(codes, scale, zero, group, cols)
    return Core((torch.randn(rows, cols, device="cuda") / cols**0.5).to(FLOATS[store]))


def linear(kind: str, inp: int, out: int, rank: int, store: str, second: str) -> LinearWeights:
    bias = torch.randn(out, device="cuda")
    if kind == "dense":
        return LinearWeights("dense", inp, out, (core(out, inp, store),), bias=bias)
    if kind == "lowrank":
        return LinearWeights("lowrank", inp, out, (core(rank, inp, store), core(out, rank, second)), rank, bias=bias)
    pivot = torch.randperm(out, device="cuda").to(torch.int32)
    return LinearWeights(
        "interpolative", inp, out, (core(rank, inp, store), core(out - rank, rank, second)), rank, pivot, bias
    )


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", ["dense", "lowrank", "interpolative"])
@pytest.mark.parametrize(("dtype", "store"), CASES)
def test_matches_float64(kind: str, store: str, dtype: torch.dtype):
    torch.manual_seed(0)
    for rows, inp, out, rank in (
        (1, 4096, 1024, 304),
        (3, 131, 67, 21),
        (5, 48, 48, 48),
        (16, 2048, 500, 160),
        (2, 1, 1, 1),
    ):
        w = linear(kind, inp, out, rank, store, store)
        x = torch.randn(rows, inp, device="cuda").to(dtype)
        residual = torch.randn(rows, out, device="cuda").to(dtype)
        expected = reference(x.double(), w, residual.double())
        assert relative_error(cuda.slim_linear(x, w, residual), expected) < TOLERANCE[dtype]


def test_group_equals_its_members_and_fills_every_element():
    torch.manual_seed(1)
    bf16 = torch.bfloat16
    ws = [
        linear("interpolative", 320, 250, 112, "int8", "int8"), linear("dense", 320, 9, 0, "bf16", "bf16"),
        linear("lowrank", 320, 133, 48, "bf16", "int8"), linear("interpolative", 320, 64, 64, "int8", "bf16"),
        linear("lowrank", 320, 40, 19, "int4/32", "bf16"), linear("interpolative", 320, 77, 16, "int4/32", "int8"),
        linear("lowrank", 320, 33, 40, "int4/128 with zero", "int4/64"),
    ]  # fmt: skip
    prepared = cuda.CudaLinear(ws)
    for rows in (1, 7, 16):
        x = torch.randn(rows, 320, device="cuda").to(bf16)
        poison = [torch.full((rows, 704), torch.nan, device="cuda", dtype=bf16) for _ in range(4)]
        del poison  # the allocator hands this memory out next
        together = prepared(x)
        assert torch.equal(together, torch.cat([cuda.slim_linear(x, w) for w in ws], dim=1))
        assert relative_error(together, torch.cat([reference(x.double(), w) for w in ws], dim=1)) < TOLERANCE[bf16]


@pytest.mark.parametrize(("dtype", "store"), CASES)
def test_bits_of_a_row_do_not_depend_on_rows_or_place(dtype: torch.dtype, store: str):
    """Plain, behind a norm and behind a gate; with and without dependent launches; from any place in the batch."""
    torch.manual_seed(2)
    w = linear("interpolative", 1000, 700, 301, store, store)
    norm = RmsNorm((torch.rand(1000, device="cuda") + 0.5).to(dtype), 1e-5)
    x, gate_up = torch.randn(16, 1000, device="cuda").to(dtype), torch.randn(16, 2000, device="cuda").to(dtype)
    independent = cuda.CudaLinear([w], cuda.CudaOptions(dependent_launch=False, fused_swiglu_rows=0))
    prepared = cuda.CudaLinear([w])
    for source, prologue in ((x, {}), (x, {"norm": norm}), (gate_up, {"swiglu": True})):
        whole = prepared(source, **prologue)
        assert torch.equal(independent(source, **prologue), whole)
        assert torch.equal(prepared(source.flip(0).contiguous(), **prologue).flip(0), whole)
        for rows in (1, 2, 4, 5, 8, 9):
            assert torch.equal(prepared(source[:rows], **prologue), whole[:rows])


@pytest.mark.parametrize(("dtype", "store"), CASES)
def test_prologues_match_float64(dtype: torch.dtype, store: str):
    torch.manual_seed(4)
    ws = [linear("interpolative", 1024, 300, 96, store, store), linear("dense", 1024, 65, 0, store, store)]
    prepared = cuda.CudaLinear(ws)
    norm = RmsNorm((torch.rand(1024, device="cuda") + 0.5).to(dtype), 1e-5)
    for rows in (1, 2, 3, 11):
        x = (torch.randn(rows, 1024, device="cuda") * 5).to(dtype)
        normed = rms_norm_reference(x.double(), norm.weight.double(), norm.eps)
        expected = torch.cat([reference(normed, w) for w in ws], dim=1)
        assert relative_error(prepared(x, norm=norm), expected) < TOLERANCE[dtype]
        gate_up = torch.randn(rows, 2048, device="cuda").to(dtype)
        residual = torch.randn(rows, 365, device="cuda").to(dtype)
        gated = swiglu_reference(gate_up.double())
        expected = torch.cat([reference(gated, w) for w in ws], dim=1) + residual.double()
        assert relative_error(prepared(gate_up, residual, swiglu=True), expected) < TOLERANCE[dtype]


def test_a_chain_of_dependent_launches_waits_for_its_inputs():
    """Layers that read what the layer before wrote, in a graph, replayed: as launched one by one without overlap."""
    torch.manual_seed(5)
    ws = [linear("interpolative", 512, 512, 128, store, store) for store in ("bf16", "int8", "int4/64") * 6]
    norm = RmsNorm(torch.ones(512, device="cuda", dtype=torch.bfloat16), 1e-5)
    layers = [cuda.CudaLinear([w]) for w in ws]
    apart = [cuda.CudaLinear([w], cuda.CudaOptions(dependent_launch=False)) for w in ws]

    def through(linears: list[cuda.CudaLinear], x: torch.Tensor) -> torch.Tensor:
        for f in linears:
            x = f(x, x, norm=norm)
        return x

    given = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    graph, x = torch.cuda.CUDAGraph(), given.clone()
    through(layers, x)
    with torch.cuda.graph(graph):
        y = through(layers, x)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = y.clone()
        assert torch.equal(replayed, through(apart, x))
        assert torch.equal(replayed, through(layers, x))


def test_strides_graphs_and_streams():
    torch.manual_seed(3)
    w = linear("interpolative", 96, 80, 32, "int8", "int8")
    prepared = cuda.CudaLinear([w])
    wide = torch.randn(4, 200, device="cuda").bfloat16()
    for x in (wide[:, 4:100], wide[:, 3:99], wide[::2, :96], wide[:, ::2][:, :96]):
        assert relative_error(prepared(x), reference(x.double(), w)) < TOLERANCE[torch.bfloat16]
    assert prepared(wide[:0, :96]).shape == (0, 80)
    graph = torch.cuda.CUDAGraph()
    x = torch.zeros(4, 96, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.graph(graph):
        y = prepared(x)
    x.copy_(wide[:, :96])
    graph.replay()
    assert torch.equal(y, prepared(wide[:, :96]))


def test_bad_arguments_are_named():
    w = linear("interpolative", 24, 31, 11, "int8", "int8")
    prepared = cuda.CudaLinear([w])
    x = torch.randn(2, 24, device="cuda").bfloat16()
    half_bias = LinearWeights(
        "dense", 24, 31, (Core(torch.zeros(31, 24, device="cuda").bfloat16()),), bias=torch.zeros(31).cuda().half()
    )
    cases = [
        (lambda: prepared(x[:, :23]), "x has shape"),
        (lambda: prepared(x.double()), "x is torch.float64"),
        (lambda: prepared(x.float()), "x is torch.float32"),
        (lambda: prepared(x.cpu()), "x is on cpu"),
        (lambda: prepared(x.repeat(9, 1)), "up to 16"),
        (lambda: prepared(x, x), "residual has shape"),
        (lambda: prepared(x, swiglu=True), "x has shape"),
        (lambda: prepared(x, norm=RmsNorm(torch.ones(23, device="cuda"), 1e-5)), "norm.weight has shape"),
        (lambda: prepared(x, norm=RmsNorm(torch.ones(24, device="cuda"), 1e-5), swiglu=True), "not both"),
        (lambda: cuda.slim_linear(x, half_bias), "bias is torch.float16"),
    ]
    for call, message in cases:
        with pytest.raises(KernelError, match=message):
            call()
