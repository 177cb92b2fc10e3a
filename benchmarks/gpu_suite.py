"""Everything that only a GPU can show, in one command of under ten minutes:

    python benchmarks/gpu_suite.py [--only build,kernels,engine,bandwidth,linears] [--out FOLDER] [--dry-run]

It builds the CUDA library for the GPU it finds, runs the tests of the Triton and CUDA kernels compiled (float64 is the
judge), holds an engine on the GPU against transformers on a tiny random llama, and times decode linears at
Llama-3.1-8B's shapes: interpolative at keep 0.5, stored in bf16 and int8, beside cuBLAS on the dense bf16 matrix. Times
are those of CUDA graphs that walk through several sets of weights, larger together than the L2 cache; every one is given
with its bandwidth and with the fraction of the measured copy bandwidth. Nothing needs to be installed: the repository is
made importable from where it lies. A section that fails is recorded, the others go on, and the exit status is 1.

Without a GPU it checks what it can, says so and exits with 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
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

from gpu_linears import check_benchmark_cases, copy_bandwidth, table, time_linears

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PACKAGES = (
    "torch", "triton", "transformers", "apache-tvm-ffi", "numpy", "openai", "safetensors", "tokenizers", "pydantic",
    "platformdirs", "gguf", "jinja2", "pytest", "hypothesis", "setuptools",
)  # fmt: skip


@dataclass
class Report:
    """What the run found; written as JSON."""

    environment: dict[str, Any]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    linears: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        return [name for name, s in self.sections.items() if not s["ok"]]

    def section(self, name: str, run: Callable[[], Any]) -> None:
        """Run one section; what it returns, or its failure, goes into the report."""
        print(f"\n== {name}", flush=True)
        began = time.perf_counter()
        try:
            entry: dict[str, Any] = {"ok": True, "result": run()}
        except Exception as error:  # noqa: BLE001  # the next section is worth running whatever happened here
            entry = {"ok": False, "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            print(traceback.format_exc()[-3000:], flush=True)
        entry["seconds"] = round(time.perf_counter() - began, 1)
        self.sections[name] = entry
        print(f"-- {name}: {'ok' if entry['ok'] else 'FAILED'} in {entry['seconds']} s", flush=True)


# ------------------------------------------------------------------------------------------------------- environment


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


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def run_child(command: list[str], limit: float) -> str:
    """The child's output; a failure raises with its end."""
    done = subprocess.run(
        command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=limit, check=False
    )
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:6])} exited with {done.returncode}:\n{output[-5000:]}")
    return output


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


# ------------------------------------------------------------------------------------------------------------ checks


def build() -> str:
    """The native libraries, in place: CUDA for the GPU that is there."""
    output = run_child([sys.executable, "setup.py", "build_ext", "--inplace"], 400)
    library = ROOT / "cai_runtime/_lib/libcai_cuda.so"
    if not library.exists():
        raise RuntimeError(f"the build made no {library.name}: was nvcc found?\n{output[-2000:]}")
    if any(int(n) for n in _numbers_before(output, "bytes spill stores")):
        raise RuntimeError("a CUDA kernel spills registers; see the build's output")
    return f"{library.stat().st_size} bytes"


def _numbers_before(text: str, words: str) -> list[str]:
    return [part.split()[-1] for part in text.split(words)[:-1]]


def check_kernels() -> dict[str, str]:
    """The tests of the GPU kernels, compiled and on the GPU, file by file. They compile hundreds of variants: side by
    side where pytest-xdist is there."""
    outcome, broken = {}, []
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short"]
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    for name in ("test_triton_linear", "test_triton_rows", "test_triton_attention", "test_cuda_gpu"):
        try:
            output = run_child([*pytest, *workers, f"tests/kernels/{name}.py"], 240)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            output = str(error)
            broken.append(name)
            print(output[-4000:])
        outcome[name] = output.strip().splitlines()[-1]
        print(f"{name}: {outcome[name]}", flush=True)
        if name not in broken and "passed" not in outcome[name]:
            broken.append(name)  # all skipped: nothing was checked
    if broken:
        raise RuntimeError(f"not right, or not run: {', '.join(f'{n} ({outcome[n]})' for n in broken)}")
    return outcome


def check_engine(device: str, backend: str | None = None) -> dict[str, Any]:
    """A tiny random llama, greedy: our engine's tokens one by one, batched, and transformers' own, in float32."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from cai_runtime.engine.open import open_engine
    from cai_runtime.engine.request import Request, SamplingParams

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=192, intermediate_size=416, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().float()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / math.sqrt(p.shape[-1]) if p.dim() > 1 else torch.ones_like(p))
    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    lengths, new = (1, 5, 17, 40, 130), 24
    prompts = [torch.randint(3, config.vocab_size, (n,)).tolist() for n in lengths]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2").save_pretrained(folder)
        greedy = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        with torch.no_grad():
            expected = [_greedy_by_transformers(model.to(device), prompt, new) for prompt in prompts]
        engine = open_engine(folder, device=device, dtype="fp32", backend=backend)
        try:
            alone = [list(engine.submit(Request(p, greedy)).result().token_ids) for p in prompts]
            handles = [engine.submit(Request(p, greedy)) for p in prompts]
            together = [list(h.result().token_ids) for h in handles]
        finally:
            engine.close()
    same = sum(a == e for a, e in zip(alone, expected, strict=True))
    batched = sum(a == t for a, t in zip(alone, together, strict=True))
    print(
        f"{backend or device}: of {len(prompts)} prompts {same} equal transformers', {batched} equal in a batch",
        flush=True,
    )
    if same != len(prompts) or batched != len(prompts):
        raise RuntimeError(f"{len(prompts) - same} differ from transformers', {len(prompts) - batched} in a batch")
    return {"prompts": len(prompts), "new_tokens": new, "equal_transformers": same, "equal_batched": batched}


def _greedy_by_transformers(model: Any, prompt: list[int], new: int) -> list[int]:
    import torch

    ids = list(prompt)
    for _ in range(new):
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


# --------------------------------------------------------------------------------------------------------------- runs


def compile_for_hopper() -> str:
    output = run_child([sys.executable, "-m", "cai_runtime.kernels.triton.aot", "--targets", "sm_90"], 300)
    return output.strip().splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="comma list of build, kernels, engine, bandwidth, linears")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: benchmarks/results)")
    parser.add_argument("--dry-run", action="store_true", help="what can be checked without a GPU")
    args = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        make_importable(Path(folder))
        report = Report(environment())
        if args.dry_run or not gpu:
            report.section("benchmark cases", check_benchmark_cases)
            report.section("engine on the CPU", lambda: check_engine("cpu"))
            report.section("compile for sm_90", compile_for_hopper)
            print(f"\nfailed: {', '.join(report.failed) or 'nothing'}")
            if not gpu:
                print("torch sees no GPU: nothing was measured", file=sys.stderr)
                return 2
            return 1 if report.failed else 0
        wanted = args.only.split(",") if args.only else ["build", "kernels", "engine", "bandwidth", "linears"]
        runs: dict[str, Callable[[], Any]] = {
            "build": build,
            "kernels": check_kernels,
            "engine": lambda: {backend: check_engine("cuda", backend) for backend in ("triton", "cuda")},
            "bandwidth": copy_bandwidth,
            "linears": lambda: time_linears(report.linears, report.sections["bandwidth"]["result"]["bytes_per_second"]),
        }
        unknown = sorted(set(wanted) - set(runs))
        if unknown:
            parser.error(f"unknown section {', '.join(unknown)}; known: {', '.join(runs)}")
        if "linears" in wanted and "bandwidth" not in wanted:
            wanted.append("bandwidth")
        for name, run in runs.items():
            if name in wanted:
                report.section(name, run)
    device = report.environment["device"]["name"].replace(" ", "-")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu_suite_{device}_{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    print(f"\n{table(report.linears)}\n\nwritten to {path}")
    print(f"failed: {', '.join(report.failed) or 'nothing'}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
