"""What an engine has done and holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RequestTimes:
    """How long one request took, in seconds. Complete once the request is done."""

    queue: float = 0.0  # from `submit` to its first step
    first_token: float = 0.0  # from `submit` to the first token
    per_token: float = 0.0  # mean between two tokens; 0 with a single one


@dataclass
class EngineStats:
    """A snapshot. Counts are since the engine was made; a request is finished, failed or aborted, never two of them."""

    running: int = 0  # sequences in the batch
    waiting: int = 0  # sequences without pages: new ones and preempted ones
    pages_total: int = 0
    pages_free: int = 0
    pages_cached: int = 0  # hold a prefix that no sequence uses now; given up when pages run out
    pages_used: int = 0
    prompt_tokens: int = 0  # of the requests that were started
    prefix_hit_tokens: int = 0  # of those, the ones whose KV came from the prefix cache
    preemptions: int = 0  # sequences that lost their pages to older ones and were computed again
    tokens_prefilled: int = 0  # tokens fed as part of a prompt or of a recomputation
    tokens_decoded: int = 0  # tokens generated
    tokens_drafted: int = 0  # proposed by a drafter and fed
    drafts_taken: int = 0  # of those, the ones that were what the model chose
    steps: int = 0  # calls of the model that succeeded
    finished: int = 0
    failed: int = 0
    aborted: int = 0
    retries: int = 0  # steps that failed and were tried again in halves
    queue_seconds: float = 0.0  # sums of `RequestTimes`, over finished requests
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0  # from their first token to their last
    activations: str = (
        ""  # what the inputs of a language model's int8 weights are rounded to: "fp32" (not at all) or "int8"
    )
    worst_token_gap: float = 0.0  # the most seconds between two tokens of one sequence, preemptions included
