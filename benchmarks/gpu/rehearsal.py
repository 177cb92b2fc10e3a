"""Lets the sections run on a CPU, at tiny shapes: Triton is interpreted, the CUDA library emulated if it can be built. The
sections' code is the same as on a GPU. The figures of a rehearsal mean nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from gpu.environment import ROOT

EMULATED = ROOT / "build/libcai_cuda_emulated.so"


def prepare(*, emulate_cuda: bool) -> None:
    """Replace the CUDA library by the emulated one, or by none. Call this before triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    from cai_runtime.errors import KernelError
    from cai_runtime.kernels import backend, cuda

    library = emulated_library() if emulate_cuda else None

    def load() -> Any:
        if library is None:
            raise KernelError("a rehearsal without the emulated CUDA library")
        return library

    cuda.library = load
    cuda.CudaLinear.device_type = "cpu"
    # Modules that import `resolve_backend` after this get one that accepts "cuda" on a CPU.
    resolve = backend.resolve_backend
    backend.resolve_backend = lambda name, device: name if name == "cuda" else resolve(name, device)


def emulated_library() -> Any:
    """The CUDA kernels, compiled for the CPU with the tests' emulated device. None without nvcc, whose headers they need."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("no emulated CUDA kernels: nvcc is missing", flush=True)
        return None
    import tvm_ffi
    from tvm_ffi import libinfo

    sources = ROOT / "tests/kernels/cuda_emulator"
    newest = max(p.stat().st_mtime for p in [*(ROOT / "csrc/cuda").glob("*"), *sources.glob("*")])
    if not EMULATED.exists() or EMULATED.stat().st_mtime < newest:
        dry = subprocess.run(
            [nvcc, "--dryrun", "-c", str(ROOT / "csrc/cuda/ops.cu")], capture_output=True, text=True, check=True
        )
        toolkit = re.search(r'INCLUDES="?-I([^"\s]+)', dry.stderr)
        if toolkit is None:
            raise RuntimeError(f"nvcc names no folder of headers: {dry.stderr[-500:]}")
        EMULATED.parent.mkdir(exist_ok=True)
        includes = [ROOT / "csrc", toolkit[1], libinfo.find_include_path(), libinfo.find_dlpack_include_path()]
        subprocess.run(
            [
                *(os.environ.get("CXX") or "c++").split(), "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-attributes",
                *(f"-I{path}" for path in includes), str(sources / "library.cpp"),
                f"-L{Path(libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi", "-o", str(EMULATED),
            ],
            check=True,
        )  # fmt: skip
    return tvm_ffi.load_module(str(EMULATED))
