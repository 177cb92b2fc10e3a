"""Tiny random llamas, mistrals and ministrals on disk, and a runner of the engine to feed them to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cai_runtime.engine.model_runner import ModelRunner
from cai_runtime.engine.open import load_runner
from cai_runtime.engine.runner import ScheduledSequence

MISSING = object()  # a key that `change_config` takes out
IDS = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def tiny_model(path: Path, seed: int = 0, *, model_type: str = "llama", **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    base = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**base, **options})).eval()
    for name, p in model.named_parameters():  # norms and biases start as ones and zeros, which hide mistakes
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(path)
    return model


def open_runner(path: Path, **options: Any) -> ModelRunner:
    runner, _ = load_runner(path, kv_cache="16MiB", progress=False, **options)
    return runner


def feed(runner: ModelRunner, ids: list[int], pages: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits after each chunk, [chunks, vocabulary]."""
    rows, start = [], 0
    for n in chunks:
        rows.append(runner.run([ScheduledSequence(ids[start : start + n], start, pages, 1)]))
        start += n
    return torch.cat(rows)


def change_config(path: Path, **change: Any) -> None:
    """Give keys of config.json other values; `MISSING` takes them out."""
    config = json.loads((path / "config.json").read_text()) | change
    kept = {key: value for key, value in config.items() if value is not MISSING}
    (path / "config.json").write_text(json.dumps(kept))


@torch.inference_mode()
def same_as_transformers(path: Path) -> None:
    """The logits behind `IDS`, fp32."""
    expected = AutoModelForCausalLM.from_pretrained(path)(torch.tensor([IDS])).logits[0, -1]
    ours = feed(open_runner(path), IDS, [0, 1, 2], [len(IDS)])[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
