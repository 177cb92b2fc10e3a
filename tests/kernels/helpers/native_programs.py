"""Compiles and runs the C++ programs of tests/kernels/native: for this machine, or for 64-bit ARM under qemu-user."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NATIVE = ROOT / "tests/kernels/native"
CPU = ROOT / "csrc/cpu"
ARM_PACKAGES = "Debian's packages g++-aarch64-linux-gnu and qemu-user"


def isa_flags(name: str) -> dict[str, list[str]]:
    """X86_FLAGS or ARM_FLAGS of setup.py: the sources of each instruction set with the flags they are built with."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == name:
            assert isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


@dataclass(frozen=True)
class Machine:
    """What is compiled for: the compiler, what runs its programs, the sources and flags of its instruction sets."""

    compiler: tuple[str, ...]
    emulator: tuple[str, ...]
    isa_flags: dict[str, list[str]]


def this_machine() -> Machine:
    """Skips the test where there is no C++ compiler."""
    compiler = (os.environ.get("CXX") or "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"there is no C++ compiler ({compiler[0]}): install Debian's package g++, or set CXX")
    machine = platform.machine().lower()
    name = "X86_FLAGS" if machine in ("x86_64", "amd64") else "ARM_FLAGS" if machine in ("aarch64", "arm64") else None
    return Machine(tuple(compiler), (), isa_flags(name) if name else {})


def arm() -> Machine:
    """64-bit ARM: this machine where it is one, else the cross compiler and qemu-user. Skips the test without them."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return this_machine()
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip(f"NEON runs under emulation with {ARM_PACKAGES}, and they are not installed")
    found = subprocess.run([compiler, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True)
    sysroot = Path(found.stdout.strip()).resolve().parents[1]  # where a program's shared libraries are
    return Machine((compiler,), (emulator, "-L", str(sysroot)), isa_flags("ARM_FLAGS"))


def compile_program(
    machine: Machine, sources: Sequence[tuple[Path, Sequence[str]]], flags: Sequence[str], out: Path
) -> Path:
    """Each source with flags of its own and those of all, linked into `out`."""
    # As setup.py: GCC warns of its own AVX-512 headers, and of vectors in signatures.
    command = [*machine.compiler, "-std=c++17", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
    command += ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", *flags]
    out.parent.mkdir(parents=True, exist_ok=True)

    def compile_source(job: tuple[int, tuple[Path, Sequence[str]]]) -> str:
        number, (source, own) = job
        target = out.with_name(f"{out.name}_{number}.o")
        _checked([*command, *own, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_source, enumerate(sources)))
    _checked([*machine.compiler, *objects, *flags, "-lpthread", "-o", str(out)])
    return out


def compile_harness(machine: Machine, flags: Sequence[str], out: Path) -> Path:
    """The checks of all kernel tables of a machine."""
    sources: list[tuple[Path, Sequence[str]]] = [
        (p, ()) for p in sorted(NATIVE.glob("*.cpp")) if p.name != "pool_stress.cpp"
    ]
    sources += [(CPU / "kernels_generic.cpp", ())]
    for name, own in machine.isa_flags.items():
        macro = "-DCAI_SIMD_" + name.removeprefix("kernels_").removesuffix(".cpp").upper()
        sources += [(CPU / name, own), (NATIVE / "simd_checks.cpp", [*own, macro])]
    return compile_program(machine, sources, flags, out)


def compile_pool_stress(machine: Machine, flags: Sequence[str], out: Path) -> Path:
    return compile_program(machine, [(NATIVE / "pool_stress.cpp", ()), (CPU / "thread_pool.cpp", ())], flags, out)


def run(machine: Machine, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Output and errors together in `stdout`. Leaks are not looked for: that needs ptrace, and qemu has none."""
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    command = [*machine.emulator, str(program), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, timeout=600)


def _checked(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"
