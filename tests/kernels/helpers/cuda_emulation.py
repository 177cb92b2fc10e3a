"""The kernels of csrc/cuda on an emulated device: how to build them, and how to call them."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from cai_runtime.kernels.cuda_packing import PackedCore, pack
from cai_runtime.kernels.weights import Core

ROOT = Path(__file__).parents[3]
NVCC = shutil.which("nvcc")

BF16, FP16 = torch.bfloat16, torch.float16
TO_Z, TO_Y = 1, 2
NONE, NORM, SWIGLU = 0, 1, 2
TOLERANCE = {BF16: 4e-3, FP16: 5e-4}
STORES = ["own", "int8", "int4/32", "int4/64", "int4/128", "int4/32/zero", "int4/64/zero", "int4/128/zero"]
FEW_STORES = ["own", "int8", "int4/32/zero", "int4/128"]


class Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "scale", "index", "bias")),
        ("tile_bytes", ctypes.c_int64),
        *((n, ctypes.c_int32) for n in ("rows", "cols", "x_col", "z_col", "y_col", "destination")),
        *((n, ctypes.c_int32) for n in ("steps", "last_blocks", "first_group", "staged", "stages")),
    ]  # fmt: skip


class Group(ctypes.Structure):
    _fields_ = [("product", Product * 4), ("count", ctypes.c_int32)]


class Rows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "norm", "z", "y")),
        *((n, ctypes.c_int64) for n in ("x_stride", "residual_stride", "z_stride", "y_stride")),
        ("eps", ctypes.c_float), *((n, ctypes.c_int32) for n in ("count", "prologue", "x_vector")),
    ]  # fmt: skip


def toolkit_headers() -> str:
    """The toolkit's headers, as nvcc itself reports them: it may be a wrapper script."""
    assert NVCC is not None
    source = next((ROOT / "csrc/cuda").glob("*.cu"))
    done = subprocess.run([NVCC, "--dryrun", "-c", str(source)], capture_output=True, text=True, check=True)
    found = re.search(r'INCLUDES="?-I([^"\s]+)', done.stderr)
    assert found is not None, done.stderr
    return found.group(1)


def build(source: str, folder: Path) -> ctypes.CDLL:
    """A file of tests/kernels/cuda_emulator as a library; its functions return null or what went wrong."""
    library = folder / "emulated.so"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{toolkit_headers()}"]
    compiler = (os.environ.get("CXX") or "c++").split()
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-attributes"]
    path = ROOT / "tests/kernels/cuda_emulator" / source
    subprocess.run([*compiler, *flags, *includes, str(path), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


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


def group_of(matrices: list[Matrix], *, z_columns: int) -> tuple[Group, list[PackedCore]]:
    """The products of a launch, side by side in y, and in z at multiples of z_columns; with the cores, to be kept alive."""
    group = Group()
    group.count = len(matrices)
    z_col = y_col = 0
    packed = [pack(m.core) for m in matrices]
    for g, (m, c) in enumerate(zip(matrices, packed, strict=True)):
        tensors = (c.data, c.scale, m.index, m.bias)
        group.product[g] = Product(*map(address, tensors), 0, c.rows, c.cols, m.x_col, z_col, y_col, m.destination)
        z_col += -(-c.rows // z_columns) * z_columns
        y_col += m.width
    return group, packed


def random_core(rows: int, cols: int, store: str, activation: torch.dtype) -> Core:
    if store == "int8":
        return Core(torch.randint(-128, 128, (rows, cols), dtype=torch.int8), torch.rand(rows) / 500 + 1e-4)
    if store.startswith("int4"):
        group = int(store.split("/")[1])
        groups = -(-cols // group)
        data = torch.randint(0, 256, (rows, -(-cols // 2)), dtype=torch.uint8)
        scale = (torch.rand(rows, groups) / 20 + 0.01).bfloat16()
        zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8) if store.endswith("zero") else None
        return Core(data, scale, zeros, group, cols)
    return Core(torch.randn(rows, cols).to(activation))


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - wanted).norm() / wanted.norm())
