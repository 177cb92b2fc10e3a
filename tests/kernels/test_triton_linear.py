"""Triton slim linears against float64: interpreted on the CPU, or compiled where there is a GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_triton_interpreted.py runs these with TRITON_INTERPRET=1", allow_module_level=True)

from cai_runtime.errors import KernelError
from cai_runtime.kernels import triton as backend
from cai_runtime.kernels.gpu import prepare_linear
from cai_runtime.kernels.norm import RmsNorm, rms_norm_reference
from cai_runtime.kernels.quantized_rows import quantize_rows
from cai_runtime.kernels.slim_linear import reference
from cai_runtime.kernels.triton import linear as linear_module
from cai_runtime.kernels.triton.plan import padded_rows
from cai_runtime.kernels.weights import Core, LinearWeights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT4 = [f"int4/{group}{zero}" for group in (32, 64, 128) for zero in ("", "z")]  # z: with zero points
STORES = ["fp32", "bf16", "fp16", "int8", *INT4]
ACTIVATIONS = [torch.float32, torch.bfloat16, torch.float16]
# The input (by a norm's weight), the intermediate z and the result are each rounded once to the activation dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.2e-3}
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def core(rows: int, cols: int, store: str) -> Core:
    if store == "int8":
        scale = (torch.rand(rows) + 0.5) / (60 * cols**0.5)
        return Core(torch.randint(-127, 128, (rows, cols), dtype=torch.int8).to(DEVICE), scale.to(DEVICE))
    if store.startswith("int4"):
        group = int(store.strip("z")[5:])
        groups = (rows, -(-cols // group))
        data = torch.randint(0, 256, (rows, -(-cols // 2)), dtype=torch.uint8)
        if cols % 2:
            data[:, -1] &= 15
        scale = ((torch.rand(groups) + 0.5) / (4 * cols**0.5)).to(torch.bfloat16)
        zero = torch.randint(0, 16, groups, dtype=torch.uint8).to(DEVICE) if store.endswith("z") else None
        return Core(data.to(DEVICE), scale.to(DEVICE), zero, group, cols)
    return Core((torch.randn(rows, cols) / cols**0.5).to(FLOATS[store]).to(DEVICE))


def linear(kind: str, inp: int, out: int, rank: int, stores: tuple[str, str], bias: bool = False) -> LinearWeights:
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
def test_matches_float64(kind: str, store: str, dtype: torch.dtype):
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
    w = linear(kind, inp, out, rank, ("int8", "fp32"))
    x = activations(rows, inp, torch.float32)
    assert relative_error(backend.slim_linear(x, w), reference(x.double(), w)) < TOLERANCE[torch.float32]


def test_group_equals_its_members():
    """Five members, so two launches; kinds, ranks and stores differ."""
    torch.manual_seed(3)
    bf16 = torch.bfloat16
    ws = [
        linear("interpolative", 70, 50, 21, ("int8", "int8"), bias=True),
        linear("dense", 70, 9, 0, ("bf16", "bf16")),
        linear("lowrank", 70, 33, 5, ("int4/32", "int8")),
        linear("interpolative", 70, 17, 17, ("int8", "bf16")),
        linear("lowrank", 70, 40, 19, ("fp32", "int4/64z"), bias=True),
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
    w = linear("interpolative", 24, 31, 11, ("int8", "int8"))
    wide = activations(6, 50, torch.float32)
    for x in (wide[:, 3:27], wide[::2, :24], activations(24, 6, torch.float32).T, wide[:, 1:49:2]):
        assert relative_error(backend.slim_linear(x, w), reference(x.double(), w)) < TOLERANCE[torch.float32]
    assert backend.slim_linear(wide[:0, :24], w).shape == (0, 31)
    assert backend.grouped_linear(wide[:0, :24], [w, w]).shape == (0, 62)


def bits_do_not_depend_on_rows(run, x: torch.Tensor, counts: tuple[int, ...]):
    whole = run(x)
    for rows in counts:
        assert torch.equal(run(x[:rows]), whole[:rows]), rows
    assert torch.equal(run(x[-3:]), whole[-3:])


SAME_BITS = [(store, dtype) for store in STORES for dtype in ACTIVATIONS[:2]]
SAME_BITS += [(store, torch.float16) for store in ("fp16", "int4/64z")]


@pytest.mark.parametrize(("store", "dtype"), SAME_BITS)
def test_bits_of_a_row_do_not_depend_on_rows(ordered_sums, store: str, dtype: torch.dtype):
    torch.manual_seed(5)
    big = DEVICE == "cuda"
    inp, out, rank = (1000, 700, 301) if big else (150, 50, 21)
    w = linear("interpolative", inp, out, rank, (store, store))
    x = activations(100 if big else 34, inp, dtype)
    bits_do_not_depend_on_rows(backend.TritonLinear([w]), x, (1, 2, 16, 17, 33) if big else (1, 16, 17))


def prologues(width: int, dtype: torch.dtype) -> dict[str, dict]:
    weight = (torch.rand(width) + 0.5).to(dtype).to(DEVICE)
    return {"norm": {"norm": RmsNorm(weight, 1e-5)}, "swiglu": {"swiglu": True}}


# What the stores of a group lead to: the norm in the launch or before it, by the backend's choice or against it.
NORMED = [("fp32", torch.float32, False), ("bf16", torch.bfloat16, False), ("bf16", torch.float32, False)]
NORMED += [(store, dtype, dtype != torch.float16) for store in ("int8", "int4/32", "int4/64z") for dtype in ACTIVATIONS]


@pytest.mark.parametrize(("store", "dtype", "force"), NORMED)
def test_norm_and_swiglu_on_the_way_in(
    ordered_sums, monkeypatch: pytest.MonkeyPatch, store: str, dtype: torch.dtype, force: bool
):
    """Against float64, and the same bits whether a launch forms the mean square, for few rows, or a kernel of its own."""
    torch.manual_seed(6)
    inp = 131
    if force:
        monkeypatch.setattr(linear_module, "NORM_IN_LAUNCH", {"int8", "int4"})
    w = linear("interpolative", inp, 67, 21, (store, store), bias=True)
    group = backend.TritonLinear([w, linear("dense", inp, 20, 0, (store, store))])
    for name, options in prologues(inp, dtype).items():
        x = 3 * activations(19, inp * (2 if name == "swiglu" else 1), dtype)
        residual = activations(19, 87, dtype)
        wide = x.double()
        if name == "swiglu":
            given = torch.nn.functional.silu(wide[:, :inp]) * wide[:, inp:]
        else:
            given = rms_norm_reference(wide, options["norm"].weight.double(), 1e-5)
        y = group(x, residual, **options)
        assert relative_error(y[:, :67], reference(given, w, residual[:, :67].double())) < 1.5 * TOLERANCE[dtype]
        for rows in (1, 3, 4, 16):
            assert torch.equal(group(x[:rows], residual[:rows], **options), y[:rows]), (name, rows)
        assert group(x[:0], **options).shape == (0, 87)


@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_int8_activations(ordered_sums, dtype: torch.dtype):
    """int32 sums are exact, so only the roundings of z, of the result, of the core in bf16 and of the codes next to a half
    are left."""
    torch.manual_seed(7)
    ws = [
        linear("interpolative", 131, 67, 21, ("int8", "int8"), bias=True),
        linear("lowrank", 131, 40, 33, ("int8", "bf16")),
        linear("lowrank", 131, 50, 13, ("int8", "int8")),
    ]
    group = prepare_linear(ws, "triton", int8_activations=True)
    x = activations(18, 131, dtype)
    y = group(x)
    judge = torch.cat([reference(x.double(), w, int8_activations=True, scale_rows=True) for w in ws], dim=1)
    assert (
        relative_error(y, judge) < 4e-3 + TOLERANCE[dtype]
    )  # a code that falls to the other side of a half is 1/127 off
    exact = torch.cat([reference(x.double(), w) for w in ws], dim=1)
    assert relative_error(judge, exact) > 4e-3  # it does round
    assert torch.equal(group(x[:1]), y[:1]) and torch.equal(group(x[2:]), y[2:])
    for options in prologues(131, dtype).values():
        wide = x if "norm" in options else torch.cat([x, x], dim=1)
        assert torch.equal(group(wide[:3], **options), group(wide, **options)[:3])
    x[4, 7] = torch.nan
    broken = group(x)
    assert broken[4].isnan().all() and torch.equal(broken[:4], y[:4])


@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_rounded_rows_are_the_reference_s(dtype: torch.dtype):
    torch.manual_seed(8)
    x = activations(5, 1100, dtype)
    x[2] = 0
    x[3, 5] = 1000
    x[4, :7] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5])  # halves round to even
    codes, scale = backend.quantize_rows(x)
    wanted, wanted_scale = quantize_rows(x)
    assert torch.equal(codes, wanted)
    torch.testing.assert_close(scale, wanted_scale, rtol=3e-7, atol=0)
    assert backend.quantize_rows(x[:0])[0].shape == (0, 1100)
    columns, _ = backend.quantize_rows(x[:, ::2])
    assert torch.equal(columns, quantize_rows(x[:, ::2])[0])


@pytest.mark.parametrize("store", ["bf16", "int4/32z"])
def test_matrix_product_operator(store: str):
    torch.manual_seed(9)
    cores = (core(6 * 5, 4, store), core(7, 5 * 9, store))
    w = LinearWeights("mpo", 36, 42, cores, out_dims=(6, 7), in_dims=(4, 9), bonds=(1, 5, 1))
    both = prepare_linear([w, linear("dense", 36, 10, 0, ("bf16", "bf16"))], "triton")
    x = activations(3, 36, torch.float32)
    y = both(x, norm=RmsNorm(torch.ones(36, device=DEVICE), 1e-5))
    given = rms_norm_reference(x.double(), torch.ones(36, device=DEVICE).double(), 1e-5)
    assert y.shape == (3, 52) and relative_error(y[:, :42], reference(given, w)) < TOLERANCE[torch.float32]
    alone = prepare_linear([w], "triton")
    with pytest.raises(KernelError, match="x has shape"):
        alone(x[:, :35])
    with pytest.raises(KernelError, match="residual is"):
        alone(x, y)


def test_rows_that_are_not_whole_16_bytes_are_copied():
    w = core(5, 24, "fp32")
    assert padded_rows(w.data) is w.data
    for odd in (core(5, 23, "fp32").data, core(5, 24, "int8").data, core(5, 24, "int4/32").data):
        wide = padded_rows(odd)
        assert wide.shape[1] * wide.element_size() % 16 == 0
        assert torch.equal(wide[:, : odd.shape[1]], odd) and not wide[:, odd.shape[1] :].any()


def test_bad_arguments_are_named():
    w = linear("interpolative", 24, 31, 11, ("int8", "int8"))
    x = activations(2, 24, torch.float32)
    group = backend.TritonLinear([w])
    norm = RmsNorm(torch.ones(24, device=DEVICE), 1e-5)
    wide = linear("dense", 133145, 1, 0, ("int8", "int8"))
    int8 = LinearWeights("dense", 24, 31, (Core(torch.zeros(31, 24, dtype=torch.int8, device=DEVICE)),))
    wide_pivot = LinearWeights("interpolative", 24, 31, w.cores, rank=11, pivot=w.pivot.long())
    apart = Core(torch.zeros(31, 48, device=DEVICE)[:, ::2])
    strided = LinearWeights("dense", 24, 31, (apart,))
    elsewhere = LinearWeights("dense", 24, 31, (Core(torch.zeros(31, 24, device="meta")),))
    mpo = LinearWeights("mpo", 4, 4, (core(2, 2, "fp32"),) * 2, out_dims=(2, 2), in_dims=(2, 2), bonds=(1, 1, 1))
    cases = [
        (lambda: backend.slim_linear(x[:, :23], w), "x has shape"),
        (lambda: backend.slim_linear(x.double(), w), "x is torch.float64"),
        (lambda: backend.slim_linear(x[0], w), "x has shape"),
        (lambda: backend.slim_linear(x, w, x), "residual has shape"),
        (lambda: backend.slim_linear(x, w, activations(2, 31, torch.bfloat16)), "residual is torch.bfloat16"),
        (lambda: backend.slim_linear(x, int8), "no scale"),
        (lambda: backend.slim_linear(x, wide_pivot), "w.pivot is torch.int64"),
        (lambda: backend.slim_linear(x, strided), r"w.cores\[0\].data must be contiguous"),
        (lambda: backend.slim_linear(x, elsewhere), "expected meta: the weights are there"),
        (lambda: backend.slim_linear(x[:, :4], mpo), "mpo"),
        (lambda: backend.grouped_linear(x, [w, linear("dense", 23, 4, 0, ("int8",) * 2)]), "takes 23 features, not 24"),
        (lambda: group(x, swiglu=True), "x has shape"),
        (lambda: group(torch.cat([x, x], 1), norm=norm, swiglu=True), "not both"),
        (lambda: group(x, norm=RmsNorm(norm.weight[:3], 1e-5)), "norm.weight has shape"),
        (lambda: backend.TritonLinear([wide], True), "up to 133144 features, not 133145"),
        (lambda: backend.grouped_linear(x, []), "at least one"),
    ]
    for call, message in cases:
        with pytest.raises(KernelError, match=message):
            call()
