"""What transformers' Whisper takes: log-mel features of a window of audio, and batches of one window."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.audio.files import RATE
from cai_runtime.stock.guard import as_compression_error

if TYPE_CHECKING:
    import numpy as np
    import torch


def speech_batch(features: torch.Tensor, tokens: torch.Tensor, prompt: int) -> dict[str, torch.Tensor]:
    """A batch of one window: `input_features` [1, mels, frames], `decoder_input_ids` [1, tokens], and as `labels` the next
    token at each place, -100 where that is part of the prompt. tokens: int64, prompt, text and end."""
    labels = tokens[1:].clone()
    labels[: prompt - 1] = -100
    return {"input_features": features[None], "decoder_input_ids": tokens[None, :-1], "labels": labels[None]}


def window_features(extractor: Any, audio: np.ndarray) -> torch.Tensor:
    """Log-mel features of up to 30 s, padded with silence: fp32 [mels, frames]."""
    return extractor(audio, sampling_rate=RATE, return_tensors="pt").input_features[0]


def load_processor(path: str | Path) -> tuple[Any, Any]:
    """A Whisper's feature extractor and tokenizer. Raises CompressionError when the directory lacks their files."""
    from transformers import AutoFeatureExtractor, AutoTokenizer

    with as_compression_error(f"the feature extractor or tokenizer of {path} can't be loaded"):
        return (
            AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False),
            AutoTokenizer.from_pretrained(path, trust_remote_code=False),
        )
