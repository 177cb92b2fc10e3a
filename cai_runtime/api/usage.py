"""Ids, times and token counts: what every reply carries besides its choices."""

from __future__ import annotations

import secrets
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from openai.types import CompletionUsage
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails

from cai_runtime.engine.request import Finished
from cai_runtime.formats.events import ReasoningEvent

_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ReplyHead:
    """The same on every chunk of a reply. `created` in Unix seconds; `model` as the request named it."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, prefix: str, model: str) -> ReplyHead:
        name = "".join(secrets.choice(_ALPHABET) for _ in range(24))
        return cls(f"{prefix}-{name}", int(time.time()), model, system_fingerprint())


@cache
def system_fingerprint() -> str:
    """What a seed's promise is bound to: a seeded request repeats exactly under the same fingerprint."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"cai_runtime-{version('cai-runtime')}"
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "cai_runtime"


def reasoning_tokens(done: Finished) -> int:
    """Of the thoughts, without the markers around them."""
    return sum(len(event.token_ids) for event in done.events if isinstance(event, ReasoningEvent))


def usage_of(completions: Sequence[Finished], choices_per_prompt: int) -> CompletionUsage:
    """Token counts of a whole reply. A prompt counts once, however many choices were asked for it; so do its cached
    tokens, as its first choice found them."""
    firsts = completions[::choices_per_prompt]
    prompt = sum(done.prompt_tokens for done in firsts)
    completion = sum(done.completion_tokens for done in completions)
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(done.cached_tokens for done in firsts), audio_tokens=0, image_tokens=0
        ),
        completion_tokens_details=CompletionTokensDetails(
            reasoning_tokens=sum(map(reasoning_tokens, completions)),
            audio_tokens=0,
            accepted_prediction_tokens=0,
            rejected_prediction_tokens=0,
        ),
    )
