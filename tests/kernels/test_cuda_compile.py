"""The CUDA kernels compile and spill nothing; the library refuses what it can't take.

Every run compiles the bf16 kernels for Hopper. CAI_TEST_CUDA_ARCHS=90a,100a,120 compiles everything for those, and looks
at the machine code, which takes minutes."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cuda, cuda_packing
from cai_runtime.kernels.weights import Core, LinearWeights

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr"]
RELEASE = [a for a in os.environ.get("CAI_TEST_CUDA_ARCHS", "").split(",") if a]
if_asked = pytest.mark.skipif(not RELEASE, reason="CAI_TEST_CUDA_ARCHS is not set: it takes minutes")
# Of a thread: two blocks of 256 share a multiprocessor, one of each of two kernels. Those for many rows begin with what 12
# warps can have, and share it out anew.
MOST_REGISTERS = {"linear": 128, "many": 168}


def resources(architecture: str, source: str, folder: Path) -> dict[str, tuple[int, int, int]]:
    """Entry function -> (registers, stack frame in bytes, spilled bytes), by ptxas."""
    assert NVCC is not None
    target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    files = [str(ROOT / f"csrc/cuda/{source}.cu"), "-o", str(folder / f"{source}.cubin")]
    command = [NVCC, *FLAGS, "-Xptxas", "-v", *target, "-cubin", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, done.stderr, re.DOTALL)
    return {name: (int(used), int(stack), int(out) + int(back)) for name, stack, out, back, used in found}


def check(architecture: str, source: str, kernels: dict[str, int], folder: Path) -> None:
    found = resources(architecture, source, folder)
    for kind, wanted in kernels.items():
        assert sum(f"{len(kind)}{kind}" in name for name in found) == wanted, sorted(found)
    # A register or two of the kernels for many rows, with int4; off Hopper, where threads can't take others', more.
    allowed = 0 if source.startswith("linear") else 8 if architecture.startswith("90") else 64
    for name, (registers, stack, spilled) in found.items():
        assert spilled <= allowed and (stack == 0 or allowed > 0), (name, stack, spilled)
        assert registers <= MOST_REGISTERS[source.split("_")[0]], (name, registers)
        if "many_products_kernel" in name and architecture == "90a":  # as many.cuh counts on: kLaunchRegisters
            assert registers == (80 if "Lb1EEEv" in name else 168), (name, registers)


# Of x's type, int8, and int4 with three widths of groups, with and without zero points; each for 8 and for 16 rows. For many
# rows: with columns divided, and without for 64 and for 128 rows of x.
KERNELS = {
    "linear": {"decode_products_kernel": 16, "swiglu_kernel": 1},
    "many": {"many_products_kernel": 24, "fill_panels_kernel": 1},
}


@needs_nvcc
@pytest.mark.parametrize("which", KERNELS)
def test_kernels_spill_nothing(which: str, tmp_path: Path):
    """The bf16 kernels, for Hopper."""
    check("90a", f"{which}_bf16", KERNELS[which], tmp_path)


@needs_nvcc
@if_asked
@pytest.mark.parametrize("architecture", RELEASE)
@pytest.mark.parametrize("source", ["linear_bf16", "linear_fp16", "many_bf16", "many_fp16"])
def test_every_kernel_of_a_release_spills_nothing(architecture: str, source: str, tmp_path: Path):
    check(architecture, source, KERNELS[source.split("_")[0]], tmp_path)


@needs_nvcc
@if_asked
def test_hopper_code_is_what_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bulk copies, tensor cores, and the waits of programmatic dependent launch are in the machine code; and the hot loop of
    every kernel leaves the multiprocessor time to read at its full rate."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    resources("90a", "linear_bf16", tmp_path)
    kernels = importlib.import_module("gpu.machine_code").decode_kernels(tmp_path / "linear_bf16.cubin")
    assert len(kernels) == KERNELS["linear"]["decode_products_kernel"]
    for kernel in kernels:
        operations = {re.sub(r"\..*", "", i.operation) for i in kernel.instructions}
        assert {"UBLKCP", "SYNCS", "HMMA", "ACQBULK", "PREEXIT", "UCGABAR_ARV"} <= operations, kernel.name
        assert not operations & {"LDL", "STL"}, kernel.name
        # 3.35 TB/s are 1 KiB in 71 cycles of each of 132 multiprocessors, which start up to four instructions in one.
        assert kernel.hot_per_kib < 0.9 * 4 * 71, (kernel.name, kernel.hot_per_kib)


@needs_nvcc
@pytest.mark.slow
def test_library_links_and_refuses_what_it_cannot_take(tmp_path: Path):
    """The sources as one library, as setup.py links them, called without a GPU."""
    import tvm_ffi
    from tvm_ffi import libinfo

    assert NVCC is not None
    library = tmp_path / "libcai_cuda.so"
    sources = [str(p) for p in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    flags = [
        "-std=c++17",
        "-O0",
        "-Xptxas",
        "-O0",
        "--expt-relaxed-constexpr",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
    ]
    flags += ["-gencode", "arch=compute_90a,code=sm_90a", f"-I{libinfo.find_include_path()}", f"-I{ROOT / 'csrc'}"]
    flags += [f"-I{libinfo.find_dlpack_include_path()}", f"-L{Path(libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi"]
    done = subprocess.run([NVCC, "-shared", *sources, *flags, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = tvm_ffi.load_module(str(library))
    members = tvm_ffi.convert([tvm_ffi.from_dlpack(torch.ones(4, 8))] + [None] * 5)
    numbers = tvm_ffi.convert([0] * 10)
    with pytest.raises(ValueError, match="x must be on a CUDA device"):
        scratch = torch.empty(0, dtype=torch.uint8)
        loaded.linear(torch.ones(2, 8), None, torch.ones(2, 4), scratch, None, 0.0, False, True, members, numbers)
    with pytest.raises(ValueError, match="x must be on a CUDA device"):
        loaded.swiglu(torch.ones(2, 8), torch.ones(2, 4), True)


def test_packing_and_kernel_agree_on_sizes():
    source = (ROOT / "csrc/cuda/packed.cuh").read_text()
    for name, value in (("kTileRows", cuda_packing.TILE_ROWS), ("kBlockColumns", cuda_packing.BLOCK)):
        found = re.search(rf"{name} = (\d+);", source)
        assert found is not None and int(found[1]) == value


def test_architectures_without_bulk_copies_are_refused():
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "CAI_CUDA_ARCHS": "8.0,9.0a"},
    )  # fmt: skip
    assert done.returncode != 0 and "CAI_CUDA_ARCHS names 8.0: the CUDA kernels need 9.0" in done.stderr


def test_weights_elsewhere_are_refused():
    w = LinearWeights("dense", 8, 4, (Core(torch.ones(4, 8)),))
    with pytest.raises(KernelError, match="weights on a CUDA device, these are on cpu"):
        cuda.slim_linear(torch.ones(2, 8), w)
    with pytest.raises(KernelError, match="at least one member"):
        cuda.grouped_linear(torch.ones(2, 8), [])


def test_availability_needs_a_library_and_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(cuda, "library_path", lambda: tmp_path / "libcai_cuda.so")
    cuda.library.cache_clear()
    assert not cuda.available()
    with pytest.raises(KernelError, match="not built"):
        cuda.library()
    (tmp_path / "libcai_cuda.so").write_bytes(b"not a library")
    assert cuda.available() == torch.cuda.is_available()
    with pytest.raises(KernelError, match="can't be loaded"):
        cuda.library()
    cuda.library.cache_clear()
