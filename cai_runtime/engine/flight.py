"""A step under way: its passes, the tokens that its sequences take, and the errors of the runner."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field

from cai_runtime.engine.runner import Pass, PendingSampled
from cai_runtime.engine.sampling import tokens_or_errors
from cai_runtime.engine.scheduler import Planned
from cai_runtime.engine.sequence import Sequence

# After these errors every call of CUDA fails in this process.
LOST_DEVICE = (
    "illegal memory access", "misaligned address", "device-side assert", "unspecified launch failure",
    "illegal instruction", "hardware stack error", "uncorrectable ECC error",
)  # fmt: skip


@dataclass(slots=True)
class Launched:
    """A pass under way, and its sampling."""

    part: list[Planned]
    made: Pass | None = None
    sampled: PendingSampled | None = None
    error: Exception | None = None  # the launch failed
    positions: list[int] = field(default_factory=list)  # of the tokens to be sampled, one per row
    tokens: list[int | Exception] = field(default_factory=list)  # the rows' results, if `sampled` is None

    def wait(self) -> list[int | Exception]:
        """For each row the sampled token, or an error that ends only its sequence. Raises the error of a failed pass."""
        if self.error is not None:
            raise self.error
        assert self.made is not None
        if self.sampled is None:
            self.made.wait()
            return self.tokens
        try:
            return tokens_or_errors(self.sampled.wait(), self.positions)
        except Exception as error:  # noqa: BLE001 - such as a device out of memory
            self.made.wait()  # raises if the pass failed, and not the sampling
            forget_frames(error)
            return [error] * len(self.positions)


@dataclass(slots=True)
class Flight:
    """A step under way. begin: time of its launch."""

    parts: list[Launched]
    begin: float
    prompt_tokens: int


def append_sampled(
    sequence: Sequence, draft: list[int] | tuple[int, ...], rows: list[int | Exception]
) -> tuple[int, Exception | None]:
    """Append a step's tokens to a sequence. rows: sampled after its newest token, then after each token of the draft. A row
    counts as long as the draft before it equals the sampled tokens. Returns the number of tokens appended, and the error
    of the row at which they stop."""
    if len(rows) == 1 and type(rows[0]) is int:  # the usual case, without a draft
        sequence.append(rows[0])
        return 1, None
    for i, token in enumerate(rows):
        if isinstance(token, Exception):
            return i, token
        sequence.append(token)
        if i == len(draft) or token != draft[i] or sequence.may_end():
            return i + 1, None
    return 0, None


def forget_frames(error: BaseException) -> None:
    """Release the local variables (activations, weights) of the frames that an exception passed through."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__


def lost_the_device(error: Exception) -> bool:
    """Whether no later step can succeed in this process."""
    said = str(error)
    return any(text in said for text in LOST_DEVICE)


def is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "OutOfMemory" in type(error).__name__
    )
