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
section that fails is recorded, the others go on, and the exit status is 1; where it leaves the GPU unusable for this
process, they go on in another one. Results go to a JSON file after every section, and within the long ones.

Without a GPU, or with --dry-run, it checks what it can at tiny shapes on the CPU; without a GPU it exits with 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
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

    def checkpoint(self) -> None:
        """Within a long section: write what there is; raise TimeoutError when the time is used up."""
        self.write()
        if time.monotonic() >= self.deadline:
            raise TimeoutError("not finished: the time was used up")

    def section(self, name: str, run: Callable[[], Any]) -> None:
        """Run one section; what it returns, or its failure, goes into the report."""
        print(f"\n== {name} ({self.seconds_left:.0f} s left)", flush=True)
        began = time.perf_counter()
        try:
            if time.monotonic() >= self.deadline:
                raise TimeoutError("not run: the time was used up")
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
            part = self.path.with_suffix(".part")  # a run that is cut off leaves a whole file
            part.write_text(json.dumps(found, indent=1) + "\n")
            part.replace(self.path)


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


def name_a_cache() -> None:
    """Tuned tiles are looked for in the user's cache, which platformdirs finds; without it the place is stated."""
    if importlib.util.find_spec("platformdirs") is None:
        os.environ.setdefault("CAI_HOME", str(Path.home() / ".cache/cai_runtime"))


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
    there = backends()
    checks: dict[str, Callable[[], Any]] = {"bits": lambda: gpu_checks.check_graphs(there)}
    for backend in there:
        for graphs in (False, True):
            checks[f"{backend}, graphs {graphs}"] = functools.partial(
                gpu_checks.check_engine, "cuda", backend, graphs=graphs
            )
    outcome: dict[str, Any] = {}
    problems = []
    for name, check in checks.items():
        try:
            outcome[name] = check()
        except Exception as error:  # noqa: BLE001  # what the others say is wanted all the more
            traceback.print_exc()
            problems.append(f"{name}: {type(error).__name__}: {error}")
    if problems:
        raise RuntimeError("; ".join(problems))
    return outcome


def compile_for_hopper() -> str:
    output = gpu_checks.run_child(
        [sys.executable, "-m", "cai_runtime.kernels.triton.aot", "--targets", "sm_90"], limit=300
    )
    return output.strip().splitlines()[-1]


def usable() -> bool:
    """Whether this process can still use the GPU: after an illegal address every call fails, until the process ends."""
    import torch

    try:
        torch.cuda.synchronize()
        return bool((torch.ones(1, device="cuda") == 1).all())
    except RuntimeError:
        return False


def go_on_elsewhere(left: list[str], report: Report) -> dict[str, Any]:
    """The sections that are left, by a process of their own, whose results go to a file of their own."""
    print(f"\nthis process can't use the GPU any more; another one goes on with {', '.join(left)}", flush=True)
    assert report.path is not None
    command = [sys.executable, str(Path(__file__).resolve()), "--only", ",".join(left)]
    command += ["--minutes", str(report.seconds_left / 60), "--out", str(report.path.parent)]
    done = subprocess.run(command, check=False)
    return {
        "ok": done.returncode == 0,
        "sections": left,
        "result": f"a process of its own exited with {done.returncode}",
    }


def unused(path: Path) -> Path:
    """`path`, or with a number where there is such a file."""
    several = (path.with_stem(f"{path.stem}_{n}") for n in range(2, 1000))
    return next(p for p in (path, *several) if not p.exists())


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
        "decode": lambda: gpu_decode.time_decode(report.decode, bandwidth(), backends(), report.checkpoint),
        "linears": lambda: gpu_linears.time_linears(report.linears, bandwidth(), backends(), report.checkpoint),
        "attention": lambda: gpu_linears.time_attention(report.attention, bandwidth(), report.checkpoint),
        "triton": lambda: gpu_checks.run_tests(gpu_checks.triton_tests(), report.seconds_left),
    }
    left = [name for name in SECTIONS if name in wanted]
    while left:
        name = left.pop(0)
        report.section(name, runs[name])
        if name in report.failed and left and not usable():
            report.sections["rest"] = go_on_elsewhere(left, report)
            report.write()
            break
    if report.linears:
        print(f"\n{gpu_linears.table(report.linears)}")
    if report.decode:
        print(f"\n{gpu_decode.table(report.decode)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"comma list of {', '.join(SECTIONS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing begins after these (default: 9)")
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
        name_a_cache()
        report = Report(environment(), deadline)
        if args.dry_run or not gpu:
            report.section("benchmark cases", gpu_linears.check_benchmark_cases)
            report.section("decode step", gpu_decode.check_decode_on_cpu)
            report.section("engine", lambda: gpu_checks.check_engine("cpu", "reference", graphs=False))
            report.section("compile for sm_90", compile_for_hopper)
        else:
            device = report.environment["device"]["name"].replace(" ", "-")
            report.path = unused(args.out / f"gpu_suite_{device}_{datetime.date.today().isoformat()}.json")
            run_on_gpu(report, wanted)
            print(f"\nwritten to {report.path}")
    print(f"failed: {', '.join(report.failed) or 'nothing'}")
    if not gpu:
        print("torch sees no GPU: nothing was measured", file=sys.stderr)
        return 2
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
