"""The CPU kernels and the thread pool under the compiler's sanitizers, without Python.

The whole library under them, loaded into Python and put to the kernels' tests, takes minutes:
`python tests/kernels/native/sanitized_library.py`.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import native_programs as native
import pytest

MEMORY = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-O1", "-g1", "-fsanitize=thread"]


def _failed(done: subprocess.CompletedProcess[str]) -> str:
    """What a harness said of its failures, and how it ended."""
    wrong = [line for line in done.stdout.splitlines() if "failures" in line and not line.endswith(" 0 failures")]
    return "\n".join([*wrong[:40], done.stdout[-3000:]])


def skip_without(machine: native.Machine, flags: list[str], folder: Path) -> None:
    """Skips where the compiler does not link a program with these sanitizers."""
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [*machine.compiler, *flags, str(source), "-o", str(folder / "empty")]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip(f"{machine.compiler[0]} has no runtime for {flags[2]}: Debian's package libgcc-12-dev brings GCC's")


@dataclass(frozen=True)
class Checked:
    machine: native.Machine
    harness: Path
    tables: tuple[str, ...]


@pytest.fixture(scope="module", params=["this", "arm"])
def checked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """All tables of this machine; of an emulated ARM the one that is its own."""
    machine, folder = (
        native.arm() if request.param == "arm" else native.this_machine(),
        tmp_path_factory.mktemp("memory"),
    )
    if request.param == "arm" and not machine.emulator:
        pytest.skip("this machine is the ARM machine")
    skip_without(machine, MEMORY, folder)
    harness = native.compile_harness(machine, MEMORY, folder / "harness")
    listed = native.run(machine, harness, "--list").stdout.split()
    assert "generic" in listed
    return Checked(machine, harness, ("neon",) if request.param == "arm" else tuple(listed))


def test_kernels_keep_to_their_memory(checked: Checked):
    done = native.run(checked.machine, checked.harness, *checked.tables)
    assert done.returncode == 0, _failed(done)
    assert all(f"{name} " in done.stdout for name in checked.tables)


def test_masked_loads_keep_to_their_memory(checked: Checked):
    if checked.machine.emulator:
        pytest.skip("test_neon.py does this")
    done = native.run(checked.machine, checked.harness, "--guard", *checked.tables)
    assert done.returncode == 0, _failed(done)


def test_a_read_past_the_end_is_seen(checked: Checked):
    for table in checked.tables:
        done = native.run(checked.machine, checked.harness, "--overread", table)
        assert done.returncode != 0 and "AddressSanitizer" in done.stdout, _failed(done)


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> tuple[native.Machine, Path]:
    machine, folder = native.this_machine(), tmp_path_factory.mktemp("threads")
    skip_without(machine, THREAD, folder)
    program = native.compile_pool_stress(machine, THREAD, folder / "pool_stress")
    if "unexpected memory mapping" in native.run(machine, program, "1").stdout:
        # Older runtimes know fewer layouts of memory than newer kernels choose from.
        setarch = shutil.which("setarch")
        if setarch is None:
            pytest.skip("ThreadSanitizer needs setarch (util-linux) on this kernel")
        machine = native.Machine(machine.compiler, (setarch, "--addr-no-randomize"), machine.isa_flags)
    return machine, program


def test_the_thread_pool_has_no_race(stress: tuple[native.Machine, Path]):
    done = native.run(*stress, "1500")
    assert done.returncode == 0 and "4500 regions" in done.stdout, _failed(done)


def test_a_race_is_seen(stress: tuple[native.Machine, Path]):
    done = native.run(*stress, "--race")
    assert done.returncode != 0 and "data race" in done.stdout, _failed(done)
