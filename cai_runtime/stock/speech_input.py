"""Inputs of transformers' Whisper: log-mel features of a window of audio, and batches of one window."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.audio.files import RATE
from cai_runtime.stock.guard import as_compression_error

if TYPE_CHECKING:
    import numpy as np
    import torch


def speech_batch(features: torch.Tensor, tokens: torch.Tensor, prompt: int) -> dict[str, torch.Tensor]:
    """A batch of one window for teacher forcing.

    features: [mels, frames]. tokens: int64 [tokens], prompt, text and end. prompt: number of prompt tokens.

    Returns `input_features` [1, mels, frames], `decoder_input_ids` [1, tokens - 1], and `labels` [1, tokens - 1]: the next
    token at each position, -100 where that belongs to the prompt.
    """
    labels = tokens[1:].clone()
    labels[: prompt - 1] = -100
    return {"input_features": features[None], "decoder_input_ids": tokens[None, :-1], "labels": labels[None]}


def window_features(extractor: Any, audio: np.ndarray) -> torch.Tensor:
    """Log-mel features, fp32 [mels, frames], of audio fp32 [samples] at 16 kHz, up to 30 s, padded with silence."""
    return extractor(audio, sampling_rate=RATE, return_tensors="pt").input_features[0]


def load_processor(path: str | Path) -> tuple[Any, Any]:
    """(feature extractor, tokenizer) of a Whisper directory. Raises CompressionError if they can't be loaded."""
    from transformers import AutoFeatureExtractor, AutoTokenizer

    with as_compression_error(f"the feature extractor or tokenizer of {path} can't be loaded"):
        return (
            AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False),
            AutoTokenizer.from_pretrained(path, trust_remote_code=False),
        )
