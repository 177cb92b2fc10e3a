"""What `Engine.submit` refuses because parts of a request don't go together, or not with this model."""

from __future__ import annotations

from typing import Any

from cai_runtime.engine.request import Request
from cai_runtime.engine.segments import Prompt
from cai_runtime.errors import InvalidRequestError


def check_parts(request: Request, prompt: Prompt, *, able: frozenset[str], has_head: bool) -> None:
    """Raise InvalidRequestError for a pooling or an alignment that can't be served.

    able: capabilities of the runner. has_head: whether the model writes text."""
    if request.pooling is not None:
        _check_pooling(request, able)
    elif not has_head:
        raise InvalidRequestError("this model has no language-model head: it makes embeddings alone, and no text")
    if request.alignment is not None:
        _check_alignment(request, prompt, able)


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
    assert alignment is not None
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
    if not alignment.heads or not all(_is_head(pair) for pair in alignment.heads):
        raise InvalidRequestError(
            f"alignment.heads is {alignment.heads!r}; give at least one pair (layer, head) of integers from 0"
        )
    if not _is_int(alignment.count) or not 1 <= alignment.count <= length:
        raise InvalidRequestError(
            f"alignment.count is {alignment.count!r}; it must be from 1 to the prompt's {length} tokens"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_head(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and all(_is_int(n) and n >= 0 for n in pair)
