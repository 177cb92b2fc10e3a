"""The CUDA kernels compile and spill nothing; the library refuses what it can't take.

Every run compiles the bf16 kernels for Hopper. CAI_TEST_CUDA_ARCHS=80,90a,100a,120 compiles everything for those, and looks
at the machine code, which takes minutes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cuda
from cai_runtime.kernels.weights import Core, LinearWeights

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr"]
RELEASE = [a for a in os.environ.get("CAI_TEST_CUDA_ARCHS", "").split(",") if a]
if_asked = pytest.mark.skipif(not RELEASE, reason="CAI_TEST_CUDA_ARCHS is not set: it takes minutes")
# Registers that leave three blocks of 256 threads to a multiprocessor; two where more sums or a norm need them.
MOST_REGISTERS, WIDEST = 80, 128


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
    for name, (registers, stack, spilled) in found.items():
        assert stack == spilled == 0, (name, stack, spilled)
        if "matrix_products_kernel" in name:
            widest = re.search(r"Int4E(Li2|Li1ELNS_8PrologueE1)|aLi2ELNS_8PrologueE1", name)
            assert registers <= (WIDEST if widest else MOST_REGISTERS), (name, registers)


# Tensor cores: three stores by none and norm for 8 and 16 rows, and the gate. Others: by 1, 4 and 8 rows.
BF16 = {"matrix_products_kernel": 15, "products_kernel": 6, "swiglu_kernel": 1}
FP16 = {"matrix_products_kernel": 9, "products_kernel": 6, "swiglu_kernel": 1}
FP32 = {"products_kernel": 15, "swiglu_kernel": 1}


@needs_nvcc
def test_decode_kernels_spill_nothing(tmp_path: Path):
    """The bf16 kernels, for Hopper."""
    check("90a", "linear_bf16", BF16, tmp_path)


@needs_nvcc
@if_asked
@pytest.mark.parametrize("architecture", RELEASE)
@pytest.mark.parametrize(("source", "kernels"), [("linear_bf16", BF16), ("linear_fp16", FP16), ("linear_fp32", FP32)])
def test_every_kernel_of_a_release_spills_nothing(
    architecture: str, source: str, kernels: dict[str, int], tmp_path: Path
):
    check(architecture, source, kernels, tmp_path)


@needs_nvcc
@if_asked
def test_hopper_code_is_what_was_meant(tmp_path: Path):
    """Wide asynchronous copies, tensor cores, and the waits of programmatic dependent launch are in the machine code."""
    import triton

    disassembler = triton.knobs.nvidia.cuobjdump.path
    resources("90a", "linear_bf16", tmp_path)
    done = subprocess.run([disassembler, "-sass", str(tmp_path / "linear_bf16.cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    functions = re.split(r"\n\s+Function : ", done.stdout)[1:]
    tiles = [f for f in functions if "matrix_products_kernel" in f.split("\n", 1)[0]]
    assert len(tiles) == BF16["matrix_products_kernel"]
    for code in tiles:
        name = code.split("\n", 1)[0]
        assert re.search(r"LDGSTS\.E\.BYPASS\.LTC128B\.128", code), name
        assert re.search(r"HMMA\.16816\.F32\.BF16", code), name
        assert "ACQBULK" in code and "PREEXIT" in code, name
        assert not re.search(r"\b(LDL|STL)\b", code), name


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
    members = tvm_ffi.convert([tvm_ffi.from_dlpack(torch.ones(4, 8))] + [None] * 7)
    with pytest.raises(ValueError, match="x must be on a CUDA device"):
        loaded.decode_linear(torch.ones(2, 8), None, torch.ones(2, 4), None, None, 0.0, False, True, members)
    with pytest.raises(ValueError, match="x must be on a CUDA device"):
        loaded.swiglu(torch.ones(2, 8), torch.ones(2, 4), True)


def test_the_gate_is_fused_up_to_as_many_rows_as_the_kernel_takes():
    source = (ROOT / "csrc/cuda/tile.cuh").read_text()
    found = re.search(r"kFusedSwigluRows = (\d+);", source)
    assert found is not None and int(found[1]) == cuda.FUSED_SWIGLU_ROWS


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
