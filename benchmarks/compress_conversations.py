"""Measures the divergence of slim checkpoints from SmolLM2-135M-Instruct in conversations.

    cai compress smollm2-135m-instruct slim --keep 0.8
    python benchmarks/compress_conversations.py slim ...

The original writes conversations at temperatures 1 and 0.7, with a seed that calibration does not use. The script computes
KL(original || checkpoint) in nats per token, and top-1 agreement, over all of them. Both models run in transformers in fp32,
the slim one as dense matrices. Writes benchmarks/results/compress_conversations.json.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.compressor.data.self_text import SelfSampling, write_self_text
from cai_runtime.convert.sources import pull
from cai_runtime.engine.open import load_tokenizer
from cai_runtime.judge.comparison import kl_divergence
from cai_runtime.stock.load import dense_reference, slim_as_transformers

MODEL = "smollm2-135m-instruct"
SEQUENCES, LENGTH, SEED = 16, 512, 77
TEMPERATURES = (1.0, 0.7)


@torch.no_grad()
def logits(model: Any, sequence: list[int]) -> torch.Tensor:
    """fp32 [tokens, vocabulary]"""
    return model(torch.tensor([sequence])).logits[0]


def judged(original: Any, slim: Any, sequences: list[list[int]]) -> dict[str, float]:
    divergence, same, count = 0.0, 0, 0
    for sequence in sequences:
        wanted, found = (logits(model, sequence) for model in (original, slim))
        divergence += float(kl_divergence(wanted, found).sum())
        same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        count += len(sequence)
    return {"kl": divergence / count, "top1_agreement": same / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slim", type=Path, nargs="+")
    args = parser.parse_args()
    source = pull(MODEL)
    tokenizer = load_tokenizer(source)
    texts = {}
    for temperature in TEMPERATURES:
        sampling = SelfSampling(temperature=temperature, chat_share=1.0)
        written = write_self_text(source, tokenizer, samples=SEQUENCES, length=LENGTH, seed=SEED, sampling=sampling)
        texts[f"temperature {temperature}"] = written.sequences
    original, results = dense_reference(source), []
    for path in args.slim:
        slim = slim_as_transformers(path)
        report = json.loads((path / "slim_report.json").read_text())
        found = {name: judged(original, slim, sequences) for name, sequences in texts.items()}
        results.append({"keep": report["keep"], "calibration": report["calibration"], **found})
        print(f"{path.name}: {found}", flush=True)
    document = {
        "benchmark": "compress conversations", "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(), "versions": versions(), "model": MODEL, "tokens": SEQUENCES * LENGTH,
        "results": results,
    }  # fmt: skip
    (Path(__file__).parent / "results" / "compress_conversations.json").write_text(
        json.dumps(document, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
