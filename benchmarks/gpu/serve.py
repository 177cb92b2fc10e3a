"""Tokens per second of a whole engine, with scheduling, sampling and detokenizing, by batch size and sampling parameters."""

from __future__ import annotations

import time
from typing import Any

from gpu.context import PAGE_SIZE, Context
from gpu.models import open_step, word_tokenizer
from gpu.report import Findings
from gpu.timing import release

CASES = (("interpolative", "bf16"), ("interpolative", "int4"))
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0, "seed": 1},
    "top_p 0.95": {"temperature": 1.0, "top_p": 0.95, "seed": 1},
    "top_k 50, top_p 0.9": {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "seed": 1},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.1, "frequency_penalty": 0.5, "seed": 1},
}
PROMPT = 16  # tokens


def run(findings: Findings, context: Context) -> None:
    for kind, store in CASES:
        for backend in context.backends:
            what = f"{kind} {store} {backend}"
            findings.attempt(what, lambda k=kind, s=store, b=backend: _engine(findings, context, k, s, b))
            release()


def _engine(findings: Findings, context: Context, kind: str, store: str, backend: str) -> None:
    from cai_runtime.engine.engine import Engine
    from cai_runtime.engine.request import Request, SamplingParams

    scale = context.scale
    most, new = max(scale.decode_rows), scale.serve_tokens
    pages = most * -(-(PROMPT + new) // PAGE_SIZE)
    step = open_step(
        scale.config, kind, store, backend, context.device, max_batch=most, context=scale.context, least_pages=pages
    )  # fmt: skip
    vocabulary = scale.config["vocab_size"]
    with Engine(
        step.runner,
        word_tokenizer(vocabulary),
        eos_token_ids=[2],
        max_batch=most,
        prefix_cache=False,
        prefill_time=None,
    ) as engine:

        def seconds(rows: int, options: dict[str, Any], new: int = new) -> float:
            params = SamplingParams(max_tokens=new, ignore_eos=True, **options)
            requests = [Request([(31 * i + 7 * j) % vocabulary for j in range(PROMPT)], params) for i in range(rows)]
            began = time.perf_counter()
            for handle in engine.submit_all(requests):
                if len(handle.result().token_ids) != new:
                    raise RuntimeError(f"a reply has another length than {new} tokens")
            return time.perf_counter() - began

        for rows in scale.decode_rows[:1] if context.rehearsal else scale.decode_rows:
            for name, options in SAMPLING.items():
                seconds(rows, options, 2)  # compiles the kernels of these options, and records the graph
                took = seconds(rows, options)
                findings.add(
                    f"{kind} {store} {backend}, {rows} rows, {name}: {rows * new / took:.0f} tokens/s",
                    what="engine", weights=f"{kind} {store}", backend=backend, rows=rows, sampling=name, seconds=took,
                    tokens=rows * new, tokens_per_second=rows * new / took,
                )  # fmt: skip
