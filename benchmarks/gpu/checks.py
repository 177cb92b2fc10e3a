"""Checks engines on the device: in float32 against transformers' tokens, in bf16 against the reference backend's logits.
Checks also that CUDA graphs and batches change no bit."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from gpu.context import PAGE_SIZE, Context
from gpu.models import open_step, word_tokenizer
from gpu.report import Findings

NEW, PROMPTS = 24, (1, 5, 17, 40, 130)  # tokens of each reply, and of each prompt
REHEARSED_NEW, REHEARSED_PROMPTS = 2, (1, 5)
MARGIN = 0.1  # standard deviations of a row's logits: how far a chosen token's logit may lie below the greatest
FAR = 0.05  # largest relative error of the logits against the reference


def run(findings: Findings, context: Context) -> None:
    """Run `check_bits` and `check_bf16` on every variant and backend, `check_float32` with and without graphs."""
    for kind, store in context.scale.variants:
        for backend in context.backends:
            what = f"{kind} {store} {backend}"
            findings.attempt(f"bits {what}", lambda k=kind, s=store, b=backend: check_bits(findings, context, k, s, b))
            findings.attempt(f"bf16 {what}", lambda k=kind, s=store, b=backend: check_bf16(findings, context, k, s, b))
    for backend in context.backends:
        for graphs in (False,) if context.rehearsal else (True, False):
            findings.attempt(
                f"float32 {backend}, graphs {graphs}",
                lambda b=backend, g=graphs: check_float32(findings, context, b, graphs=g),
            )


def check_bits(findings: Findings, context: Context, kind: str, store: str, backend: str) -> None:
    """Compare the logits of one step of a tiny bf16 model: by a CUDA graph, by plain launches, and of each row alone.

    Raises RuntimeError unless all have the same bits and a relative error below FAR against the reference."""
    import torch

    config = context.scale.checked
    judge = open_step(config, kind, store, "reference", context.device, max_batch=5, context=20, graphs=False)
    wanted = judge.runner.run(judge.sequences(5))
    step = open_step(config, kind, store, backend, context.device, max_batch=5, context=20)
    sequences = step.sequences(5)
    recorded = step.runner.run(sequences).clone()
    alone = torch.cat([step.runner.run([s]).clone() for s in sequences])
    plain = step.without_graphs(sequences)
    step.runner.close()
    distance = float((recorded - wanted).norm() / wanted.norm())
    problems = []
    if not torch.equal(recorded, plain):
        problems.append("a recorded step has other bits than a plain one")
    if not torch.equal(recorded, alone):
        problems.append("a row has other bits in a batch than alone")
    if not distance < FAR:
        problems.append(f"{distance:.2e} from the reference")
    findings.add(check="bits", weights=f"{kind} {store}", backend=backend, distance=distance, ok=not problems)
    if problems:
        raise RuntimeError("; ".join(problems))


def prompts_of(vocab_size: int, context: Context) -> tuple[list[list[int]], int]:
    """Random prompts of different lengths, and the number of tokens to generate for each."""
    import torch

    draw = torch.Generator().manual_seed(0)
    lengths, new = (REHEARSED_PROMPTS, REHEARSED_NEW) if context.rehearsal else (PROMPTS, NEW)
    return [torch.randint(3, vocab_size, (n,), generator=draw).tolist() for n in lengths], new


def greedy_tokens(runner: Any, prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[list[int]]]:
    """The engine's greedy replies: to one prompt at a time, and to all prompts in one batch. Closes the runner."""
    from cai_runtime.engine.engine import Engine
    from cai_runtime.engine.request import Request, SamplingParams

    greedy = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    words = word_tokenizer(runner.vocab_size)
    with Engine(runner, words, eos_token_ids=[2], max_batch=len(prompts), prefix_cache=False) as engine:
        alone = [list(engine.submit(Request(p, greedy)).result().token_ids) for p in prompts]
        handles = [engine.submit(Request(p, greedy)) for p in prompts]
        return alone, [list(h.result().token_ids) for h in handles]


def check_bf16(findings: Findings, context: Context, kind: str, store: str, backend: str) -> None:
    """Judge greedy replies of a bf16 engine with graphs by the reference backend's float32 logits for the same tokens.

    Raises RuntimeError if a chosen token's logit is MARGIN or more below the greatest, or if on Triton a batch changes a
    token."""
    import torch

    from cai_runtime.engine.runner import ScheduledSequence

    config = context.scale.checked
    prompts, new = prompts_of(config["vocab_size"], context)
    pages = sum(-(-(len(p) + new) // PAGE_SIZE) for p in prompts)
    size: dict[str, Any] = {"max_batch": len(prompts), "context": 20, "least_pages": pages}
    step = open_step(config, kind, store, backend, context.device, **size)
    alone, together = greedy_tokens(step.runner, prompts, new)
    judge = open_step(
        config, kind, store, "reference", context.device, graphs=False, dtype=torch.float32, **size
    )  # fmt: skip
    worst, equal, count = 0.0, 0, 0
    for prompt, replies in zip(prompts, zip(alone, together, strict=True), strict=True):
        for reply in replies:
            ids = prompt + reply[:-1]
            at = [ScheduledSequence(ids, 0, list(range(-(-len(ids) // PAGE_SIZE))), True)]
            logits = judge.runner.logits(judge.runner.hidden_states(at))[len(prompt) - 1 :]
            chosen = logits.gather(1, torch.tensor(reply, device=logits.device)[:, None]).squeeze(1)
            gap = (logits.max(dim=1).values - chosen) / logits.std(dim=1)
            worst, equal, count = max(worst, float(gap.max())), equal + int((gap == 0).sum()), count + len(reply)
    same = sum(a == t for a, t in zip(alone, together, strict=True))
    findings.add(
        check="bf16", weights=f"{kind} {store}", backend=backend, tokens=count, greatest=equal, worst_gap=worst,
        equal_batched=same, prompts=len(prompts),
    )  # fmt: skip
    if not worst < MARGIN:
        raise RuntimeError(f"a token was chosen whose logit is {worst:.2f} deviations below the reference's greatest")
    # With the CUDA backend, steps with prompts run on Triton, which sums in another order.
    if backend == "triton" and same != len(prompts):
        raise RuntimeError(f"{len(prompts) - same} of {len(prompts)} prompts give other tokens in a batch")


def check_float32(findings: Findings, context: Context, backend: str, *, graphs: bool) -> None:
    """Compare greedy tokens of a tiny random llama in float32: our engine alone and batched, and transformers.

    Raises RuntimeError unless all replies are equal."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cai_runtime.engine.model_runner import ModelRunner
    from cai_runtime.layers.linear import WeightLoader
    from cai_runtime.models.registry import build_model
    from cai_runtime.slim.reader import Checkpoint

    draw = torch.Generator().manual_seed(0)
    hidden, wide = (48, 64) if context.rehearsal else (192, 416)
    config = LlamaConfig(
        vocab_size=320, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval().float()
    with torch.no_grad():
        for p in theirs.parameters():
            drawn = torch.randn(p.shape, generator=draw) / math.sqrt(p.shape[-1])
            p.copy_(drawn if p.dim() > 1 else torch.ones_like(p))
    prompts, new = prompts_of(config.vocab_size, context)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        with Checkpoint.open(Path(folder)) as checkpoint:
            loader = WeightLoader(checkpoint, torch.device(context.device), torch.float32, backend)
            model = build_model(loader)
    groups = model.cache_groups(16, torch.float32)
    runner = ModelRunner(
        model,
        groups,
        {group.name: 64 for group in groups},
        cache_dtype=torch.float32,
        cuda_graphs=graphs,
        max_batch=len(prompts),
    )
    runner.record_graphs()
    del model
    alone, together = greedy_tokens(runner, prompts, new)
    theirs = theirs.to(context.device)
    with torch.no_grad():
        expected = [_greedy_by_transformers(theirs, prompt, new) for prompt in prompts]
    same = sum(a == e for a, e in zip(alone, expected, strict=True))
    batched = sum(a == t for a, t in zip(alone, together, strict=True))
    findings.add(
        check="float32", backend=backend, graphs=graphs, prompts=len(prompts), equal_transformers=same,
        equal_batched=batched,
    )  # fmt: skip
    if same != len(prompts) or batched != len(prompts):
        raise RuntimeError(
            f"{len(prompts) - same} replies differ from transformers', {len(prompts) - batched} in a batch"
        )


def _greedy_by_transformers(model: Any, prompt: list[int], new: int) -> list[int]:
    import torch

    ids = list(prompt)
    for _ in range(new):
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]
