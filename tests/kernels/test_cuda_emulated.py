"""The CUDA decode kernel, run on a CPU by an emulated device, against float64.

On a GPU benchmarks/gpu_suite.py runs it for real."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from cuda_emulation import (
    BF16,
    FEW_STORES,
    FP16,
    NONE,
    NORM,
    NVCC,
    STORES,
    SWIGLU,
    TO_Y,
    TO_Z,
    TOLERANCE,
    Matrix,
    Rows,
    address,
    build,
    group_of,
    random_core,
    relative_error,
)

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: its headers are needed")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build("products.cpp", tmp_path_factory.mktemp("emulator"))
    loaded.run_linear.restype = loaded.run_swiglu_bf16.restype = ctypes.c_char_p
    loaded.run_linear.argtypes = [ctypes.c_int] * 8 + [ctypes.c_void_p] * 4 + [ctypes.c_int64]
    loaded.run_swiglu_bf16.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    return loaded


def run(
    emulator: ctypes.CDLL,
    x: torch.Tensor,
    matrices: list[Matrix],
    residual: torch.Tensor | None = None,
    *,
    cluster: int = 0,
    at_once: int = 2,
    wide: bool = False,
    eager: bool = False,
    prologue: int = NONE,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, y); what nothing wrote stays NaN. x holds NaN until the kernel waits for the one ahead of it.

    cluster: blocks that share a group of tiles, 0 for what the launch would choose. at_once: clusters that run together.
    wide: by the kernel for 9 to 16 rows. eager: copies are made at once, not when they are waited for."""
    count = x.shape[0]
    y = torch.full((count, sum(m.width for m in matrices)), torch.nan, dtype=x.dtype)
    z = torch.full((count, sum(m.core.shape[0] for m in matrices) + 5), torch.nan, dtype=x.dtype)
    group, packed = group_of(matrices, z_columns=1)
    storage = x.untyped_storage()
    there = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
    kept = there.clone()
    there.fill_(255)  # NaN
    strides = (x.stride(0), residual.stride(0) if residual is not None else 0, z.stride(0), y.stride(0))
    launch = Rows(*map(address, (x, residual, norm, z, y)), *strides, eps, count, prologue)
    _, _, store, columns, zero = packed[0].description
    how = (int(x.dtype == FP16), store, columns, zero, cluster, at_once, int(wide), int(eager))
    error = emulator.run_linear(
        *how, ctypes.byref(launch), ctypes.byref(group), address(there), address(kept), there.numel()
    )
    assert error is None, error
    assert torch.equal(there, kept)
    return z, y


@pytest.mark.parametrize("activation", [BF16, FP16])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_products_match_float64(emulator: ctypes.CDLL, activation: torch.dtype, store: str, rows: int):
    torch.manual_seed(rows)
    cols = 1056 if rows == 1 else 144
    x = torch.randn(rows, cols).to(activation)
    plain = Matrix(random_core(7, cols, store, activation), TO_Z)
    index = torch.randperm(30)[:21].to(torch.int32)
    index[0] = 30  # the widest column, so that y's width is known
    bias = torch.randn(31)
    scattered = Matrix(random_core(21, cols, store, activation), TO_Z | TO_Y, index, bias)
    both = Matrix(random_core(5, cols, store, activation), TO_Y)
    residual = torch.randn(rows, 7 + 31 + 5).to(activation)
    z, y = run(emulator, x, [plain, scattered, both], residual)
    first, second, third = (x.double() @ m.values().T for m in (plain, scattered, both))
    assert relative_error(z[:, :28], torch.cat([first, second], 1)) < TOLERANCE[activation]
    assert z[:, 28:].isnan().all() and y[:, :7].isnan().all()  # columns that belong to nobody
    wanted = torch.full((rows, 31), torch.nan, dtype=torch.float64)
    at = index.long()
    wanted[:, at] = second + bias.double()[at] + residual.double()[:, 7 + at]
    got = y[:, 7:38]
    assert torch.equal(got.isnan(), wanted.isnan())
    assert relative_error(got[:, at], wanted[:, at]) < TOLERANCE[activation]
    assert relative_error(y[:, 38:], third + residual.double()[:, 38:]) < TOLERANCE[activation]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("cols", [1, 17, 61, 96, 130, 523])
def test_columns_that_fill_no_step(emulator: ctypes.CDLL, store: str, cols: int):
    torch.manual_seed(cols)
    x = torch.randn(2, cols).to(BF16)
    m = Matrix(random_core(18, cols, store, BF16), TO_Y)
    expected = x.double() @ m.values().T
    for cluster in (1, 8):
        assert relative_error(run(emulator, x, [m], cluster=cluster)[1], expected) < TOLERANCE[BF16]


@pytest.mark.parametrize("store", FEW_STORES)
@pytest.mark.parametrize("cols", [160, 2112])
def test_bits_of_a_row_depend_on_nothing_else(emulator: ctypes.CDLL, store: str, cols: int):
    """Not on other rows, nor on their number, its alignment, clusters, blocks, nor on when copies are made."""
    torch.manual_seed(cols)
    x = torch.randn(3, cols).to(BF16)
    m = Matrix(random_core(40, cols, store, BF16), TO_Y)
    _, alone = run(emulator, x[:1].clone(), [m])
    _, together = run(emulator, x, [m])
    assert torch.equal(alone[0], together[0])
    _, turned = run(emulator, x.flip(0).contiguous(), [m])
    assert torch.equal(turned.flip(0), together)
    for cluster, at_once, wide in ((1, 1, True), (1, 8, False), (2, 1, False), (4, 2, True), (8, 1, False)):
        for eager in (False, True):
            _, same = run(emulator, x, [m], cluster=cluster, at_once=at_once, wide=wide, eager=eager)
            assert torch.equal(same, together)
    apart = torch.zeros(3, cols + 1, dtype=BF16)
    apart[:, 1:] = x
    assert torch.equal(run(emulator, apart[:, 1:], [m])[1], together)


@pytest.mark.parametrize("store", FEW_STORES)
def test_products_of_different_columns(emulator: ctypes.CDLL, store: str):
    """Second cores: each reads columns of its own, and all of them are in shared memory at once."""
    torch.manual_seed(3)
    x = torch.randn(5, 48 + 304 + 80).to(BF16)
    sizes = ((70, 48, 0), (16, 304, 48), (33, 80, 352), (9, 304, 48))
    matrices = [Matrix(random_core(rows, cols, store, BF16), TO_Y, x_col=at) for rows, cols, at in sizes]
    values = [x.double()[:, at : at + cols] for _, cols, at in sizes]
    expected = torch.cat([v @ m.values().T for v, m in zip(values, matrices, strict=True)], dim=1)
    first = None
    for cluster, at_once in itertools.product((1, 2, 4, 8), (1, 3)):
        _, y = run(emulator, x, matrices, cluster=cluster, at_once=at_once)
        assert relative_error(y, expected) < TOLERANCE[BF16]
        first = y if first is None else first
        assert torch.equal(y, first)


@pytest.mark.parametrize("store", FEW_STORES)
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_norm(emulator: ctypes.CDLL, store: str, rows: int):
    """RMSNorm ahead of the products, over several tiles of a block, each row the bits that it has alone."""
    torch.manual_seed(rows)
    cols, eps = 328, 1e-5
    x = (torch.randn(rows, cols) * torch.rand(rows, 1) * 30).bfloat16()
    weight = (torch.rand(cols) + 0.5).bfloat16()
    matrices = [Matrix(random_core(n, cols, store, BF16), TO_Y) for n in (40, 19)]
    _, y = run(emulator, x, matrices, prologue=NORM, norm=weight, eps=eps)
    normed = x.double() * torch.rsqrt(x.double().pow(2).mean(1, keepdim=True) + eps) * weight.double()
    expected = torch.cat([normed @ m.values().T for m in matrices], dim=1)
    assert relative_error(y, expected) < TOLERANCE[BF16]
    for i in {0, rows - 1}:
        row = x[i : i + 1].clone()
        _, alone = run(emulator, row, matrices, prologue=NORM, norm=weight, eps=eps, at_once=100)
        assert torch.equal(alone[0], y[i])
    for cluster in (2, 8):
        _, same = run(emulator, x, matrices, prologue=NORM, norm=weight, eps=eps, cluster=cluster)
        assert torch.equal(same, y)


@pytest.mark.parametrize("store", FEW_STORES)
def test_swiglu(emulator: ctypes.CDLL, store: str):
    """The gate in the kernel gives the bits of the gate by itself."""
    torch.manual_seed(0)
    for cols in (330, 328):  # without wide loads, and with
        x = (torch.randn(2, 2 * cols) * 4).bfloat16()
        x[0, 0], x[1, 1] = -200.0, 200.0  # where exp overflows, or vanishes
        gate, up = x.double().chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
        gated = torch.full((2, cols), torch.nan, dtype=BF16)
        error = emulator.run_swiglu_bf16(address(x), x.stride(0), address(gated), gated.stride(0), 2, cols)
        assert error is None, error
        assert relative_error(gated, expected) < TOLERANCE[BF16]
        m = Matrix(random_core(40, cols, store, BF16), TO_Y)
        _, plain = run(emulator, gated, [m])
        for cluster in (1, 2, 8):
            assert torch.equal(run(emulator, x, [m], prologue=SWIGLU, cluster=cluster)[1], plain)
        assert torch.equal(run(emulator, x[1:].clone(), [m], prologue=SWIGLU)[1], plain[1:])


@pytest.mark.parametrize("store", ["own", "int8"])
def test_more_rows_of_x_than_fit_are_refused(emulator: ctypes.CDLL, store: str):
    m = Matrix(random_core(16, 40_000, store, BF16), TO_Y)
    with pytest.raises(AssertionError, match="do not fit"):
        run(emulator, torch.randn(16, 40_000).to(BF16), [m])
    x = torch.randn(8, 40_000).to(BF16)
    assert relative_error(run(emulator, x, [m])[1], x.double() @ m.values().T) < TOLERANCE[BF16]
