"""The CUDA kernels compile for every architecture of a release and spill nothing; the library refuses what it can't take."""

from __future__ import annotations

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
ARCHITECTURES = ["80", "90a", "100a", "120"]


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decode_kernels_spill_nothing(architecture: str, tmp_path: Path):
    """The bf16 kernels: the other activations' differ only in the width of x."""
    assert NVCC is not None
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
    target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    files = [str(ROOT / "csrc/cuda/products_bf16.cu"), "-o", str(tmp_path / "cubin")]
    done = subprocess.run([NVCC, *flags, *target, "-cubin", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spilled) == 16, done.stderr  # four stores by four tiles of rows
    assert set(spilled) == {("0", "0", "0")}, done.stderr


@needs_nvcc
@pytest.mark.slow
def test_library_links_and_refuses_what_it_cannot_take(tmp_path: Path):
    """The sources as one library, as setup.py links them, called without a GPU."""
    import tvm_ffi
    from tvm_ffi import libinfo

    assert NVCC is not None
    library = tmp_path / "libcai_cuda.so"
    sources = [str(p) for p in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    flags = ["-std=c++17", "-O1", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags += ["-gencode", "arch=compute_90a,code=sm_90a", f"-I{libinfo.find_include_path()}", f"-I{ROOT / 'csrc'}"]
    flags += [f"-I{libinfo.find_dlpack_include_path()}", f"-L{Path(libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi"]
    done = subprocess.run([NVCC, "-shared", *sources, *flags, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = tvm_ffi.load_module(str(library)).decode_linear
    members = tvm_ffi.convert([tvm_ffi.from_dlpack(torch.ones(4, 8))] + [None] * 5)
    with pytest.raises(ValueError, match="x must be on a CUDA device"):
        run(torch.ones(2, 8), None, torch.ones(2, 4), None, members)


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
