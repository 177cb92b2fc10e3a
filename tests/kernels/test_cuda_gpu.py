"""The CUDA decode linears on a GPU, against float64. Without one, test_cuda_emulated.py runs the kernel on the CPU."""

from __future__ import annotations

import pytest
import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cuda
from cai_runtime.kernels.slim_linear import reference
from cai_runtime.kernels.weights import Core, LinearWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda.available(), reason="the CUDA library is not built, or there is no NVIDIA GPU"),
]

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.2e-3}
STORES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def core(rows: int, cols: int, store: torch.dtype) -> Core:
    if store == torch.int8:
        scale = (torch.rand(rows, device="cuda") + 0.5) / (60 * cols**0.5)
        return Core(torch.randint(-127, 128, (rows, cols), dtype=torch.int8, device="cuda"), scale)
    return Core((torch.randn(rows, cols, device="cuda") / cols**0.5).to(store))


def linear(kind: str, inp: int, out: int, rank: int, store: torch.dtype, second: torch.dtype) -> LinearWeights:
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
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_matches_float64(kind: str, store: torch.dtype, dtype: torch.dtype):
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
    int8, bf16 = torch.int8, torch.bfloat16
    ws = [
        linear("interpolative", 320, 250, 112, int8, int8), linear("dense", 320, 9, 0, bf16, bf16),
        linear("lowrank", 320, 133, 48, bf16, int8), linear("interpolative", 320, 64, 64, int8, bf16),
        linear("lowrank", 320, 40, 19, torch.float32, bf16), linear("interpolative", 320, 77, 16, int8, int8),
    ]  # fmt: skip
    prepared = cuda.CudaLinear(ws)
    for rows in (1, 7, 16):
        x = torch.randn(rows, 320, device="cuda").to(bf16)
        poison = [torch.full((rows, 640), torch.nan, device="cuda", dtype=bf16) for _ in range(4)]
        del poison  # the allocator hands this memory out next
        together = prepared(x)
        assert torch.equal(together, torch.cat([cuda.slim_linear(x, w) for w in ws], dim=1))
        assert relative_error(together, torch.cat([reference(x.double(), w) for w in ws], dim=1)) < TOLERANCE[bf16]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_bits_of_a_row_do_not_depend_on_rows(dtype: torch.dtype, store: torch.dtype):
    torch.manual_seed(2)
    prepared = cuda.CudaLinear([linear("interpolative", 1000, 700, 301, store, store)])
    x = torch.randn(16, 1000, device="cuda").to(dtype)
    whole = prepared(x)
    for rows in (1, 2, 4, 5, 8, 9):
        assert torch.equal(prepared(x[:rows]), whole[:rows])


def test_strides_graphs_and_streams():
    torch.manual_seed(3)
    w = linear("interpolative", 96, 80, 32, torch.int8, torch.int8)
    prepared = cuda.CudaLinear([w])
    wide = torch.randn(4, 200, device="cuda")
    for x in (wide[:, 4:100], wide[:, 3:99], wide[::2, :96], wide[:, ::2][:, :96]):
        assert relative_error(prepared(x), reference(x.double(), w)) < TOLERANCE[torch.float32]
    assert prepared(wide[:0, :96]).shape == (0, 80)
    graph = torch.cuda.CUDAGraph()
    x = torch.zeros(4, 96, device="cuda")
    with torch.cuda.graph(graph):
        y = prepared(x)
    x.copy_(wide[:, :96])
    graph.replay()
    assert torch.equal(y, prepared(wide[:, :96]))


def test_bad_arguments_are_named():
    w = linear("interpolative", 24, 31, 11, torch.int8, torch.int8)
    prepared = cuda.CudaLinear([w])
    x = torch.randn(2, 24, device="cuda")
    half_bias = LinearWeights(
        "dense", 24, 31, (Core(torch.zeros(31, 24, device="cuda")),), bias=torch.zeros(31).cuda().half()
    )
    cases = [
        (lambda: prepared(x[:, :23]), "x has shape"),
        (lambda: prepared(x.double()), "x is torch.float64"),
        (lambda: prepared(x.cpu()), "x is on cpu"),
        (lambda: prepared(x.repeat(9, 1)), "up to 16"),
        (lambda: prepared(x, x), "residual has shape"),
        (lambda: cuda.slim_linear(x, half_bias), "bias must be float32"),
    ]
    for call, message in cases:
        with pytest.raises(KernelError, match=message):
            call()
