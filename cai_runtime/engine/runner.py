"""The seam between the scheduler, which thinks in tokens and pages, and the model, which thinks in tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cai_runtime.kernels.sampling import Sampled, SamplingBatch, sample_cpu


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


class PendingSampled(Protocol):
    """Tokens that may still be in the making."""

    def wait(self) -> Sampled: ...


class Runner(Protocol):
    """Runs a model over a paged KV cache. Called from the engine's owner thread only."""

    page_size: int  # positions per page
    num_pages: int
    vocab_size: int
    max_context: int  # positions a sequence may have

    def run(self, step: list[ScheduledSequence]) -> Any:
        """Feed all tokens of the step; return logits fp32 [number of sequences with sample=True, vocab_size], in the
        order of `step`: a numpy array, or a torch tensor on any device, good until the next call. A row does not depend
        on which other sequences are in the step, nor on how its prompt was chunked. After an exception the engine may
        feed the same tokens at the same positions again."""
        ...

    def sample(self, logits: Any, batch: SamplingBatch) -> PendingSampled:
        """Choose a token from each row of what `run` returned, which may be overwritten. Need not wait for the device.
        A runner without this method samples on the CPU; see `sampler_of`."""
        ...

    def close(self) -> None:
        """Give the weights' and the cache's memory back. Idempotent."""
        ...


def sampler_of(runner: Any) -> Callable[[Any, SamplingBatch], PendingSampled]:
    """The runner's `sample`; for a runner without one, whose logits are then on the host, the CPU kernels'.

    Loads the kernels' library, so that no step pays for it. Raises KernelError where it is not built."""
    own = getattr(runner, "sample", None)
    if own is not None:
        return own
    from cai_runtime.kernels import cpu_library  # imports torch

    cpu_library.library()
    return sample_cpu
