"""Tiny random llamas, mistrals and ministrals on disk, and a runner of the engine to feed them to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cai_runtime.engine.model_runner import ModelRunner
from cai_runtime.engine.open import load_runner
from cai_runtime.engine.runner import ScheduledSequence


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
