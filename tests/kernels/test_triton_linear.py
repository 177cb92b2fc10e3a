"""Triton slim linears against float64: interpreted on the CPU, or compiled where there is a GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_triton_interpreted.py runs these with TRITON_INTERPRET=1", allow_module_level=True)

from cai_runtime.errors import KernelError
from cai_runtime.kernels import triton as backend
from cai_runtime.kernels.slim_linear import reference
from cai_runtime.kernels.weights import Core, LinearWeights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STORES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
ACTIVATIONS = [torch.float32, torch.bfloat16, torch.float16]
# The intermediate z and the result are each rounded once to the activation dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.2e-3}


def core(rows: int, cols: int, store: torch.dtype) -> Core:
    if store == torch.int8:
        scale = (torch.rand(rows) + 0.5) / (60 * cols**0.5)
        return Core(torch.randint(-127, 128, (rows, cols), dtype=torch.int8).to(DEVICE), scale.to(DEVICE))
    return Core((torch.randn(rows, cols) / cols**0.5).to(store).to(DEVICE))


def linear(
    kind: str, inp: int, out: int, rank: int, stores: tuple[torch.dtype, torch.dtype], bias: bool = False
) -> LinearWeights:
    b = torch.randn(out).to(DEVICE) if bias else None
    if kind == "dense":
        return LinearWeights("dense", inp, out, (core(out, inp, stores[0]),), bias=b)
    if kind == "lowrank":
        cores = (core(rank, inp, stores[0]), core(out, rank, stores[1]))
        return LinearWeights("lowrank", inp, out, cores, rank=rank, bias=b)
    pivot = torch.randperm(out).to(torch.int32).to(DEVICE)
    cores = (core(rank, inp, stores[0]), core(out - rank, rank, stores[1]))
    return LinearWeights("interpolative", inp, out, cores, rank=rank, pivot=pivot, bias=b)


def activations(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, cols).to(dtype).to(DEVICE)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", ["dense", "lowrank", "interpolative"])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_matches_float64(kind: str, store: torch.dtype, dtype: torch.dtype):
    torch.manual_seed(1)
    for rows, inp, out, rank in ((1, 131, 67, 21), (19, 40, 35, 13)):
        w = linear(kind, inp, out, rank, (store, store), bias=True)
        x = activations(rows, inp, dtype)
        residual = activations(rows, out, dtype)
        y = backend.slim_linear(x, w, residual)
        assert y.dtype == dtype
        assert relative_error(y, reference(x.double(), w, residual.double())) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 16, 3), (1, 300, 2, 1), (5, 16, 16, 16), (33, 20, 130, 70)])
@pytest.mark.parametrize("kind", ["lowrank", "interpolative"])
def test_odd_shapes(kind: str, shape: tuple[int, int, int, int]):
    """Single features, full rank (an interpolative core_1 without rows), more rows than a tile."""
    torch.manual_seed(2)
    rows, inp, out, rank = shape
    w = linear(kind, inp, out, rank, (torch.int8, torch.float32))
    x = activations(rows, inp, torch.float32)
    assert relative_error(backend.slim_linear(x, w), reference(x.double(), w)) < TOLERANCE[torch.float32]


def test_group_equals_its_members():
    """Five members, so two launches; kinds, ranks and stores differ."""
    torch.manual_seed(3)
    int8, bf16, fp32 = torch.int8, torch.bfloat16, torch.float32
    ws = [
        linear("interpolative", 70, 50, 21, (int8, int8), bias=True),
        linear("dense", 70, 9, 0, (bf16, bf16)),
        linear("lowrank", 70, 33, 5, (bf16, int8)),
        linear("interpolative", 70, 17, 17, (int8, bf16)),
        linear("lowrank", 70, 40, 19, (fp32, bf16), bias=True),
    ]
    for rows in (1, 18):
        x = activations(rows, 70, bf16)
        together = backend.grouped_linear(x, ws)
        assert torch.equal(together, torch.cat([backend.slim_linear(x, w) for w in ws], dim=1))
        expected = torch.cat([reference(x.double(), w) for w in ws], dim=1)
        assert relative_error(together, expected) < TOLERANCE[bf16]
        residual = activations(rows, together.shape[1], bf16)
        added = backend.grouped_linear(x, ws, residual)
        assert relative_error(added, expected + residual.double()) < TOLERANCE[bf16]


def test_any_strides_and_no_rows():
    torch.manual_seed(4)
    w = linear("interpolative", 24, 31, 11, (torch.int8, torch.int8))
    wide = activations(6, 50, torch.float32)
    for x in (wide[:, 3:27], wide[::2, :24], activations(24, 6, torch.float32).T, wide[:, 1:49:2]):
        assert relative_error(backend.slim_linear(x, w), reference(x.double(), w)) < TOLERANCE[torch.float32]
    assert backend.slim_linear(wide[:0, :24], w).shape == (0, 31)
    assert backend.grouped_linear(wide[:0, :24], [w, w]).shape == (0, 62)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies with a BLAS whose order depends on the shape")
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_bits_of_a_row_do_not_depend_on_rows(dtype: torch.dtype, store: torch.dtype):
    torch.manual_seed(5)
    w = linear("interpolative", 1000, 700, 301, (store, store))
    x = activations(100, 1000, dtype)
    whole = backend.slim_linear(x, w)
    for rows in (1, 2, 16, 17, 33):
        assert torch.equal(backend.slim_linear(x[:rows], w), whole[:rows])


def test_bad_arguments_are_named():
    w = linear("interpolative", 24, 31, 11, (torch.int8, torch.int8))
    x = activations(2, 24, torch.float32)
    int8 = LinearWeights("dense", 24, 31, (Core(torch.zeros(31, 24, dtype=torch.int8, device=DEVICE)),))
    wide_pivot = LinearWeights("interpolative", 24, 31, w.cores, rank=11, pivot=w.pivot.long())
    apart = Core(torch.zeros(31, 48, device=DEVICE)[:, ::2])
    strided = LinearWeights("dense", 24, 31, (apart,))
    elsewhere = LinearWeights("dense", 24, 31, (Core(torch.zeros(31, 24, device="meta")),))
    mpo = LinearWeights("mpo", 4, 4, (core(2, 2, torch.float32),) * 2, out_dims=(2, 2), in_dims=(2, 2), bonds=(1, 1, 1))
    cases = [
        (lambda: backend.slim_linear(x[:, :23], w), "x has shape"),
        (lambda: backend.slim_linear(x.double(), w), "x is torch.float64"),
        (lambda: backend.slim_linear(x[0], w), "x has shape"),
        (lambda: backend.slim_linear(x, w, x), "residual has shape"),
        (lambda: backend.slim_linear(x, w, activations(2, 31, torch.bfloat16)), "residual is torch.bfloat16"),
        (lambda: backend.slim_linear(x, int8), "no scale"),
        (lambda: backend.slim_linear(x, wide_pivot), "w.pivot is torch.int64"),
        (lambda: backend.slim_linear(x, strided), r"w.cores\[0\].data must be contiguous"),
        (lambda: backend.slim_linear(x, elsewhere), "is on meta"),
        (lambda: backend.slim_linear(x[:, :4], mpo), "mpo"),
        (lambda: backend.grouped_linear(x, [w, linear("dense", 23, 4, 0, (torch.int8,) * 2)]), "x has shape"),
        (lambda: backend.grouped_linear(x, []), "at least one"),
    ]
    for call, message in cases:
        with pytest.raises(KernelError, match=message):
            call()
