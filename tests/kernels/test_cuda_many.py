"""The CUDA kernels for many rows of x, run on a CPU by an emulated device, against float64.

Their bits are held against the decode kernel's in test_cuda_library.py. On a GPU benchmarks/gpu_suite.py runs them."""

from __future__ import annotations

import ctypes

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

PANEL_ROWS, BLOCK = 64, 32
# Whether clusters divide the columns, and whether there are products of warp groups. Where they don't, one cluster of blocks
# that take all columns, 128 or 64 rows of x each, goes through the whole product.
CUTS = {"split": (1, 1), "split, warps": (1, 0), "128 rows": (0, 1), "64 rows": (0, 0)}


class ManyRows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "factor", "residual", "z", "y")),
        *((n, ctypes.c_int64) for n in ("residual_stride", "y_stride")),
        *((n, ctypes.c_int32) for n in ("count", "x_blocks", "z_blocks")),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build("many.cpp", tmp_path_factory.mktemp("emulator"))
    loaded.run_fill.restype = loaded.run_many.restype = ctypes.c_char_p
    loaded.run_fill.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int] * 2]
    loaded.run_many.argtypes = [ctypes.c_int] * 7 + [ctypes.c_void_p] * 4 + [ctypes.c_int64]
    return loaded


def panels(rows: int, columns: int) -> torch.Tensor:
    """Of 16-bit numbers, NaN: [panel, block of columns, row, column as it lies there]."""
    shape = (-(-rows // PANEL_ROWS), -(-columns // BLOCK), PANEL_ROWS, BLOCK)
    return torch.full(shape, -1, dtype=torch.int16)


def places() -> torch.Tensor:
    """[row, column] of a block -> where the number lies in its row, as csrc/cuda/panels.cuh has it."""
    row, column = torch.arange(PANEL_ROWS)[:, None], torch.arange(BLOCK)
    chunk = (column % 8 // 2) ^ (row // 2 % 4)
    return chunk * 8 + column // 8 * 2 + column % 2


def read_panels(p: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    numbers = p.view(dtype).gather(3, places().expand(*p.shape[:2], -1, -1))
    return numbers.transpose(1, 2).reshape(-1, p.shape[1] * BLOCK)[:rows, :columns]


def write_panels(x: torch.Tensor) -> torch.Tensor:
    """As `fill` does without norm and gate."""
    p = panels(*x.shape)
    count, blocks = p.shape[:2]
    wide = torch.zeros(count * PANEL_ROWS, blocks * BLOCK, dtype=x.dtype)
    wide[len(x) :] = torch.nan  # rows that there are not
    wide[: x.shape[0], : x.shape[1]] = x
    numbers = wide.view(count, PANEL_ROWS, blocks, BLOCK).transpose(1, 2).contiguous().view(torch.int16)
    return p.scatter(3, places().expand(*p.shape[:2], -1, -1), numbers)


def fill(
    emulator: ctypes.CDLL, x: torch.Tensor, cols: int, prologue: int = NONE, norm: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    made, factor = panels(x.shape[0], cols), torch.full((x.shape[0],), torch.nan)
    rows = Rows(address(x), None, address(norm), None, None, x.stride(0), 0, 0, 0, 1e-5, x.shape[0], prologue)
    error = emulator.run_fill(
        int(x.dtype == FP16), ctypes.byref(rows), address(made), address(factor), cols, made.shape[1]
    )
    assert error is None, error
    return made, factor


def run(
    emulator: ctypes.CDLL,
    x: torch.Tensor,
    matrices: list[Matrix],
    residual: torch.Tensor | None = None,
    *,
    cut: str = "split",
    eager: bool = False,
    factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(z as panels, y); what nothing wrote stays NaN. x's panels hold NaN until the kernel waits for the one ahead of it."""
    count, there = x.shape[0], write_panels(x)
    y = torch.full((count, sum(m.width for m in matrices)), torch.nan, dtype=x.dtype)
    z = panels(count, sum(-(-m.core.shape[0] // BLOCK) * BLOCK for m in matrices))
    group, packed = group_of(matrices, z_columns=BLOCK)
    kept = there.clone()
    there.fill_(-1)  # NaN
    strides = (residual.stride(0) if residual is not None else 0, y.stride(0))
    launch = ManyRows(
        *map(address, (there, factor, residual, z, y)), *strides, count, there.shape[1], z.shape[1]
    )  # fmt: skip
    _, _, store, columns, zero = packed[0].description
    error = emulator.run_many(
        int(x.dtype == FP16), store, columns, zero, *CUTS[cut], int(eager), ctypes.byref(launch), ctypes.byref(group),
        address(there), address(kept), there.nbytes,
    )  # fmt: skip
    assert error is None, error
    assert torch.equal(there, kept)
    return z, y


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rows_become_panels(emulator: ctypes.CDLL, dtype: torch.dtype):
    torch.manual_seed(0)
    for rows, cols in ((1, 1), (17, 40), (64, 257), (130, 2200)):
        x = torch.randn(rows, cols + 3).to(dtype)[:, 1 : cols + 1]
        made, _ = fill(emulator, x, cols)
        whole = made.shape[1] * BLOCK
        assert torch.equal(read_panels(made, rows, cols, dtype), x)
        assert (read_panels(made, rows, whole, dtype)[:, cols:] == 0).all()
        assert torch.equal(made[:-1], write_panels(x)[:-1])
        assert (read_panels(made, made.shape[0] * PANEL_ROWS, whole, BF16)[rows:]).isnan().all()  # not written


@pytest.mark.parametrize("cols", [264, 331, 2304])
def test_rows_go_through_norm_and_gate(emulator: ctypes.CDLL, cols: int):
    torch.manual_seed(cols)
    x = (torch.randn(20, cols) * torch.rand(20, 1) * 30).to(BF16)
    weight = (torch.rand(cols) + 0.5).to(BF16)
    made, factor = fill(emulator, x, cols, NORM, weight)
    assert torch.equal(read_panels(made, 20, cols, BF16), x * weight)
    wanted = torch.rsqrt(x.double().pow(2).mean(1) + 1e-5)
    assert torch.allclose(factor.double(), wanted, rtol=1e-6)
    gate_up = torch.randn(20, 2 * cols).to(BF16)
    made, _ = fill(emulator, gate_up, cols, SWIGLU)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert relative_error(read_panels(made, 20, cols, BF16), torch.nn.functional.silu(gate) * up) < TOLERANCE[BF16]


@pytest.mark.parametrize(
    ("activation", "store", "cut"),
    [(BF16, store, cut) for store in STORES for cut in ("split", "128 rows")]
    + [(FP16, store, cut) for store in FEW_STORES for cut in ("split, warps", "64 rows")],
)
def test_products_match_float64(emulator: ctypes.CDLL, activation: torch.dtype, store: str, cut: str):
    """Results to z, to y, to both by a pivot; more rows of x than a panel, the last one not full."""
    torch.manual_seed(len(store))
    rows, cols = (70, 1056) if cut.startswith("split") else (135, 544)
    x = torch.randn(rows, cols).to(activation)
    plain = Matrix(random_core(7, cols, store, activation), TO_Z)
    index = torch.randperm(170)[:149].to(torch.int32)
    index[0] = 170  # the widest column, so that y's width is known
    scattered = Matrix(random_core(149, cols, store, activation), TO_Z | TO_Y, index, torch.randn(171))
    last = Matrix(random_core(33, cols, store, activation), TO_Y)
    residual = torch.randn(rows, 7 + 171 + 33).to(activation)
    z, y = run(emulator, x, [plain, scattered, last], residual, cut=cut)
    first, second, third = (x.double() @ m.values().T for m in (plain, scattered, last))
    made = read_panels(z, rows, 32 + 160 + 64, activation)
    assert relative_error(made[:, :7], first) < TOLERANCE[activation]
    assert relative_error(made[:, 32:181], second) < TOLERANCE[activation]
    assert (made[:, 7:32] == 0).all() and (made[:, 181:192] == 0).all()  # the rest of their blocks
    assert made[:, 192:].isnan().all()
    assert y[:, :7].isnan().all()  # columns that belong to nobody
    wanted = torch.full((rows, 171), torch.nan, dtype=torch.float64)
    at = index.long()
    assert scattered.bias is not None
    wanted[:, at] = second + scattered.bias.double()[at] + residual.double()[:, 7 + at]
    got = y[:, 7:178]
    assert torch.equal(got.isnan(), wanted.isnan())
    assert relative_error(got[:, at], wanted[:, at]) < TOLERANCE[activation]
    assert relative_error(y[:, 178:], third + residual.double()[:, 178:]) < TOLERANCE[activation]


@pytest.mark.parametrize("store", FEW_STORES)
@pytest.mark.parametrize("cols", [1, 61, 130, 523])
def test_columns_that_fill_no_stage(emulator: ctypes.CDLL, store: str, cols: int):
    torch.manual_seed(cols)
    x = torch.randn(18, cols).to(BF16)
    m = Matrix(random_core(18, cols, store, BF16), TO_Y)
    first = None
    for cut in CUTS:
        for eager in (False, True):
            _, y = run(emulator, x, [m], cut=cut, eager=eager)
            assert relative_error(y, x.double() @ m.values().T) < TOLERANCE[BF16]
            first = y if first is None else first
            assert torch.equal(y, first)


@pytest.mark.parametrize("store", FEW_STORES)
def test_bits_depend_on_nothing_but_the_row(emulator: ctypes.CDLL, store: str):
    """Not on the cut of the launch, the instruction, the moment of the copies, nor on the other rows; products of different
    columns, and more tiles than a group has."""
    torch.manual_seed(3)
    x = torch.randn(70, 64 + 320 + 160).to(BF16)
    x[:, 64 + 320 + 130 :] = 0  # as whoever fills panels does: int4's codes there are not
    sizes = ((150, 64, 0), (16, 320, 64), (33, 130, 384))
    matrices = [Matrix(random_core(rows, cols, store, BF16), TO_Y, x_col=at) for rows, cols, at in sizes]
    expected = torch.cat(
        [x.double()[:, m.x_col : m.x_col + m.core.shape[1]] @ m.values().T for m in matrices], dim=1
    )  # fmt: skip
    _, first = run(emulator, x, matrices)
    assert relative_error(first, expected) < TOLERANCE[BF16]
    for cut in CUTS:
        assert torch.equal(run(emulator, x, matrices, cut=cut, eager=True)[1], first)
        assert torch.equal(run(emulator, x.flip(0)[:50], matrices, cut=cut)[1], first.flip(0)[:50])


def test_sums_are_multiplied_by_the_rows_factor(emulator: ctypes.CDLL):
    torch.manual_seed(0)
    x, factor = torch.randn(20, 96).to(BF16), torch.rand(20)
    m = Matrix(random_core(20, 96, "int8", BF16), TO_Z | TO_Y)
    for cut in CUTS:
        z, y = run(emulator, x, [m], cut=cut, factor=factor)
        wanted = x.double() @ m.values().T * factor.double()[:, None]
        assert relative_error(y, wanted) < TOLERANCE[BF16]
        assert torch.equal(read_panels(z, 20, 20, BF16), y)
