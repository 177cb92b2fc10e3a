"""What rounding a CPU's activations costs: `python benchmarks/activations.py CHECKPOINT [CHECKPOINT ...] [--tokens N]
[--window N] [--prompts N] [--out FILE]`.

For each checkpoint and each of `activations`: perplexity of the last quarter of the Wikipedia sample in windows; its change
against fp32 activations with the standard error of that change (over tokens, paired); the mean KL divergence from fp32's
distributions, in nats, and how often the likeliest token is the same; and greedy answers to beginnings of that text: the
share that is the same to the end, and the mean number of tokens before the first that differs. Writes
benchmarks/results/activations.json with machine and date.
"""

from __future__ import annotations

import argparse
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.judge.eval_text import cut_windows, read_text
from cai_runtime.judge.judges import EngineJudge

RESULTS = Path(__file__).parent / "results"
SETTINGS = ("fp32", "int8")
PROMPT, ANSWER = 64, 64  # tokens


def loss(judge: EngineJudge, windows: list[torch.Tensor], fp32: list[torch.Tensor]) -> dict[str, float]:
    """fp32: log probabilities of each window with fp32 activations; filled where it is empty."""
    nats, change, divergence, same = [], [], 0.0, 0
    for number, ids in enumerate(windows):
        found = judge.logits(ids)[:-1].float().log_softmax(-1)
        if number == len(fp32):
            fp32.append(found)
        right, next_ids = fp32[number], ids[1:, None].long()
        nats.append(-found.gather(1, next_ids).double())
        change.append(nats[-1] + right.gather(1, next_ids).double())
        divergence += float((right.exp() * (right - found)).sum(1).clamp(min=0).double().sum())
        same += int((found.argmax(1) == right.argmax(1)).sum())
    all_nats, changes = torch.cat(nats), torch.cat(change)
    count = len(all_nats)
    return {
        "perplexity": math.exp(float(all_nats.mean())),
        "change": math.expm1(float(changes.mean())),
        "change_error": float(changes.std()) / math.sqrt(count),
        "kl": divergence / count,
        "same_top": same / count,
    }


def agreement(answers: list[list[int]], fp32: list[list[int]]) -> dict[str, float]:
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(answers, fp32, strict=True)
    ]
    return {"same_answers": mean(n == ANSWER for n in same), "same_tokens": mean(same)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS / "activations.json")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    text = read_text()
    for checkpoint in args.checkpoints:
        fp32: list[torch.Tensor] = []
        answers: list[list[int]] = []
        for setting in SETTINGS:
            with EngineJudge(
                checkpoint, device="cpu", activations=setting, kv_cache="1GiB", max_batch=1, progress=False
            ) as judge:
                windows = list(cut_windows(text, judge.tokenizer, tokens=args.tokens, window=args.window).token_ids)
                every = max(1, sum(map(len, windows)) // args.prompts)
                ids = torch.cat(windows)
                prompts = [ids[i * every : i * every + PROMPT].tolist() for i in range(args.prompts)]
                entry: dict[str, Any] = {"checkpoint": checkpoint.name, "activations": setting}
                entry |= loss(judge, windows, fp32)
                found = [judge.continue_greedily(prompt, ANSWER) for prompt in prompts]
                found = [(answer + [-1] * ANSWER)[:ANSWER] for answer in found]
                answers = answers or found
                entry |= agreement(found, answers)
            print(json.dumps(entry), flush=True)
            results.append(entry)
    told = {
        "benchmark": "activations", "tokens": args.tokens, "window": args.window, "prompts": args.prompts,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine(), "versions": versions(),
        "results": results,
    }  # fmt: skip
    args.out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
