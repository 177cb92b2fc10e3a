"""Builds the whole CPU library with AddressSanitizer and UBSan, loads it into Python and runs the kernels' tests on it.

    python tests/kernels/native/sanitized_library.py [--build DIR] [TEST...]

Some minutes of one core. Not a test itself for that reason; tests/kernels/test_sanitizers.py checks the kernels alone.
Builds a copy of the package beside the installed one, which stays as it is. --build: where, and keep it there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TESTS = [
    "slim_linear",
    "attention",
    "encoder_attention",
    "cross_attention",
    "rows",
    "program",
    "buffer_checks",
    "properties_linear",
    "properties_attention",
    "properties_rows",
    "sampling",
]
# A read that no test makes: rows of a packed matrix that is said to be larger than it is. The library must stop at it.
OVERREAD = """
import torch
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.weights import Core
matrix = cpu_library.PackedMatrix(Core(torch.ones(4, 16)))
fields = cpu_library.integers([*matrix.fields[:3], 8, *matrix.fields[4:]])
cpu_library.function("gather")(fields, torch.full((1,), 4, dtype=torch.int32), torch.empty(1, 16))
"""


def build(folder: Path) -> Path:
    """The package with an instrumented library; returns the directory to put on Python's path."""
    env = os.environ | {"CAI_CXX_SANITIZE": "address,undefined", "CAI_CUDA_ARCHS": ""}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(folder),
        "--build-lib",
        str(folder / "lib"),
    ]
    subprocess.run([*command, "egg_info", "--egg-base", str(folder)], cwd=ROOT, env=env, check=True)
    return folder / "lib"


def environment(package: Path) -> dict[str, str]:
    """The sanitizers' runtimes must be there before the interpreter, which knows nothing of them, allocates."""
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        runtimes.append(found.stdout.strip())
    # Python never frees all it has, and a module is known by its symbols only while it stays loaded.
    settings = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "PYTHONPATH": str(package)}
    return os.environ | settings | {"LD_PRELOAD": ":".join(runtimes)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="DIR", help="where to build (default: a temporary directory)")
    parser.add_argument("tests", nargs="*", metavar="TEST", help="for pytest (default: the kernels' tests on the CPU)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        env = environment(build((arguments.build or Path(temporary)).absolute()))
        # -P: not the checkout that this runs in, the package that was built.
        python = [sys.executable, "-P"]
        seen = subprocess.run([*python, "-c", OVERREAD], env=env, capture_output=True, text=True)
        if seen.returncode == 0 or "AddressSanitizer: heap-buffer-overflow" not in seen.stderr:
            print(f"the library does not notice a read past the end\n{seen.stderr}", file=sys.stderr)
            return 1
        tests = arguments.tests or [f"tests/kernels/test_{name}.py" for name in TESTS]
        pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        return subprocess.run(pytest, cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
