"""Everything that only a GPU can show, in one command of under ten minutes:

    python benchmarks/gpu_suite.py [--only build,cuda,...] [--minutes 9] [--out FOLDER] [--dry-run]

Sections, in this order: `build` (the CUDA library for the GPU it finds), `cuda` (the tests of the CUDA kernels; float64 is
the judge), `engine` (engines with and without CUDA graphs against transformers, and bit for bit against each other),
`bandwidth` (of a copy: what everything is held to), `decode` (a whole graph-captured decode step of a model of
Llama-3.1-8B's shape with random weights, dense and at keep 0.5, in bf16, int8 and int4), `linears` (its linears one by one,
beside cuBLAS and int4 dense kernels), `attention` (paged decode at 1k and 8k), `triton` (the tests of the Triton kernels,
compiled; they take what time is left). Figures come with the fraction of the floor: the bytes that must be read over the
measured copy bandwidth.

Nothing needs to be installed: the repository is made importable from where it lies. What is missing is named, and sections
go on with what needs it not: without apache-tvm-ffi there are no CUDA kernels, and the Triton ones are measured alone. A
section that fails is recorded, the others go on, and the exit status is 1. Results go to a JSON file after every section.

Without a GPU, or with --dry-run, it checks what it can at tiny shapes on the CPU; without a GPU it exits with 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_checks
import gpu_decode
import gpu_linears
import gpu_timing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PACKAGES = (
    "torch", "triton", "transformers", "apache-tvm-ffi", "numpy", "openai", "safetensors", "tokenizers", "pydantic",
    "platformdirs", "gguf", "jinja2", "pytest", "pytest-xdist", "hypothesis", "setuptools",
)  # fmt: skip
SECTIONS = ("build", "cuda", "engine", "bandwidth", "decode", "linears", "attention", "triton")


@dataclass
class Report:
    """What the run found; written as JSON after every section."""

    environment: dict[str, Any]
    deadline: float  # by time.monotonic: no section begins later
    path: Path | None = None
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    decode: list[dict[str, Any]] = field(default_factory=list)
    linears: list[dict[str, Any]] = field(default_factory=list)
    attention: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        return [name for name, s in self.sections.items() if not s["ok"]]

    @property
    def seconds_left(self) -> float:
        return max(self.deadline - time.monotonic(), 1.0)

    def section(self, name: str, run: Callable[[], Any]) -> None:
        """Run one section; what it returns, or its failure, goes into the report."""
        print(f"\n== {name} ({self.seconds_left:.0f} s left)", flush=True)
        began = time.perf_counter()
        try:
            if time.monotonic() >= self.deadline:
                raise RuntimeError("not run: the time was used up")
            entry: dict[str, Any] = {"ok": True, "result": run()}
        except Exception as error:  # noqa: BLE001  # the next section is worth running whatever happened here
            entry = {"ok": False, "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            print(traceback.format_exc()[-3000:], flush=True)
        entry["seconds"] = round(time.perf_counter() - began, 1)
        self.sections[name] = entry
        print(f"-- {name}: {'ok' if entry['ok'] else 'FAILED'} in {entry['seconds']} s", flush=True)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("deadline", "path")}
            self.path.write_text(json.dumps(found, indent=1) + "\n")


def make_importable(folder: Path) -> None:
    """Lay the package out under `folder` with links, for this process and the ones it starts, unless it is installed."""
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


def environment() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "packages": {}}
    for name in PACKAGES:
        try:
            found["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found["packages"][name] = None
    missing = [name for name, version in found["packages"].items() if version is None]
    import torch

    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found["device"] = {
            "name": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory, "l2_bytes": p.L2_cache_size, "cuda": torch.version.cuda,
        }  # fmt: skip
    for key, value in found.items():
        print(f"{key}: {value}")
    print(f"missing packages: {', '.join(missing) or 'none'}", flush=True)
    return found


def backends() -> list[str]:
    """Triton always, CUDA where its library is built and can be loaded; says why not otherwise."""
    from cai_runtime.errors import KernelError
    from cai_runtime.kernels import cuda

    try:
        cuda.library()
    except (KernelError, ImportError) as error:
        print(f"no CUDA kernels: {error}", flush=True)
        return ["triton"]
    return ["cuda", "triton"]


def need_cuda() -> None:
    if "cuda" not in backends():
        raise RuntimeError("there are no CUDA kernels to check (see build)")


def check_cuda(limit: float) -> str:
    need_cuda()
    return gpu_checks.run_tests(["tests/kernels/test_cuda_gpu.py"], limit)


def check_engines() -> dict[str, Any]:
    outcome: dict[str, Any] = {"bits": gpu_checks.check_graphs(backends())}
    for backend in backends():
        for graphs in (False, True):
            outcome[f"{backend}, graphs {graphs}"] = gpu_checks.check_engine("cuda", backend, graphs=graphs)
    return outcome


def compile_for_hopper() -> str:
    output = gpu_checks.run_child(
        [sys.executable, "-m", "cai_runtime.kernels.triton.aot", "--targets", "sm_90"], limit=300
    )
    return output.strip().splitlines()[-1]


def run_on_gpu(report: Report, wanted: list[str]) -> None:
    def bandwidth() -> float:
        measured = report.sections.get("bandwidth", {})
        if not measured.get("ok"):
            raise RuntimeError("the copy bandwidth, which this is held to, was not measured")
        return measured["result"]["bytes_per_second"]

    runs: dict[str, Callable[[], Any]] = {
        "build": lambda: gpu_checks.build(min(240, report.seconds_left)),
        "cuda": lambda: check_cuda(min(150, report.seconds_left)),
        "engine": check_engines,
        "bandwidth": gpu_timing.copy_bandwidth,
        "decode": lambda: gpu_decode.time_decode(report.decode, bandwidth(), backends()),
        "linears": lambda: gpu_linears.time_linears(report.linears, bandwidth(), backends()),
        "attention": lambda: gpu_linears.time_attention(report.attention, bandwidth()),
        "triton": lambda: gpu_checks.run_tests(gpu_checks.triton_tests(), report.seconds_left),
    }
    for name in SECTIONS:
        if name in wanted:
            report.section(name, runs[name])
    if report.linears:
        print(f"\n{gpu_linears.table(report.linears)}")
    if report.decode:
        print(f"\n{gpu_decode.table(report.decode)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"comma list of {', '.join(SECTIONS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="no section begins after these (default: 9)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: benchmarks/results)")
    parser.add_argument("--dry-run", action="store_true", help="what can be checked without a GPU")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else list(SECTIONS)
    unknown = sorted(set(wanted) - set(SECTIONS))
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    if {"decode", "linears", "attention"} & set(wanted) and "bandwidth" not in wanted:
        wanted.append("bandwidth")
    deadline = time.monotonic() + args.minutes * 60
    import torch

    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        make_importable(Path(folder))
        report = Report(environment(), deadline)
        if args.dry_run or not gpu:
            report.section("benchmark cases", gpu_linears.check_benchmark_cases)
            report.section("decode step", gpu_decode.check_decode_on_cpu)
            report.section("engine", lambda: gpu_checks.check_engine("cpu", "reference", graphs=False))
            report.section("compile for sm_90", compile_for_hopper)
        else:
            device = report.environment["device"]["name"].replace(" ", "-")
            report.path = args.out / f"gpu_suite_{device}_{datetime.date.today().isoformat()}.json"
            run_on_gpu(report, wanted)
            print(f"\nwritten to {report.path}")
    print(f"failed: {', '.join(report.failed) or 'nothing'}")
    if not gpu:
        print("torch sees no GPU: nothing was measured", file=sys.stderr)
        return 2
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
