"""The seam between the scheduler, which thinks in tokens and pages, and the model, which thinks in tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)  # not frozen: made anew for each sequence in each step
class ScheduledSequence:
    """The share of one sequence in one step: a chunk of its prompt (prefill) or its newest token (decode).

    `pages` are the physical page ids of the whole sequence so far, position p living in pages[p // page_size]; they
    cover at least `start + len(token_ids)` positions.
    """

    token_ids: list[int]  # the tokens fed in this step, at least one
    start: int  # absolute position of token_ids[0]; positions before it are already in the cache
    pages: list[int]
    sample: bool  # whether the logits that follow the last token are wanted


class Runner(Protocol):
    """Runs a model over a paged KV cache. Called from the engine's owner thread only."""

    page_size: int  # positions per page
    num_pages: int
    vocab_size: int
    max_context: int  # positions a sequence may have

    def run(self, step: list[ScheduledSequence]) -> torch.Tensor:
        """Feed all tokens of the step; return logits fp32 [number of sequences with sample=True, vocab_size] on the
        CPU, in the order of `step`. A row does not depend on which other sequences are in the step, nor on how its
        prompt was chunked. After an exception the engine may feed the same tokens at the same positions again."""
        ...

    def close(self) -> None:
        """Give the weights' and the cache's memory back. Idempotent."""
        ...
