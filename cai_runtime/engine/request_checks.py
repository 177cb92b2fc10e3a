"""What `Engine.submit` refuses because parts of a request don't go together, or not with this model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from cai_runtime.engine.alignment import Alignment
from cai_runtime.engine.beam_search import BeamSearch
from cai_runtime.engine.request import Request
from cai_runtime.engine.sampling import MAX_LOGPROBS
from cai_runtime.engine.segments import Prompt
from cai_runtime.errors import InvalidRequestError, RequestTooLargeError

if TYPE_CHECKING:
    from cai_runtime.engine.scheduler import Scheduler

MOST_BEAMS = MAX_LOGPROBS // 2  # each text proposes twice as many tokens
_MOST_PENALTY = 10.0  # so that a length to its power is finite


def check_parts(request: Request, prompt: Prompt, *, able: frozenset[str], has_head: bool) -> None:
    """Raise InvalidRequestError for a pooling or an alignment that can't be served.

    able: capabilities of the runner. has_head: whether the model writes text."""
    if request.pooling is not None:
        _check_pooling(request, able)
    elif not has_head:
        raise InvalidRequestError("this model has no language-model head: it makes embeddings alone, and no text")
    if request.alignment is not None:
        _check_alignment(request, prompt, able)
    if request.rules is not None and not callable(request.rules):
        raise InvalidRequestError(f"rules is {request.rules!r}; it must be a function of a row of logits and of tokens")


def _check_pooling(request: Request, able: frozenset[str]) -> None:
    params = request.sampling
    if request.pooling not in ("mean", "last"):
        raise InvalidRequestError(f"pooling is {request.pooling!r}; it must be 'mean' or 'last'")
    if "hidden_states" not in able:
        raise InvalidRequestError("pooling needs hidden states, but this model lacks the capability 'hidden_states'")
    scores = params.logprobs is not None or params.prompt_logprobs is not None
    if params.max_tokens or scores or request.mask or request.rules:
        raise InvalidRequestError(
            "an embedding has no text: with pooling, max_tokens is 0, without logprobs, mask and rules"
        )


def _check_alignment(request: Request, prompt: Prompt, able: frozenset[str]) -> None:
    alignment, length = request.alignment, len(prompt.token_ids)
    if not isinstance(alignment, Alignment):
        raise InvalidRequestError(f"alignment is {alignment!r}; it must be an Alignment")
    if "cross_attention" not in able:
        raise InvalidRequestError(
            "alignment needs cross-attention, but this model lacks the capability 'cross_attention'"
        )
    if prompt.encoder is None:
        raise InvalidRequestError("alignment needs an encoder's input among the segments: it says what to align with")
    if request.sampling.max_tokens or request.sampling.logprobs is not None or request.pooling is not None:
        raise InvalidRequestError(
            "an alignment is of a prompt alone: with alignment, max_tokens is 0, without logprobs and pooling"
        )
    if not isinstance(alignment.heads, tuple) or not alignment.heads or not all(map(_is_head, alignment.heads)):
        raise InvalidRequestError(
            f"alignment.heads is {alignment.heads!r}; give a tuple of at least one pair (layer, head) of integers from 0"
        )
    if not _is_int(alignment.count) or not 1 <= alignment.count <= length:
        raise InvalidRequestError(
            f"alignment.count is {alignment.count!r}; it must be from 1 to the prompt's {length} tokens"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_head(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and all(_is_int(n) and n >= 0 for n in pair)


def rows_of(beam: BeamSearch, logprobs: int | None) -> int:
    """How many of the likeliest tokens a search needs of each text. logprobs: as the request asks."""
    return max(2 * beam.width, logprobs or 0)


def check_beam(request: Request, prompt: Prompt, scheduler: Scheduler, *, copies: bool) -> None:
    """Raise InvalidRequestError for a beam search that can't be served, RequestTooLargeError where it could never fit.

    copies: whether the runner copies pages."""
    beam, params = request.beam, request.sampling
    if beam is None:
        return
    if not isinstance(beam, BeamSearch):
        raise InvalidRequestError(f"beam is {beam!r}; it must be a BeamSearch")
    if not copies:
        raise InvalidRequestError("beam search needs copies of cache pages, which this model's runner does not make")
    if not _is_int(beam.width) or not 1 <= beam.width <= MOST_BEAMS:
        raise InvalidRequestError(f"beam.width is {beam.width!r}; it must be an integer from 1 to {MOST_BEAMS}")
    if beam.width > scheduler.max_batch:
        raise InvalidRequestError(
            f"beam.width is {beam.width}, but max_batch is {scheduler.max_batch}: give a smaller width, or open the model "
            "with a larger max_batch"
        )
    if not _is_number(beam.patience) or not 0 < beam.patience < math.inf:
        raise InvalidRequestError(f"beam.patience is {beam.patience!r}; it must be a number above 0")
    if not _is_number(beam.length_penalty) or not abs(beam.length_penalty) <= _MOST_PENALTY:
        raise InvalidRequestError(
            f"beam.length_penalty is {beam.length_penalty!r}; it must be a number from {-_MOST_PENALTY:g} to "
            f"{_MOST_PENALTY:g}"
        )
    if params.temperature != 0:
        raise InvalidRequestError(f"temperature is {params.temperature!r}; with beam search it must be 0")
    if params.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens is {params.max_tokens}; with beam search it must be at least 1")
    unable = {
        "mask": request.mask is not None,
        "pooling": request.pooling is not None,
        "alignment": request.alignment is not None,
        "prompt_logprobs": params.prompt_logprobs is not None,
    }
    for name, given in unable.items():
        if given:
            raise InvalidRequestError(f"beam search can't be combined with {name}: ask for one of them")
    length = len(prompt.token_ids)
    if not scheduler.cache.room_for_beams(length, length + params.max_tokens, beam.width):
        raise RequestTooLargeError(
            f"beam search of width {beam.width} over {length} prompt tokens and max_tokens {params.max_tokens} could need "
            "more than the whole KV cache: give a smaller width or max_tokens, or raise kv_cache"
        )


def check_beam_stops(request: Request, ends: dict[int, str | None]) -> None:
    """Raise InvalidRequestError for a stop string that is not the text of a token: a search sees no text.

    ends: tokens that end the text, with the stop strings that they are."""
    unknown = set(request.sampling.stop) - {*ends.values()} if request.beam is not None else set()
    if unknown:
        raise InvalidRequestError(
            f"beam search finds no stop string such as {min(unknown)!r}: give its tokens as stop_token_ids"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
