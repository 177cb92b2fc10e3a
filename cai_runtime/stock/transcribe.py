"""A Whisper's own transcription of windows of audio, at a temperature: what it is calibrated on where nobody has written
down what is said.

The loop is plain: prompt, rules for suppressed tokens and times, and the most likely or a drawn token, until the end. The
rules are those of transformers' `generate` (Radford, Kim, Xu, Brockman, McLeavey and Sutskever, "Robust speech recognition
via large-scale weak supervision", 2022), which itself draws from torch's global random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cai_runtime.errors import CompressionError
from cai_runtime.kernels.sampling import uniform
from cai_runtime.stock.cached_forward import cached_forward

TOGETHER = 8  # windows transcribed at once


@dataclass(frozen=True)
class Prompts:
    """The tokens by which Whisper is told what to do.

    start: <|startoftranscript|>. task: what follows the language (empty for a model of English alone). languages: ids of the
    languages' tokens, empty likewise; one where the generation config names it. plain: <|notimestamps|>. end: <|endoftext|>.
    """

    start: int
    task: tuple[int, ...]
    languages: tuple[int, ...]
    plain: int
    end: int

    @classmethod
    def of(cls, model: Any) -> Prompts:
        """Of transformers' Whisper, from its generation config. Raises CompressionError where that lacks one."""
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
        """The prompt, in a language where there are several, with or without times."""
        return [self.start, *language, *self.task, *([] if times else [self.plain])]


@torch.inference_mode()
def prompt_of(model: Any, prompts: Prompts, encoded: torch.Tensor, *, times: bool) -> list[list[int]]:
    """The prompt for each of the windows: the language that the model hears, where it knows several; with or without
    times. encoded: the encoder's output, [windows, positions, width]."""
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
    """What the model writes after each window's prompt, its end token included (unless `most` tokens end it).

    model: transformers' Whisper. encoded: as in `prompt_of`. prompt: of equal length. temperature: 0 takes the most likely
    token. keys: a random key for each window; the same key draws the same tokens, whatever else is in the batch.
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
    """The encoder's output for log-mel features [windows, mels, frames]: [windows, positions, width]."""
    place = next(model.parameters())
    return model.get_encoder()(features.to(place.device, place.dtype)).last_hidden_state


def _languages(config: Any) -> tuple[int, ...]:
    """Ids of the languages that a text may be in; the one that is named as transformers' `generate` takes it: fr, French or
    <|fr|>."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    ids = {str(token): int(at) for token, at in config.lang_to_id.items()}
    named = getattr(config, "language", None)
    if named is None:
        return tuple(ids.values())
    named = named.lower()
    return (ids[named if named in ids else f"<|{TO_LANGUAGE_CODE.get(named, named)}|>"],)


def _logits(model: Any, encoded: torch.Tensor, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """Of the last position, fp32 [windows, vocabulary]; the cache with these positions."""
    from transformers.modeling_outputs import BaseModelOutput

    encoder_outputs = BaseModelOutput(last_hidden_state=encoded)
    output, cache = cached_forward(model, cache, encoder_outputs=encoder_outputs, decoder_input_ids=ids)
    return output.logits[:, -1].float(), cache


def _rules(model: Any, begin: int, last: int) -> list[Any]:
    """What forbids tokens: those that are never to be written, those that no text begins with, and times out of order."""
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
