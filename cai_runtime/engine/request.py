"""What goes into the engine and what comes out: plain dataclasses, no JSON, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cai_runtime.engine.stats import RequestTimes

if TYPE_CHECKING:
    import numpy as np

    from cai_runtime.engine.alignment import Alignment
    from cai_runtime.engine.beam_search import BeamSearch
    from cai_runtime.engine.masks import MaskFactory
    from cai_runtime.engine.output import OutputFactory
    from cai_runtime.engine.pooling import Pooling
    from cai_runtime.engine.segments import Segment

FinishReason = Literal["stop", "length", "tool_calls"]  # the last: of formats that know calls

LogitsRules = Callable[["np.ndarray", Sequence[int]], None]
"""Changes a row of logits, fp32 [vocabulary], in place, by the tokens generated so far.

A pure function of both, without a state of its own: it may be called again for the same tokens, and for tokens of a draft
that are dropped. Called in the thread that samples."""


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled. The API layer validates it; `Engine.submit` refuses numbers out of range.

    The order of the logits processors is: `Request.rules`, repetition penalty (Keskar et al. 2019), frequency and presence
    penalties (OpenAI's definition, over generated tokens; repetition also over the prompt), logit bias, min_tokens' ban of
    stop tokens, temperature, top_k, top_p, min_p. That is transformers' order; vLLM V1 adds the bias before the penalties
    and applies min_p before top_k and top_p. Random numbers depend on (seed, absolute position) alone. The exact
    definition is in kernels/sampling.py.
    """

    max_tokens: int = 16  # 0: only the prompt is computed, such as for its logprobs
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
    logprobs: int | None = None  # k: logprobs of each generated token and of the k (0 to 127) likeliest
    # k: the same of the prompt's tokens, but for the first. The prompt takes nothing from the prefix cache then.
    prompt_logprobs: int | None = None
    # The text ends before the first of these; no part of it is ever emitted. One that is written like a special token,
    # such as "<|im_end|>", stands for that token, for special tokens have no visible text.
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end-of-sequence tokens
    ignore_eos: bool = False  # end-of-sequence tokens are ordinary tokens


@dataclass
class Request:
    """One sequence to continue.

    The prompt is `prompt_ids`, or, where it is more than tokens, `segments` in their place: see `segments.Segment`. It must
    not be empty. cache_salt: what else determines what the model computes for it; requests of unlike salts share no cache.

    mask: makes what says which tokens may come (see `masks.TokenMask`); `Engine.submit` calls it with the tokens that end
    the text.

    rules: change each row of logits before everything else. They are a part of the model's distribution: log probabilities
    of generated tokens are of the logits after them (`prompt_logprobs`: of those without). What they raise fails the request
    alone. Their rows are sampled on the host.

    beam: search for the likeliest text with several beside each other, by the logits after rules, penalties, logit_bias and
    min_tokens. The temperature is 0 then. Nothing is put out before the end, and `Finished.logprobs` are always there: of
    the logits that the search went by.

    pooling: the embedding of the prompt is wanted, and no text: `max_tokens` is 0 then, and nothing else is asked.

    alignment: the cross-attention of the prompt's last tokens is wanted, and no text: `max_tokens` is 0 then. It may ask for
    `prompt_logprobs`, too.
    """

    prompt_ids: list[int] = field(default_factory=list)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str | None = None  # the engine makes one up when None
    skip_special_tokens: bool = True  # leave special tokens out of the emitted text
    output: OutputFactory | None = None  # makes what turns its tokens into events; None: `TextOutput`
    segments: tuple[Segment, ...] = ()
    cache_salt: bytes = b""
    mask: MaskFactory | None = None
    rules: LogitsRules | None = None
    beam: BeamSearch | None = None
    pooling: Pooling | None = None
    alignment: Alignment | None = None


@dataclass(slots=True, unsafe_hash=True)  # frozen, it would take twice the time: one is made for each token
class TextEvent:
    """A piece of visible text; never empty. Not to be changed: whoever consumes the text gets the same object.

    token_ids: the tokens that came since the last event, whose text the piece is, but for characters that were held back.
    """

    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EndEvent:
    """The text is over; always the last event, once. token_ids: as in `TextEvent`; the token that ended it is here."""

    finish_reason: FinishReason
    token_ids: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities in the model's distribution, after `Request.rules` and before the penalties and
    the temperature (kernels/sampling.py), fp32, at least -9999.0: of the token that came, and of the likeliest ones.

    top: (token id, logprob), likeliest first, equal ones by id; as many as were asked for. The token that came may be
    among them or not.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, unsafe_hash=True)  # as `TextEvent`
class Delta:
    """One piece of output: the events that became certain with `token_ids`. Not to be changed.

    `events` may be empty while bytes or a possible stop string are held back. A token that ends the text (end of sequence
    or stop token) is in `token_ids` but has no text; of several stop strings, the one that is complete first counts.
    """

    events: tuple[Any, ...]  # of the kinds that the request's output makes; `TextEvent` and `EndEvent` by default
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None  # set on the last delta only
    stop_string: str | None = None  # the stop string that ended the text, if one did
    logprobs: tuple[TokenLogprobs, ...] | None = None  # of `token_ids`, where the request wants them

    @property
    def text(self) -> str:
        """The text of its `TextEvent`s."""
        return _text_of(self.events)


@dataclass(frozen=True)
class Finished:
    """The fold of a request's deltas."""

    events: tuple[Any, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose KV came from the prefix cache
    stop_string: str | None = None
    times: RequestTimes = field(default_factory=RequestTimes, compare=False)
    # Of `token_ids`, where `SamplingParams.logprobs` or `Request.beam` is given.
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # of the prompt's tokens; None for the first
    # Where `Request.pooling` wants it: fp64 [hidden], not normalized.
    embedding: np.ndarray | None = field(default=None, compare=False)
    # Where `Request.alignment` wants them: fp32 [heads, count, rows], a softmax over the rows of the encoder's output.
    attention: np.ndarray | None = field(default=None, compare=False)

    @property
    def text(self) -> str:
        """The text of its `TextEvent`s."""
        return _text_of(self.events)

    @property
    def completion_tokens(self) -> int:
        """Every generated token: also the end-of-sequence token and those of a stop string, as in the OpenAI API and
        vLLM."""
        return len(self.token_ids)


def _text_of(events: tuple[Any, ...]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextEvent))
