"""The NEON kernels and the thread pool on 64-bit ARM, run under qemu-user where this machine is another, against float64."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import native_programs as native
import pytest


@pytest.fixture(scope="module")
def machine() -> native.Machine:
    return native.arm()


@pytest.fixture(scope="module")
def harness(machine: native.Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["-O2", *(["-static"] if machine.emulator else [])]
    return native.compile_harness(machine, flags, tmp_path_factory.mktemp("neon") / "harness")


@pytest.mark.parametrize("table", ["neon", "generic"])
def test_every_kernel_against_float64(machine: native.Machine, harness: Path, table: str):
    done = native.run(machine, harness, "--guard", table)
    assert done.returncode == 0, done.stdout
    checked = set(re.findall(rf"^{table}  +(\w+)", done.stdout, re.MULTILINE))
    assert checked >= {"linear", "linear_int8", "quantize_rows", "gather", "rms_norm", "swiglu", "rotate", "attention"}
    assert checked >= {"encoder_attention", "write_page", "cross_attention", "cross_weights"}
    for store in ("fp32", "bf16", "fp16", "int8", "int4"):
        values = re.search(rf"^{table} +linear {store} +(\d+) values", done.stdout, re.MULTILINE)
        assert values is not None and int(values.group(1)) > 1000, done.stdout


def test_a_read_past_the_end_is_seen(machine: native.Machine, harness: Path):
    done = native.run(machine, harness, "--overread", "neon")
    assert done.returncode != 0 and "unnoticed" not in done.stdout


def test_a_table_of_another_machine_is_refused(machine: native.Machine, harness: Path):
    done = native.run(machine, harness, "avx2")
    assert done.returncode == 2 and "--list" in done.stdout


def test_thread_pool(machine: native.Machine, tmp_path: Path):
    flags = ["-O2", *(["-static"] if machine.emulator else [])]
    stress = native.compile_pool_stress(machine, flags, tmp_path / "pool_stress")
    done = native.run(machine, stress, "300")
    assert done.returncode == 0 and "900 regions" in done.stdout, done.stdout


def test_the_sources_that_ask_for_the_processor_compile(machine: native.Machine):
    """Checked but not linked: apache-tvm-ffi has no library for ARM here."""
    ffi = pytest.importorskip("tvm_ffi.libinfo")
    includes = [f"-I{ffi.find_include_path()}", f"-I{ffi.find_dlpack_include_path()}", f"-I{native.ROOT / 'csrc'}"]
    sources = [p for p in sorted(native.CPU.glob("*.cpp")) if "__aarch64__" in p.read_text()]
    assert native.CPU / "exports.cpp" in sources
    command = [*machine.compiler, "-std=c++17", "-fsyntax-only", *includes, *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
