"""What gpu_suite.py checks before it times: the libraries build, the kernels' own tests pass compiled and on the GPU,
engines give transformers' tokens, graphs change no bit."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def child_environment() -> dict[str, str]:
    """This process's packages, also where the repository is not installed: the working folder stays off the path, whose
    cai_runtime has neither kernels nor models in it."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONSAFEPATH": "1"}


def run_child(command: list[str], limit: float) -> str:
    """The child's output; a failure, or more than `limit` seconds, raises with its end."""
    # A session of its own: what the child has started (pytest's workers) holds its pipes and must end with it.
    child = subprocess.Popen(
        command, cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        raise RuntimeError(f"{' '.join(command[:6])} took more than {limit:.0f} s:\n{output[-2000:]}") from None
    if child.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:6])} exited with {child.returncode}:\n{output[-5000:]}")
    return output


def build(limit: float) -> dict[str, Any]:
    """The native libraries, in place: CUDA for the GPU that is there. Registers and spills of its kernels, by ptxas."""
    if importlib.util.find_spec("tvm_ffi") is None:
        raise RuntimeError("apache-tvm-ffi is not installed: the CUDA library can't be built or loaded without it")
    output = run_child([sys.executable, "setup.py", "build_ext", "--inplace"], limit)
    library = ROOT / "cai_runtime/_lib/libcai_cuda.so"
    if not library.exists():
        raise RuntimeError(f"the build made no {library.name}: was nvcc found?\n{output[-2000:]}")
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", output)]
    if any(spilled):
        raise RuntimeError(f"{sum(n > 0 for n in spilled)} of {len(spilled)} CUDA kernels spill registers")
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", output)]
    print(f"{len(registers)} kernels, up to {max(registers, default=0)} registers, no spills", flush=True)
    return {"bytes": library.stat().st_size, "kernels": len(registers), "most_registers": max(registers, default=0)}


def run_tests(files: list[str], limit: float) -> str:
    """The tests of GPU kernels, compiled and on the GPU; side by side where pytest-xdist is there, for they compile hundreds
    of variants. Returns pytest's last line; raises where one fails, or none ran."""
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    output = run_child([sys.executable, "-m", "pytest", "-q", "--tb=short", *workers, *files], limit)
    last = output.strip().splitlines()[-1]
    if "passed" not in last:
        raise RuntimeError(f"nothing was checked: {last}")
    print(last, flush=True)
    return last


def triton_tests() -> list[str]:
    """Every test file of the Triton kernels; those that start an interpreter of their own are for machines without a GPU."""
    found = sorted(p for p in (ROOT / "tests/kernels").glob("test_triton_*.py") if "interpreted" not in p.name)
    return [str(p.relative_to(ROOT)) for p in found]


def check_engine(device: str, backend: str, *, graphs: bool) -> dict[str, Any]:
    """A tiny random llama, greedy: our engine's tokens one by one, batched, and transformers' own, in float32."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from cai_runtime.engine.engine import Engine
    from cai_runtime.engine.model_runner import ModelRunner
    from cai_runtime.engine.request import Request, SamplingParams
    from cai_runtime.layers.linear import WeightLoader
    from cai_runtime.models.registry import build_model
    from cai_runtime.slim.reader import Checkpoint

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=192, intermediate_size=416, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval().float()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) / math.sqrt(p.shape[-1]) if p.dim() > 1 else torch.ones_like(p))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2")
    new = 24
    prompts = [torch.randint(3, config.vocab_size, (n,)).tolist() for n in (1, 5, 17, 40, 130)]
    greedy = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        with Checkpoint.open(Path(folder)) as checkpoint:
            loader = WeightLoader(checkpoint, torch.device(device), torch.float32, backend)
            model = build_model(loader)
    runner = ModelRunner(
        model, num_pages=64, page_size=16, cache_dtype=torch.float32, cuda_graphs=graphs, max_batch=len(prompts)
    )
    runner.record_graphs()
    del model
    with Engine(runner, words, eos_token_ids=[2], max_batch=len(prompts)) as engine:
        alone = [list(engine.submit(Request(p, greedy)).result().token_ids) for p in prompts]
        handles = [engine.submit(Request(p, greedy)) for p in prompts]
        together = [list(h.result().token_ids) for h in handles]
    theirs = theirs.to(device)
    with torch.no_grad():
        expected = [_greedy_by_transformers(theirs, prompt, new) for prompt in prompts]
    same = sum(a == e for a, e in zip(alone, expected, strict=True))
    batched = sum(a == t for a, t in zip(alone, together, strict=True))
    what = f"{backend} on {device}, {'with' if graphs else 'without'} graphs"
    print(f"{what}: of {len(prompts)} prompts {same} equal transformers', {batched} equal in a batch", flush=True)
    if same != len(prompts) or batched != len(prompts):
        raise RuntimeError(
            f"{what}: {len(prompts) - same} differ from transformers', {len(prompts) - batched} in a batch"
        )
    return {"prompts": len(prompts), "new_tokens": new, "equal_transformers": same, "equal_batched": batched}


def _greedy_by_transformers(model: Any, prompt: list[int], new: int) -> list[int]:
    import torch

    ids = list(prompt)
    for _ in range(new):
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def check_graphs(backends: list[str]) -> dict[str, float]:
    """A tiny model of every variant of gpu_decode.py in bf16: a recorded step has the bits of a plain one, each row those
    that it has alone, and both are near the reference's. Returns the relative distance from the reference. What is not so
    is named in the RuntimeError at the end."""
    import torch
    from gpu_decode import TINY, VARIANTS, open_step

    distance: dict[str, float] = {}
    problems = []
    for kind, store in VARIANTS:
        judge = open_step(TINY, kind, store, "reference", "cuda", max_batch=5, context=20, graphs=False)
        wanted = judge.runner.run(judge.sequences(5))
        for backend in backends:
            what = f"{kind} {store} {backend}"
            step = open_step(TINY, kind, store, backend, "cuda", max_batch=5, context=20)
            sequences = step.sequences(5)
            recorded = step.runner.run(sequences).clone()
            alone = torch.cat([step.runner.run([s]).clone() for s in sequences])
            graphs, step.runner._graphs = step.runner._graphs, None
            plain = step.runner.run(sequences)
            step.runner._graphs = graphs
            step.runner.close()
            distance[what] = float((recorded - wanted).norm() / wanted.norm())
            print(f"{what}: {distance[what]:.2e} from the reference", flush=True)
            if not torch.equal(recorded, plain):
                problems.append(f"{what}: a recorded step has other bits than a plain one")
            if not torch.equal(recorded, alone):
                problems.append(f"{what}: a row has other bits in a batch than alone")
            if not distance[what] < 0.05:
                problems.append(f"{what}: {distance[what]:.2e} from the reference")
    if problems:
        raise RuntimeError("; ".join(problems))
    return distance
