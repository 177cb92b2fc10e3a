"""The seam between the engine and the model: a step is launched, then waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from cai_runtime.engine.step import ScheduledSequence as ScheduledSequence  # also found here
from cai_runtime.engine.step import Step
from cai_runtime.kernels.sampling import Sampled, SamplingBatch, sample_cpu


class Pass(Protocol):
    """A launched step."""

    def wait(self) -> Any:
        """Until the runner can say whether the pass went through. Raises what it failed with."""
        ...


class PendingSampled(Protocol):
    """Tokens that may still be in the making."""

    def wait(self) -> Sampled: ...


class Runner(Protocol):
    """Runs a model over a paged KV cache, one step after another. Called from the engine's thread only.

    A row of logits does not depend on which other sequences are in the step, nor on how its prompt was chunked. After a
    failure the engine may feed the same tokens at the same positions again, and ask for the same page copies.

    A runner with an attribute `ahead = True` takes `NEXT` in a feed: the token that the seat sampled last. The engine then
    launches a step before it has read the tokens of the one before. One whose attribute `able` has "hidden_states" serves
    `Feed.hidden`; one with `has_head = False` serves nothing else. One whose `able` has "cross_attention" serves
    `Feed.attention`.
    """

    page_size: int  # positions per page
    num_pages: int
    vocab_size: int
    max_context: int  # positions a sequence may have

    def launch(self, step: Step) -> Pass:
        """Begin to feed all tokens of the step. Does not wait for them; steps run in the order of their launches."""
        ...

    def sample(self, made: Pass, batch: SamplingBatch) -> PendingSampled:
        """Choose a token from each wanted row of a pass, in the order of its feeds, once they are there. Does not wait."""
        ...

    def close(self) -> None:
        """Give the weights' and the cache's memory back, after what was launched. Idempotent."""
        ...


class SimpleRunner(Protocol):
    """A runner whose model is a function. `RunnerThread` makes a `Runner` of it. Optional are `sample`, in place of the CPU
    kernels', and `copy_pages(pairs)`, which beam search needs: copies pages, (source, target) of each, in order."""

    page_size: int
    num_pages: int
    vocab_size: int
    max_context: int

    def run(self, step: list[ScheduledSequence]) -> Any:
        """Feed all tokens; return logits fp32 [rows wanted, vocab_size] in the order of `step`: a numpy array, or a torch
        tensor, good until the next call."""
        ...

    def close(self) -> None: ...


def sampler_of(runner: Any) -> Callable[[Any, SamplingBatch], PendingSampled]:
    """`runner.sample` of a simple runner; without one, whose logits are then on the host, the CPU kernels'.

    Loads the kernels' library, so that no step pays for it. Raises KernelError where it is not built."""
    own = getattr(runner, "sample", None)
    if own is not None:
        return own
    from cai_runtime.kernels import cpu_library  # imports torch

    cpu_library.library()
    return sample_cpu
