"""The CUDA decode kernels, run on a CPU by an emulated device, against float64.

On a GPU benchmarks/gpu_suite.py runs them for real."""

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

from cai_runtime.kernels.weights import Core

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: its headers are needed")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ACTIVATIONS = {FP32: 0, BF16: 1, FP16: 2}
STORES = {"fp32": 0, "bf16": 1, "fp16": 2, "int8": 3, "int4": 4}
FLOATS = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
TO_Z, TO_Y = 1, 2
NONE, NORM, SWIGLU = 0, 1, 2
TOLERANCE = {FP32: 1e-6, BF16: 4e-3, FP16: 5e-4}
# (activation, store) as launch.cuh takes them: to the tensor cores' kernel, and to the other.
MATRIX = [(a, s) for a in (BF16, FP16) for s in ("own", "int8", "int4")]
PLAIN = [(FP32, s) for s in STORES] + [(BF16, "fp32"), (FP16, "fp32")]


class Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "scale", "zero", "index", "bias")),
        ("w_stride", ctypes.c_int64),
        *((n, ctypes.c_int32) for n in ("scale_stride", "zero_stride", "group_bits", "rows", "cols")),
        *((n, ctypes.c_int32) for n in ("x_col", "z_col", "y_col", "destination")),
        *((n, ctypes.c_int32) for n in ("team", "copy_bytes", "copy_scales", "first_block", "reserved")),
    ]  # fmt: skip


class Group(ctypes.Structure):
    _fields_ = [("product", Product * 4), ("count", ctypes.c_int32)]


class Rows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "norm", "z", "y")),
        *((n, ctypes.c_int64) for n in ("x_stride", "residual_stride", "z_stride", "y_stride")),
        ("eps", ctypes.c_float), ("count", ctypes.c_int32), ("x_vector", ctypes.c_int32),
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
    loaded.run_linear.restype = loaded.run_swiglu_bf16.restype = ctypes.c_char_p
    loaded.run_swiglu_bf16.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    return loaded


@dataclass
class Matrix:
    """A core and how a launch uses it."""

    core: Core
    destination: int
    index: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    x_col: int = 0

    def values(self) -> torch.Tensor:
        return self.core.values(torch.float64)

    @property
    def width(self) -> int:
        return self.core.shape[0] if self.index is None else int(self.index.max()) + 1


def address(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def run(
    emulator: ctypes.CDLL,
    x: torch.Tensor,
    matrices: list[Matrix],
    residual: torch.Tensor | None = None,
    *,
    tile: int = 0,
    at_once: int = 2,
    prologue: int = NONE,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, Group]:
    """(z, y, the group); what nothing wrote stays NaN. tile 0: the one that the launch would choose."""
    count = x.shape[0]
    y = torch.full((count, sum(m.width for m in matrices)), torch.nan, dtype=x.dtype)
    z = torch.full((count, sum(m.core.shape[0] for m in matrices) + 5), torch.nan, dtype=x.dtype)
    group = Group()
    group.count = len(matrices)
    z_col = y_col = 0
    for g, m in enumerate(matrices):
        c = m.core
        rows, cols = c.shape
        strides = [0 if t is None or not c.is_int4 else t.stride(0) for t in (c.scale, c.zero)]
        fields = [*map(address, (c.data, c.scale, c.zero, m.index, m.bias)), c.data.stride(0) * c.data.element_size()]
        group.product[g] = Product(
            *fields, *strides, c.group.bit_length() - 1, rows, cols, m.x_col, z_col, y_col, m.destination
        )
        z_col += rows
        y_col += m.width
    strides = (x.stride(0), residual.stride(0) if residual is not None else 0, z.stride(0), y.stride(0))
    launch = Rows(address(x), address(residual), address(norm), address(z), address(y), *strides, eps, count)
    tile = tile or next(t for t in (1, 4, 8, 16) if t >= count)
    store = STORES[matrices[0].core.store]
    arguments = (ACTIVATIONS[x.dtype], store, prologue, tile, at_once, ctypes.byref(launch), ctypes.byref(group))
    error = emulator.run_linear(*arguments)
    assert error is None, error
    return z, y, group


def random_core(
    rows: int, cols: int, store: str, activation: torch.dtype, *, group: int = 64, zero: bool = True
) -> Core:
    if store == "int8":
        return Core(torch.randint(-128, 128, (rows, cols), dtype=torch.int8), torch.rand(rows) / 500 + 1e-4)
    if store == "int4":
        groups = -(-cols // group)
        data = torch.randint(0, 256, (rows, -(-cols // 2)), dtype=torch.uint8)
        scale = (torch.rand(rows, groups) / 20 + 0.01).bfloat16()
        zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8) if zero else None
        return Core(data, scale, zeros, group, cols)
    return Core(torch.randn(rows, cols).to(activation if store == "own" else FLOATS[store]))


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("activation", "store"), MATRIX + PLAIN)
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_products_match_float64(emulator: ctypes.CDLL, activation: torch.dtype, store: str, rows: int):
    if rows == 16 and (activation, store) in PLAIN:
        pytest.skip("the launch splits them")
    torch.manual_seed(rows)
    cols = 1056 if rows == 1 else 144
    x = torch.randn(rows, cols).to(activation)
    plain = Matrix(random_core(7, cols, store, activation), TO_Z)
    index = torch.randperm(30)[:21].to(torch.int32)
    index[0] = 30  # the widest column, so that y's width is known
    bias = torch.randn(31)
    scattered = Matrix(random_core(21, cols, store, activation), TO_Z | TO_Y, index, bias)
    both = Matrix(random_core(5, cols, store, activation, zero=False), TO_Y)
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


@pytest.mark.parametrize(("activation", "store"), MATRIX + PLAIN)
@pytest.mark.parametrize("cols", [1, 17, 61, 523])
def test_columns_that_fit_no_vector(emulator: ctypes.CDLL, activation: torch.dtype, store: str, cols: int):
    torch.manual_seed(cols)
    x = torch.randn(2, cols).to(activation)
    m = Matrix(random_core(18, cols, store, activation, group=32), TO_Y)
    _, y, group = run(emulator, x, [m])
    assert group.product[0].copy_bytes != 16
    assert relative_error(y, x.double() @ m.values().T) < TOLERANCE[activation]


@pytest.mark.parametrize(("activation", "store"), MATRIX + PLAIN)
def test_padded_rows_are_read_in_vectors_to_their_end(emulator: ctypes.CDLL, activation: torch.dtype, store: str):
    """77 columns in wider, aligned rows, whose ends hold what must not be used."""
    torch.manual_seed(0)
    x = torch.full((3, 96), torch.nan, dtype=activation)
    x[:, :77] = torch.randn(3, 77).to(activation)
    c = random_core(9, 77, store, activation, group=32)
    padded = torch.full((9, 96), float("nan") if c.data.is_floating_point() else 1).to(c.data.dtype)
    padded[:, : c.data.shape[1]] = c.data
    m = Matrix(Core(padded[:, : c.data.shape[1]], c.scale, c.zero, c.group, c.columns), TO_Y)
    _, y, group = run(emulator, x[:, :77], [m])
    assert group.product[0].copy_bytes == 16
    assert relative_error(y, x[:, :77].double() @ m.values().T) < TOLERANCE[activation]


@pytest.mark.parametrize("activation", [FP32, BF16, FP16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("zero", [False, True])
def test_int4_groups(emulator: ctypes.CDLL, activation: torch.dtype, group: int, zero: bool):
    """Every group width, its scales aligned for copies and not, many tiles to a block."""
    torch.manual_seed(group)
    for cols in (512, 290):
        x = torch.randn(5, cols).to(activation)
        matrices = [Matrix(random_core(n, cols, "int4", activation, group=group, zero=zero), TO_Y) for n in (70, 16, 9)]
        _, y, _ = run(emulator, x, matrices, at_once=3)
        expected = torch.cat([x.double() @ m.values().T for m in matrices], dim=1)
        assert relative_error(y, expected) < TOLERANCE[activation]


@pytest.mark.parametrize(("activation", "store"), MATRIX + [(FP32, s) for s in STORES])
@pytest.mark.parametrize("cols", [160, 2112])
def test_bits_of_a_row_do_not_depend_on_rows_or_alignment(
    emulator: ctypes.CDLL, activation: torch.dtype, store: str, cols: int
):
    torch.manual_seed(cols)
    x = torch.randn(3, cols).to(activation)
    c = random_core(22, cols, store, activation)
    m = Matrix(c, TO_Y)
    _, alone, group = run(emulator, x[:1], [m])
    assert group.product[0].copy_bytes == 16
    _, together, _ = run(emulator, x, [m])
    assert torch.equal(alone[0], together[0])
    _, turned, _ = run(emulator, x.flip(0).contiguous(), [m])
    assert torch.equal(turned.flip(0), together)
    for tile, at_once in ((16 if activation != FP32 else 4, 1), (8, 8)):
        assert torch.equal(run(emulator, x, [m], tile=tile, at_once=at_once)[1], together)
    apart = torch.zeros(3, cols + 1, dtype=activation)
    apart[:, 1:] = x
    assert torch.equal(run(emulator, apart[:, 1:], [m])[1], together)
    for pad in (1, 4, 8):
        wide = torch.zeros(22, c.data.shape[1] + pad, dtype=c.data.dtype)
        wide[:, : c.data.shape[1]] = c.data
        unaligned = Core(wide[:, : c.data.shape[1]], c.scale, c.zero, c.group, c.columns)
        _, same, group = run(emulator, x, [Matrix(unaligned, TO_Y)])
        assert group.product[0].copy_bytes != 16 or pad * c.data.element_size() % 16 == 0
        assert torch.equal(same, together)


@pytest.mark.parametrize("store", ["own", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_norm(emulator: ctypes.CDLL, store: str, rows: int):
    """RMSNorm ahead of the products, over several tiles of a block, each row the bits that it has alone."""
    torch.manual_seed(rows)
    cols, eps = 328, 1e-5
    x = (torch.randn(rows, cols) * torch.rand(rows, 1) * 30).bfloat16()
    weight = (torch.rand(cols) + 0.5).bfloat16()
    matrices = [Matrix(random_core(n, cols, store, BF16), TO_Y) for n in (40, 19)]
    _, y, _ = run(emulator, x, matrices, prologue=NORM, norm=weight, eps=eps)
    normed = x.double() * torch.rsqrt(x.double().pow(2).mean(1, keepdim=True) + eps) * weight.double()
    expected = torch.cat([normed @ m.values().T for m in matrices], dim=1)
    assert relative_error(y, expected) < TOLERANCE[BF16]
    for i in {0, rows - 1}:
        _, alone, _ = run(emulator, x[i : i + 1], matrices, prologue=NORM, norm=weight, eps=eps, at_once=100)
        assert torch.equal(alone[0], y[i])


@pytest.mark.parametrize("store", ["own", "int8", "int4"])
def test_swiglu(emulator: ctypes.CDLL, store: str):
    """The gate in the kernel gives the bits of the gate by itself."""
    torch.manual_seed(0)
    cols = 330
    x = (torch.randn(2, 2 * cols) * 4).bfloat16()
    x[0, 0], x[1, 1] = -200.0, 200.0  # where exp overflows, or vanishes
    gate, up = x.double().chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    gated = torch.full((2, cols), torch.nan, dtype=BF16)
    error = emulator.run_swiglu_bf16(address(x), x.stride(0), address(gated), gated.stride(0), 2, cols)
    assert error is None, error
    assert relative_error(gated, expected) < TOLERANCE[BF16]
    m = Matrix(random_core(40, cols, store, BF16), TO_Y)
    _, y, _ = run(emulator, x, [m], prologue=SWIGLU)
    assert torch.equal(y, run(emulator, gated, [m])[1])
    assert torch.equal(run(emulator, x[1:], [m], prologue=SWIGLU)[1], y[1:])


@pytest.mark.parametrize("store", ["int8", "int4"])
def test_two_stages_make_an_interpolative_linear(emulator: ctypes.CDLL, store: str):
    """What decode_linear of ops.cu launches: z = core_0 x, to z and by pivot to y; then core_1 z to the rest of y."""
    torch.manual_seed(0)
    rank, out, inp = 24, 40, 96
    x = torch.randn(5, inp)
    pivot = torch.randperm(out).to(torch.int32)
    last = int((pivot == out - 1).nonzero())
    pivot[[0, last]] = pivot[[last, 0]]  # the widest column first
    core0, core1 = random_core(rank, inp, store, FP32), random_core(out - rank, rank, store, FP32)
    z, y, _ = run(emulator, x, [Matrix(core0, TO_Z | TO_Y, pivot[:rank])])
    _, rest, _ = run(emulator, z[:, :rank], [Matrix(core1, TO_Y, pivot[rank:])])
    columns = pivot[rank:].long()
    y[:, columns] = rest[:, columns]
    expected = torch.empty(5, out, dtype=torch.float64)
    expected[:, pivot[:rank].long()] = first = x.double() @ core0.values(torch.float64).T
    expected[:, columns] = first @ core1.values(torch.float64).T
    assert relative_error(y, expected) < 1e-6
