"""Prepares a run: makes the package importable, uses the kit of gpu_prepare.py, and describes the machine."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PREPARED = ROOT / ".gpu"
KIT = PREPARED / "kit"  # site: unpacked wheels. lib: native libraries. manifest.json: their commit and sources
LIBRARIES = ("libcai_cpu.so", "libcai_cuda.so")
PACKAGES = (
    "torch", "triton", "transformers", "apache-tvm-ffi", "numpy", "safetensors", "tokenizers", "platformdirs", "gguf",
    "jinja2", "pytest", "pytest-xdist", "hypothesis", "setuptools",
)  # fmt: skip
SMI_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu", "memory.used",
)  # fmt: skip


def sources_digest() -> str:
    """SHA-256 of the sources of the native libraries."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "csrc").rglob("*"), ROOT / "setup.py"]):
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def manifest() -> dict[str, Any]:
    """manifest.json of the kit; empty without a kit."""
    path = KIT / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {}


def use_kit() -> list[str]:
    """Append the kit's packages to the path, and copy its libraries into the package. Returns a sentence for each.

    A prepared library whose sources differ from the repository's is not copied: section `build` builds it."""
    said = []
    site = KIT / "site"
    if site.exists() and importlib.util.find_spec("tvm_ffi") is None:
        # At the end of the path, so that the machine's own packages go first.
        sys.path.append(str(site))
        importlib.invalidate_caches()
        said.append(f"packages of {site.relative_to(ROOT)} are used")
    there = ROOT / "cai_runtime/_lib"
    for name in LIBRARIES:
        prepared = KIT / "lib" / name
        if (there / name).exists() or not prepared.exists() or shutil.which("nvidia-smi") is None:
            continue  # without a GPU, such as where the kit was made, the package's folder stays as it is
        if manifest().get("sources") != sources_digest():
            said.append(f"the prepared {name} is of other sources: it is built here")
        else:
            shutil.copy2(prepared, there / name)
            said.append(f"the prepared {name} is used")
    return said


def make_importable(folder: Path) -> None:
    """Unless cai_runtime is installed, link its parts into `folder`, for imports of this process and its children."""
    if importlib.util.find_spec("cai_runtime") and importlib.util.find_spec("cai_runtime.kernels"):
        return
    package = folder / "cai_runtime"
    package.mkdir()
    for entry in (ROOT / "cai_runtime").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in ("kernels", "models"):
        (package / name).symlink_to(ROOT / name)
    for name in [m for m in sys.modules if m.split(".")[0] == "cai_runtime"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()


def name_a_cache() -> None:
    """Set CAI_HOME if platformdirs is missing, which otherwise finds the user's cache, where tuned tiles lie."""
    if importlib.util.find_spec("platformdirs") is None:
        os.environ.setdefault("CAI_HOME", str(Path.home() / ".cache/cai_runtime"))


def _output(command: list[str]) -> str | None:
    """The output of a command; None if the program is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """The repository's commit, and whether files are changed. Without a git history, those of the kit's manifest."""
    head = _output(["git", "rev-parse", "HEAD"])
    if head is not None:
        return {"commit": head, "changed": bool(_output(["git", "status", "--porcelain"]))}
    known = manifest()
    return {"commit": known.get("commit"), "changed": known.get("changed"), "from": "manifest"}


def gpu_state() -> dict[str, str] | None:
    """The SMI_FIELDS (driver, clocks, power, temperature) from nvidia-smi; None without it."""
    line = _output(["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"])
    return dict(zip(SMI_FIELDS, line.splitlines()[0].split(", "), strict=False)) if line else None


def describe() -> dict[str, Any]:
    """Commit, packages, tools and GPU, as JSON values for the results. Does not import torch."""
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    tools = {name: shutil.which(name) for name in ("nvcc", "ncu", "compute-sanitizer", "cuobjdump")}
    return {
        **commit(), "sources": sources_digest(), "python": platform.python_version(), "processors": os.cpu_count(),
        "packages": packages, "tools": tools, "gpu": gpu_state(),
    }  # fmt: skip
