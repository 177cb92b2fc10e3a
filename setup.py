"""Builds csrc/: the CPU library always, the CUDA library where it can run or where it is asked for.

Metadata lives in pyproject.toml. Neither library sees a torch header: both export plain functions through
apache-tvm-ffi's C ABI, so the build environment holds no torch and takes seconds, and one binary serves every torch.

Environment
  CXX               the C++ compiler (default: c++)
  CAI_CUDA_ARCHS    comma list such as "9.0a,10.0a,12.0": build the CUDA library for these (9.0 or later), GPU or not. Empty
                    string: never build it. Unset: build when nvcc is found and a GPU is seen, for that GPU.
  CUDA_HOME         the CUDA toolkit (default: the one nvcc on PATH belongs to)
  CAI_CXX_SANITIZE  e.g. "address,undefined": instrument the CPU library (development)
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
LIB = "cai_runtime._lib"

# Each instruction set is its own translation unit, compiled with its own flags and chosen at run time by cpuid.
X86_FLAGS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": [
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c",
        "-mprefer-vector-width=512",
    ],
}  # fmt: skip
ARM_FLAGS: dict[str, list[str]] = {"kernels_neon.cpp": []}  # NEON is part of every 64-bit ARM processor


def isa_flags() -> dict[str, list[str]]:
    """The instruction sets of the machine built for: their sources and flags."""
    machine = platform.machine().lower()
    return X86_FLAGS if machine in ("x86_64", "amd64") else ARM_FLAGS if machine in ("aarch64", "arm64") else {}


def cpu_sources() -> list[str]:
    others = (X86_FLAGS.keys() | ARM_FLAGS.keys()) - isa_flags().keys()
    return [f"csrc/cpu/{p.name}" for p in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if p.name not in others]


def nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin/nvcc").exists():
        return str(Path(home) / "bin/nvcc")
    return shutil.which("nvcc")


def visible_gpu_archs() -> list[str]:
    """Compute capabilities of the GPUs the driver shows, e.g. ["9.0a"], as far as the kernels can be built for them; empty
    without a driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    out = subprocess.run([smi, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
    if out.returncode != 0:
        return []
    caps = sorted({line.strip() for line in out.stdout.splitlines() if line.strip()})
    caps = [c for c in caps if int(c.partition(".")[0]) >= 9]  # older ones have no bulk copies and no clusters
    # The "a" targets unlock the architecture's own instructions (wgmma, TMA) and exist from Hopper on.
    return [c + "a" if c in ("9.0", "10.0") else c for c in caps]


def cuda_archs() -> list[str]:
    wanted = os.environ.get("CAI_CUDA_ARCHS")
    if wanted is not None:
        archs = [a.strip() for a in wanted.split(",") if a.strip()]
        old = [a for a in archs if int(a.partition(".")[0]) < 9]
        if old:
            raise SystemExit(f"CAI_CUDA_ARCHS names {', '.join(old)}: the CUDA kernels need 9.0 or later; leave it out")
        # Hopper's own instructions are in code for 9.0a alone, and the launches count on them.
        return ["9.0a" if a == "9.0" else a for a in archs]
    return visible_gpu_archs() if nvcc_path() else []


class BuildLibraries(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # Plain shared libraries, not Python extension modules: no interpreter tag in the name.
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        import tvm_ffi.libinfo as ffi

        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp).absolute() / ext.name.rsplit(".", 1)[-1]
        objects.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{ffi.find_include_path()}", f"-I{ffi.find_dlpack_include_path()}", f"-I{ROOT / 'csrc'}"]
        lib_dir = Path(ffi.find_libtvm_ffi()).parent
        compile_one = self._nvcc_command if ext.name.endswith("cuda") else self._cxx_command

        def compile_source(source: str) -> str:
            obj = objects / (Path(source).name + ".o")
            self._run([*compile_one(source), *includes, "-c", str(ROOT / source), "-o", str(obj)])
            return str(obj)

        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
            built = list(pool.map(compile_source, ext.sources))
        link = ["-shared", *built, "-o", str(target), f"-L{lib_dir}", "-ltvm_ffi"]
        if ext.name.endswith("cuda"):
            # nvcc links the CUDA runtime in statically, and knows where it lies even when it is a wrapper script.
            self._run([str(nvcc_path()), *link, "-cudart", "static"])
        else:
            self._run([*self._cxx(), "-fPIC", *link, "-lpthread", *self._sanitize()])

    def _cxx(self) -> list[str]:
        return (os.environ.get("CXX") or "c++").split()

    def _sanitize(self) -> list[str]:
        kinds = os.environ.get("CAI_CXX_SANITIZE")
        return [f"-fsanitize={kinds}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"] if kinds else []

    def _cxx_command(self, source: str) -> list[str]:
        # Instrumented code is for finding defects: at -O3 it only compiles three times as long.
        flags = ["-std=c++17", "-O1" if self._sanitize() else "-O3", "-fPIC", "-fvisibility=hidden"]
        flags += ["-Wall", "-Wextra", "-Wno-unused-parameter"]
        # GCC 12 warns of its own AVX-512 headers, and that vectors in signatures follow another ABI without AVX.
        flags += ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]
        # -ffp-contract=off: a fused multiply-add only where the code says so, so that every tile size rounds alike.
        return [*self._cxx(), *flags, "-ffp-contract=off", *isa_flags().get(Path(source).name, []), *self._sanitize()]

    def _nvcc_command(self, source: str) -> list[str]:
        nvcc = nvcc_path()
        if nvcc is None:
            raise SystemExit("CAI_CUDA_ARCHS is set but nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
        gencode: list[str] = []
        for arch in cuda_archs():
            digits = arch.replace(".", "")
            gencode += ["-gencode", f"arch=compute_{digits},code=sm_{digits}"]
        flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        return [nvcc, *flags, "-Xptxas", "-v", *gencode]

    def _run(self, command: list[str]) -> None:
        print(" ".join(command), flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        sys.stderr.write(done.stderr)
        if done.returncode != 0:
            raise SystemExit(
                f"building cai_runtime's native code failed: {' '.join(command[:1])} exited {done.returncode}"
            )


extensions = [Extension(f"{LIB}.libcai_cpu", cpu_sources())]
if cuda_archs():
    extensions.append(
        Extension(f"{LIB}.libcai_cuda", [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc/cuda").glob("*.cu"))])
    )

packages = find_packages(include=["cai_runtime", "cai_runtime.*"])
packages += ["cai_runtime.kernels"] + [f"cai_runtime.kernels.{p}" for p in find_packages("kernels")]
packages += ["cai_runtime.models"] + [f"cai_runtime.models.{p}" for p in find_packages("models")]

setup(packages=packages, ext_modules=extensions, cmdclass={"build_ext": BuildLibraries})
