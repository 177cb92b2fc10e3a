"""Tiny random Whispers on disk, and a seat of the engine's runner to feed them from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, WhisperConfig, WhisperForConditionalGeneration

from cai_runtime.engine.cache import EncoderPass
from cai_runtime.engine.model_runner import ModelRunner
from cai_runtime.engine.segments import EncoderInput
from cai_runtime.engine.step import Feed, NewPages, Step

ROWS = 72  # positions of the encoder's output: more than a page of 64
VOCABULARY = 310


def tiny_whisper(path: Path, seed: int = 0, **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    base = {
        "vocab_size": VOCABULARY, "num_mel_bins": 12, "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4,
        "encoder_ffn_dim": 112, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96,
        "max_source_positions": ROWS, "max_target_positions": 64, "init_std": 0.15, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
    }  # fmt: skip
    model = WhisperForConditionalGeneration(WhisperConfig(**{**base, **options})).eval()
    for name, p in model.named_parameters():  # norms and biases start as ones and zeros, which hide mistakes
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, 1.0 if "norm.weight" in name else 0.0, 0.3)
    model.save_pretrained(path)
    return model


def windows(count: int, mels: int = 12, seed: int = 5) -> list[np.ndarray]:
    """Random features, fp32 [2 * ROWS, mels]."""
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((2 * ROWS, mels), np.float32) for _ in range(count)]


def expected_logits(model: PreTrainedModel, features: np.ndarray, ids: Sequence[int]) -> torch.Tensor:
    """transformers': [len(ids), vocabulary]."""
    with torch.inference_mode():
        return model(
            input_features=torch.from_numpy(features.T.copy())[None], decoder_input_ids=torch.tensor([list(ids)])
        ).logits[0]


class Seated:
    """One text at a seat of a runner: pages are its own, chosen by its seat."""

    def __init__(self, runner: ModelRunner, seat: int, features: np.ndarray, *, pages_of: int | None = None):
        self.runner, self.seat, self.position = runner, seat, 0
        self._features = features if pages_of is None else None  # else another seat's output is shared
        at = seat if pages_of is None else pages_of
        self._changes = [
            NewPages(seat, "full", 0, [4 * seat + i for i in range(4)]),
            NewPages(seat, "encoder", 0, [2 * at + 1, 2 * at]),
        ]

    def step(self, ids: Sequence[int], wanted: int) -> Step:
        feed = Feed(self.seat, self.position, list(ids), wanted)
        step = Step([feed], pages=self._changes)
        if self._features is not None:
            passed = EncoderInput(self._features, ROWS, b"any")
            step.encode.append(EncoderPass(self.seat, "encoder", passed))
        self._changes, self._features, self.position = [], None, self.position + len(ids)
        return step


def run(runner: ModelRunner, *steps: Step) -> torch.Tensor:
    """The logits of steps that run as one."""
    whole = Step([])
    for step in steps:
        whole.feeds += step.feeds
        whole.pages += step.pages
        whole.encode += step.encode
    return runner.launch(whole).wait().clone()
