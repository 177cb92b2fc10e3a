"""The CUDA decode kernel, run on a CPU by an emulated device, against float64. On a GPU benchmarks/gpu_suite.py runs it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: its headers are needed")

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
TO_Z, TO_Y = 1, 2
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "scale", "index", "bias")),
        ("w_stride", ctypes.c_int64),
        *((n, ctypes.c_int32) for n in ("rows", "cols", "x_col", "z_col", "y_col", "destination")),
        *((n, ctypes.c_int32) for n in ("team", "vectorized", "first_block")),
    ]  # fmt: skip


class Group(ctypes.Structure):
    _fields_ = [("product", Product * 4), ("count", ctypes.c_int32)]


class Rows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "z", "y")),
        *((n, ctypes.c_int64) for n in ("x_stride", "residual_stride", "z_stride", "y_stride")),
        ("count", ctypes.c_int32),
    ]  # fmt: skip


def toolkit_headers() -> str:
    """The toolkit's headers, as nvcc itself reports them: it may be a wrapper script."""
    assert NVCC is not None
    source = next((ROOT / "csrc/cuda").glob("*.cu"))
    done = subprocess.run([NVCC, "--dryrun", "-c", str(source)], capture_output=True, text=True, check=True)
    found = re.search(r'INCLUDES="?-I([^"\s]+)', done.stderr)
    assert found is not None, done.stderr
    return found.group(1)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("emulator") / "products.so"
    source = ROOT / "tests/kernels/cuda_emulator/products.cpp"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{toolkit_headers()}"]
    compiler = (os.environ.get("CXX") or "c++").split()
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-attributes"]
    subprocess.run([*compiler, *flags, *includes, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.run_products.restype = ctypes.c_char_p
    return loaded


@dataclass
class Matrix:
    """A stored matrix and how a launch uses it."""

    data: torch.Tensor
    scale: torch.Tensor | None
    destination: int
    index: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    x_col: int = 0

    def values(self) -> torch.Tensor:
        w = self.data.double()
        return w if self.scale is None else w * self.scale.double()[:, None]


def address(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def run(
    emulator: ctypes.CDLL, x: torch.Tensor, matrices: list[Matrix], residual: torch.Tensor | None = None, tile: int = 0
) -> tuple[torch.Tensor, torch.Tensor, Group]:
    """(z, y, the planned group); what nothing wrote stays NaN. tile 0: the one that the launch would choose."""
    count = x.shape[0]
    width = sum(m.data.shape[0] if m.index is None else int(m.index.max()) + 1 for m in matrices)
    y = torch.full((count, width), torch.nan, dtype=x.dtype)
    z = torch.full((count, sum(m.data.shape[0] for m in matrices) + 5), torch.nan, dtype=x.dtype)
    group = Group()
    group.count = len(matrices)
    z_col = y_col = 0
    for g, m in enumerate(matrices):
        rows, cols = m.data.shape
        fields = (address(m.data), address(m.scale), address(m.index), address(m.bias), m.data.stride(0), rows, cols)
        group.product[g] = Product(*fields, m.x_col, z_col, y_col, m.destination, 0, 0, 0)
        z_col += rows
        y_col += rows if m.index is None else int(m.index.max()) + 1
    strides = (x.stride(0), residual.stride(0) if residual is not None else 0, z.stride(0), y.stride(0))
    launch = Rows(address(x), address(residual), address(z), address(y), *strides, count)
    tile = tile or next(t for t in (1, 4, 8, 16) if t >= count)
    store = CODES[matrices[0].data.dtype]
    error = emulator.run_products(CODES[x.dtype], store, tile, ctypes.byref(launch), ctypes.byref(group))
    assert error is None, error
    return z, y, group


def random_matrix(rows: int, cols: int, store: torch.dtype, destination: int) -> Matrix:
    if store == torch.int8:
        data = torch.randint(-127, 128, (rows, cols), dtype=torch.int8)
        return Matrix(data, torch.rand(rows) / 500 + 1e-4, destination)
    return Matrix(torch.randn(rows, cols).to(store), None, destination)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("store", list(CODES))
@pytest.mark.parametrize("activation", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_products_match_float64(emulator: ctypes.CDLL, activation: torch.dtype, store: torch.dtype, rows: int):
    torch.manual_seed(rows)
    cols = 1056 if rows == 1 else 144  # a row shared by the block, and by a warp
    x = torch.randn(rows, cols).to(activation)
    plain = random_matrix(7, cols, store, TO_Z)
    scattered = random_matrix(21, cols, store, TO_Z | TO_Y)
    index = torch.randperm(30)[:21].to(torch.int32)
    index[0] = 30  # the widest column, so that y's width is known
    bias = torch.randn(31)
    scattered.index, scattered.bias = index, bias
    both = random_matrix(5, cols, store, TO_Y)
    residual = torch.randn(rows, 7 + 31 + 5).to(activation)
    z, y, _ = run(emulator, x, [plain, scattered, both], residual)
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


@pytest.mark.parametrize("store", list(CODES))
@pytest.mark.parametrize("cols", [1, 17, 61, 523])
def test_columns_that_fit_no_vector(emulator: ctypes.CDLL, store: torch.dtype, cols: int):
    torch.manual_seed(cols)
    x = torch.randn(2, cols).to(torch.bfloat16)
    m = random_matrix(18, cols, store, TO_Y)
    _, y, group = run(emulator, x, [m])
    assert not group.product[0].vectorized
    assert relative_error(y, x.double() @ m.values().T) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("store", list(CODES))
def test_padded_rows_are_read_in_vectors_to_their_end(emulator: ctypes.CDLL, store: torch.dtype):
    """77 columns in rows of 96: aligned vectors, then single columns."""
    torch.manual_seed(0)
    x = torch.randn(3, 96)[:, :77]
    m = random_matrix(9, 96, store, TO_Y)
    m.data = m.data[:, :77]
    _, y, group = run(emulator, x, [m])
    assert group.product[0].vectorized
    assert relative_error(y, x.double() @ m.values().T) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("store", list(CODES))
@pytest.mark.parametrize("cols", [160, 2112])
def test_bits_of_a_row_do_not_depend_on_rows_or_alignment(emulator: ctypes.CDLL, store: torch.dtype, cols: int):
    torch.manual_seed(cols)
    x = torch.randn(2, cols)
    m = random_matrix(6, cols, store, TO_Y)
    _, alone, group = run(emulator, x[:1], [m])
    assert group.product[0].vectorized
    _, together, _ = run(emulator, x, [m])
    _, widest, _ = run(emulator, x, [m], tile=16)
    apart = torch.zeros(2, cols + 1)
    apart[:, 1:] = x
    _, unaligned, group = run(emulator, apart[:, 1:], [m])
    assert not group.product[0].vectorized
    assert torch.equal(alone[0], together[0])
    assert torch.equal(together, widest)
    assert torch.equal(together, unaligned)


def test_two_stages_make_an_interpolative_linear(emulator: ctypes.CDLL):
    """What decode_linear of ops.cu launches: z = core_0 x, to z and by pivot to y; then core_1 z to the rest of y."""
    torch.manual_seed(0)
    rank, out, inp = 24, 40, 96
    x = torch.randn(5, inp)
    pivot = torch.randperm(out).to(torch.int32)
    pivot[[0, int((pivot == out - 1).nonzero())]] = pivot[
        [int((pivot == out - 1).nonzero()), 0]
    ]  # the widest column first
    core0, core1 = random_matrix(rank, inp, torch.int8, TO_Z | TO_Y), random_matrix(out - rank, rank, torch.int8, TO_Y)
    core0.index, core1.index = pivot[:rank], pivot[rank:]
    z, y, _ = run(emulator, x, [core0])
    _, rest, _ = run(emulator, z[:, :rank], [core1])
    columns = pivot[rank:].long()
    y[:, columns] = rest[:, columns]
    expected = torch.empty(5, out, dtype=torch.float64)
    expected[:, pivot[:rank].long()] = first = x.double() @ core0.values().T
    expected[:, columns] = first @ core1.values().T
    assert relative_error(y, expected) < 1e-6
