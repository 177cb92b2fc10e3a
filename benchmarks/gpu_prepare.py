"""Gathers in .gpu, which git ignores, what a bare GPU machine lacks, and prints the commands to run there:

    python benchmarks/gpu_prepare.py [--no-heal] [--archs 9.0a] [--python 3.12]

The machine needs torch, Triton, transformers and nvcc, but no network. .gpu/kit holds, in less than 64 MiB:

    site/           apache-tvm-ffi, platformdirs and gguf, unpacked; they need no installation
    lib/            libcai_cpu.so and libcai_cuda.so for the GPU's architecture
    manifest.json   commit and digest of the libraries' sources; if the sources differ, gpu_suite.py builds again

.gpu/model-0 and model-1 hold the input of gpu_heal.py: the GGUF file of SmolLM2-135M-Instruct in two parts, each small
enough for one transfer of 64 MiB, and the token ids of the test text.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu.environment import KIT, LIBRARIES, PREPARED, ROOT, commit, sources_digest

WHEELS = ("platformdirs", "gguf")  # in their newest versions; apache-tvm-ffi in this machine's
# pip matches a platform tag exactly, so this lists all tags that a wheel may have.
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 26, 27, 28, 31, 34)] + ["manylinux2014_x86_64"]
LIMIT = 60 << 20  # bytes of one transfer: 64 MiB, less the repository
PART = 50 << 20  # bytes of one part of the model's file
MODEL = "smollm2-135m-instruct"
WINDOW, WINDOWS = 512, 48  # of the test text, as in compress.py
INDEX = "model.json"  # in model-0: name, size, SHA-256 and parts of the file
TEXT = "test_text.json"


def run(command: Sequence[str], **settings: str) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, **settings})


def unpack_wheels(python: str, into: Path) -> None:
    """Download the wheels and unpack them. For wheels without scripts, unpacking is all of an installation."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            python,
        ]
        command += ["--implementation", "cp", "-d", folder, "-q"]
        for name in PLATFORMS:
            command += ["--platform", name]
        # apache-tvm-ffi must have the version that the libraries are built with.
        run([*command, f"apache-tvm-ffi=={importlib.metadata.version('apache-tvm-ffi')}", *WHEELS])
        for wheel in sorted(Path(folder).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(into)
            print(f"  {wheel.name}, {wheel.stat().st_size >> 10} KiB")


def build_libraries(archs: str, into: Path) -> None:
    """Build the libraries for the GPU machine. Raises RuntimeError if this machine can't."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise RuntimeError(f"the GPU machine is x86-64, this one is {platform.machine()}: its libraries would not load")
    into.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:  # so that the package's own libraries stay as they are
        built = [f"--build-lib={folder}/lib", f"--build-temp={folder}/temp"]
        run([sys.executable, "setup.py", "-q", "build_ext", *built], CAI_CUDA_ARCHS=archs)
        for name in LIBRARIES:
            library = Path(folder) / "lib/cai_runtime/_lib" / name
            if not library.exists():
                raise RuntimeError(f"the build made no {name}: is nvcc installed?")
            shutil.copy2(library, into / name)


def split_file(path: Path, folders: Sequence[Path], part: int = PART) -> None:
    """Split `path` into parts of `part` bytes, one per folder, with an index in the first. Raises RuntimeError for a file
    that is too large."""
    size = path.stat().st_size
    if size > part * len(folders):
        raise RuntimeError(f"{path} has {size >> 20} MiB, more than {len(folders)} parts of {part >> 20} MiB")
    digest, names = hashlib.sha256(), []
    with path.open("rb") as file:
        for folder in folders:
            piece = file.read(part)
            digest.update(piece)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{path.name}.part").write_bytes(piece)
            names.append(f"{folder.name}/{path.name}.part")
    index = {"name": path.name, "bytes": size, "sha256": digest.hexdigest(), "parts": names}
    (folders[0] / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def write_test_text(path: Path) -> None:
    """Write token ids of windows of the Wikipedia sample's last quarter, which calibration never uses; 100 kB."""
    from cai_runtime.convert.sources import pull
    from cai_runtime.engine.tokenizer import load_tokenizer
    from cai_runtime.judge.eval_text import cut_windows, read_text

    text = read_text()
    windows = cut_windows(text, load_tokenizer(pull(MODEL)), tokens=WINDOW * WINDOWS, window=WINDOW)
    found = {"source": text.source, "windows": [ids.tolist() for ids in windows.token_ids]}
    path.write_text(json.dumps(found) + "\n")


def prepare_model() -> None:
    """Write .gpu/model-0 and model-1."""
    from cai_runtime.convert.named import NAMED
    from cai_runtime.convert.sources import fetch_file

    folders = [PREPARED / f"model-{k}" for k in range(2)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    place = next(place for place in NAMED[MODEL].places if place.uri.endswith(".gguf"))
    split_file(fetch_file(place.uri, sha256=place.sha256), folders)
    write_test_text(folders[0] / TEXT)


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def check_size(folder: Path) -> None:
    """Raise RuntimeError for a folder that is too large for one transfer."""
    size = size_of(folder)
    print(f"{folder.relative_to(ROOT)}: {size / (1 << 20):.1f} MiB")
    if size > LIMIT:
        raise RuntimeError(f"{folder} has {size >> 20} MiB, and a transfer takes {LIMIT >> 20} MiB")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12", help="Python version of the GPU machine (default: 3.12)")
    parser.add_argument("--archs", default="9.0a", help="the GPU's architecture (default: 9.0a, Hopper)")
    parser.add_argument("--no-heal", action="store_true", help="leave out the input of gpu_heal.py")
    args = parser.parse_args(argv)
    shutil.rmtree(KIT, ignore_errors=True)
    KIT.mkdir(parents=True)
    unpack_wheels(args.python, KIT / "site")
    build_libraries(args.archs, KIT / "lib")
    manifest = {**commit(), "sources": sources_digest(), "archs": args.archs, "python": args.python}
    (KIT / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    check_size(KIT)
    kit = KIT.relative_to(ROOT)
    print(f"\non the GPU machine, with {kit} brought along, in two calls of 330 s:")
    print("    python3 benchmarks/gpu_suite.py --call 1 --out $OUT")
    print("    python3 benchmarks/gpu_suite.py --call 2 --out $OUT")
    if not args.no_heal:
        prepare_model()
        for k in range(2):
            check_size(PREPARED / f"model-{k}")
        print(
            "\nfor gpu_heal.py: bring .gpu/model-0 in a first call (its command: true), then, with the machine still warm,"
        )
        print(f".gpu/model-1 and {kit}, and within 600 s:")
        print("    python3 benchmarks/gpu_heal.py --minutes 7 --out $OUT")
    return 0


if __name__ == "__main__":
    sys.exit(main())
