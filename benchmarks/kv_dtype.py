"""What a KV cache of fewer bits costs and brings: `python benchmarks/kv_dtype.py CHECKPOINT [--tokens N] [--window N]
[--contexts N,N] [--out FILE]`.

For each `kv_dtype`: perplexity of the last quarter of the Wikipedia sample in windows, whose tokens all read the cache; the
mean KL divergence from the fp32 cache's distributions, in nats, and how often the likeliest token is the same; bytes of the
cache for a token; milliseconds of a decode step at batch 1 behind contexts of several lengths, the median of runs of 32
steps. Writes benchmarks/results/kv_dtype.json with machine and date.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.engine.engine import Engine
from cai_runtime.engine.open import open_engine
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.judge.eval_text import cut_windows, read_text
from cai_runtime.judge.judges import EngineJudge

RESULTS = Path(__file__).parent / "results"
DTYPES = ("fp32", "bf16", "fp16", "int8")
STEPS, RUNS = 32, 5


def step_ms(engine: Engine, context: int) -> float:
    prompt = torch.randint(20, 40_000, (context,), generator=torch.Generator().manual_seed(context)).tolist()
    found = []
    for _ in range(RUNS):
        handle = engine.submit(Request(prompt, SamplingParams(max_tokens=STEPS + 1, ignore_eos=True, temperature=0)))
        stamps = [(time.perf_counter(), len(delta.token_ids)) for delta in handle]
        tokens = sum(count for _, count in stamps[1:])
        found.append(1e3 * (stamps[-1][0] - stamps[0][0]) / tokens)
    return median(found)


def loss(judge: EngineJudge, windows: list[torch.Tensor], fp32: list[torch.Tensor]) -> dict[str, float]:
    """fp32: log probabilities of each window with the fp32 cache; filled where it is empty."""
    nats, divergence, same, count = 0.0, 0.0, 0, 0
    for number, ids in enumerate(windows):
        found = judge.logits(ids)[:-1].float().log_softmax(-1)
        if number == len(fp32):
            fp32.append(found)
        right = fp32[number]
        nats -= float(found.gather(1, ids[1:, None].long()).double().sum())
        divergence += float((right.exp() * (right - found)).sum(1).clamp(min=0).double().sum())
        same += int((found.argmax(1) == right.argmax(1)).sum())
        count += len(found)
    return {"perplexity": math.exp(nats / count), "kl": divergence / count, "same_top": same / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--contexts", type=lambda text: [int(n) for n in text.split(",")], default=[512, 2000, 7900])
    parser.add_argument("--out", type=Path, default=RESULTS / "kv_dtype.json")
    args = parser.parse_args()
    fp32: list[torch.Tensor] = []
    results: list[dict[str, Any]] = []
    text = read_text()
    for dtype in DTYPES:
        with EngineJudge(args.checkpoint, kv_dtype=dtype, kv_cache="1GiB", max_batch=1, progress=False) as judge:
            windows = cut_windows(text, judge.tokenizer, tokens=args.tokens, window=args.window)
            entry: dict[str, Any] = {"kv_dtype": dtype}
            entry["bytes_per_token"] = sum(g.page_bytes for g in judge._runner.groups) / judge._runner.page_size
            entry |= loss(judge, list(windows.token_ids), fp32)
        # Another engine: a judge has no prefix cache, which finds the prompt again.
        with open_engine(args.checkpoint, kv_dtype=dtype, kv_cache="1GiB", progress=False) as engine:
            entry["step_ms"] = {str(context): step_ms(engine, context) for context in args.contexts}
        print(json.dumps(entry), flush=True)
        results.append(entry)
    told = {
        "benchmark": "kv_dtype", "checkpoint": args.checkpoint.name, "tokens": args.tokens, "window": args.window,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine(), "versions": versions(),
        "results": results,
    }  # fmt: skip
    args.out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
