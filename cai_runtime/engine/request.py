"""What goes into the engine and what comes out: plain dataclasses, no JSON, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cai_runtime.engine.stats import RequestTimes

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled. Validated by the API layer; the engine trusts it.

    The order of the logits processors is: repetition penalty (Keskar et al. 2019), frequency and presence penalties
    (OpenAI's definition, over generated tokens; repetition also over the prompt), logit bias, min_tokens' ban of stop
    tokens, temperature, top_k, top_p, min_p.
    """

    max_tokens: int = 16
    min_tokens: int = 0  # until then no end-of-sequence token, stop token or stop string ends the text
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id -> added to its logit
    seed: int | None = None  # None: the engine draws one
    stop: tuple[str, ...] = ()  # the text ends before the first of these; no part of it is ever emitted
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end-of-sequence tokens
    ignore_eos: bool = False  # end-of-sequence tokens are ordinary tokens


@dataclass
class Request:
    """One sequence to continue. `prompt_ids` must not be empty."""

    prompt_ids: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str | None = None  # the engine makes one up when None
    skip_special_tokens: bool = True  # leave special tokens out of the emitted text


@dataclass(frozen=True)
class Delta:
    """One piece of output: the text that became certain with `token_ids`, at present one token.

    `text` may be empty while bytes or a possible stop string are held back. A token that ends the text (end of sequence
    or stop token) is in `token_ids` but has no text; of several stop strings, the one that is complete first counts.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None  # set on the last delta only
    stop_string: str | None = None  # the stop string that ended the text, if one did


@dataclass(frozen=True)
class Completion:
    """The fold of a request's deltas. Token counts are the engine's, not the text's: `completion_tokens` has every
    generated token, the end-of-sequence token and those of a stop string included, as in the OpenAI API and vLLM."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose KV came from the prefix cache
    completion_tokens: int
    stop_string: str | None = None
    times: RequestTimes = field(default_factory=RequestTimes, compare=False)
