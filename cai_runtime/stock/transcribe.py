"""Transcribes windows of audio by Whisper itself, greedily or sampled: the calibration text of clips without transcripts.

After the prompt, each step applies the rules for suppressed tokens and timestamps, and takes the most likely token or a
sampled one. The rules are those of transformers' `generate` (Radford, Kim, Xu, Brockman, McLeavey and Sutskever, "Robust
speech recognition via large-scale weak supervision", 2022). `generate` itself samples from torch's global random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cai_runtime.errors import CompressionError
from cai_runtime.kernels.sampling import uniform
from cai_runtime.stock.cached_forward import cached_forward

TOGETHER = 8  # windows transcribed in one batch


@dataclass(frozen=True)
class Prompts:
    """Whisper's control tokens.

    Attributes:
        start: <|startoftranscript|>.
        task: <|transcribe|>, which follows the language; empty for an English-only model.
        languages: the languages' tokens; only one if the generation config names it; empty for an English-only model.
        plain: <|notimestamps|>.
        end: <|endoftext|>.
    """

    start: int
    task: tuple[int, ...]
    languages: tuple[int, ...]
    plain: int
    end: int

    @classmethod
    def of(cls, model: Any) -> Prompts:
        """The control tokens in a Whisper's generation config. Raises CompressionError if one is missing."""
        config = model.generation_config
        many = bool(getattr(config, "is_multilingual", False))
        try:
            return cls(
                start=int(config.decoder_start_token_id),
                task=(int(config.task_to_id["transcribe"]),) if many else (),
                languages=_languages(config) if many else (),
                plain=int(config.no_timestamps_token_id),
                end=int(config.eos_token_id),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise CompressionError(f"generation_config.json lacks what transcribing needs: {e!r}") from e

    def begin(self, *language: int, times: bool) -> list[int]:
        """The prompt's token ids. language: its token, for a multilingual model. times: whether to predict timestamps."""
        return [self.start, *language, *self.task, *([] if times else [self.plain])]


@torch.inference_mode()
def prompt_of(model: Any, prompts: Prompts, encoded: torch.Tensor, *, times: bool) -> list[list[int]]:
    """The prompt of each window. A model of several languages detects the language.

    encoded: the encoder's output, [windows, positions, width]. times: whether to predict timestamps.
    """
    windows = encoded.shape[0]
    if len(prompts.languages) < 2:
        return [prompts.begin(*prompts.languages, times=times) for _ in range(windows)]
    start = torch.full((windows, 1), prompts.start, device=encoded.device)
    logits = _logits(model, encoded, start, None)[0]
    choices = torch.tensor(prompts.languages, device=logits.device)
    heard = logits[:, choices].argmax(-1).tolist()
    return [prompts.begin(prompts.languages[k], times=times) for k in heard]


@torch.inference_mode()
def transcribe(
    model: Any,
    encoded: torch.Tensor,
    prompt: Sequence[Sequence[int]],
    *,
    most: int,
    temperature: float = 0.0,
    keys: Sequence[int] = (),
) -> list[list[int]]:
    """The token ids that the model generates after each window's prompt, with the end token if it comes within `most`.

    Args:
        model: transformers' Whisper.
        encoded: the encoder's output, [windows, positions, width].
        prompt: token ids for each window, all of one length.
        most: tokens to generate per window, at most.
        temperature: 0 is greedy.
        keys: a random key for each window; a key draws the same tokens in any batch.
    """
    rules, end = _rules(model, len(prompt[0]), prompt[0][-1]), int(model.generation_config.eos_token_id)
    ids = torch.tensor(prompt, device=encoded.device)
    step, cache = ids, None
    done = torch.zeros(len(prompt), dtype=torch.bool, device=ids.device)
    for position in range(most):
        logits, cache = _logits(model, encoded, step, cache)
        for rule in rules:
            logits = rule(ids, logits)
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            share = (logits / temperature).softmax(-1).double().cumsum(-1)
            drawn = [uniform(key, position) for key in keys]
            at = torch.tensor(drawn, dtype=torch.float64, device=share.device)[:, None] * share[:, -1:]
            chosen = torch.searchsorted(share, at, right=True)[:, 0].clamp(max=share.shape[1] - 1)
        chosen = torch.where(done, end, chosen)
        ids, step = torch.cat([ids, chosen[:, None]], 1), chosen[:, None]
        done |= chosen == end
        if bool(done.all()):
            break
    found = ids[:, len(prompt[0]) :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in found]


@torch.inference_mode()
def encode(model: Any, features: torch.Tensor) -> torch.Tensor:
    """The encoder's output [windows, positions, width] for log-mel features [windows, mels, frames]."""
    place = next(model.parameters())
    return model.get_encoder()(features.to(place.device, place.dtype)).last_hidden_state


def _languages(config: Any) -> tuple[int, ...]:
    """Token ids of the languages; only one if the config names it, in a form of transformers' `generate`: fr, French or
    <|fr|>."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    ids = {str(token): int(at) for token, at in config.lang_to_id.items()}
    named = getattr(config, "language", None)
    if named is None:
        return tuple(ids.values())
    named = named.lower()
    return (ids[named if named in ids else f"<|{TO_LANGUAGE_CODE.get(named, named)}|>"],)


def _logits(model: Any, encoded: torch.Tensor, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """(logits of the last position, fp32 [windows, vocabulary]; the updated KV cache)."""
    from transformers.modeling_outputs import BaseModelOutput

    encoder_outputs = BaseModelOutput(last_hidden_state=encoded)
    output, cache = cached_forward(model, cache, encoder_outputs=encoder_outputs, decoder_input_ids=ids)
    return output.logits[:, -1].float(), cache


def _rules(model: Any, begin: int, last: int) -> list[Any]:
    """Logits processors: suppressed tokens, tokens suppressed at the beginning, and the order of timestamps."""
    from transformers.generation.logits_process import (
        SuppressTokensAtBeginLogitsProcessor,
        SuppressTokensLogitsProcessor,
        WhisperTimeStampLogitsProcessor,
    )

    config, device = model.generation_config, next(model.parameters()).device
    rules: list[Any] = []
    if config.suppress_tokens:
        rules.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
    if getattr(config, "begin_suppress_tokens", None):
        rules.append(SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin, device=device))
    if last != config.no_timestamps_token_id:
        rules.append(WhisperTimeStampLogitsProcessor(config, begin_index=begin))
    return rules
