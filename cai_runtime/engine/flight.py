"""A step under way: its passes, the tokens that its sequences take, and the errors of the runner."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field

from cai_runtime.engine.masks import MaskedRow, dead_end
from cai_runtime.engine.pooling import take_hidden
from cai_runtime.engine.runner import Pass, PendingSampled
from cai_runtime.engine.sampling import RowSampler, logprobs_of, tokens_or_errors
from cai_runtime.engine.scheduler import Planned
from cai_runtime.engine.sequence import Sequence
from cai_runtime.kernels.sampling import NOTHING_ALLOWED, Sampled

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
    samplers: list[RowSampler] = field(default_factory=list)  # of the wanted rows
    positions: list[int] = field(default_factory=list)  # of the rows' tokens
    drafted: dict[int, list[int] | tuple[int, ...]] = field(default_factory=dict)  # row -> tokens before it
    masked: list[MaskedRow] = field(default_factory=list)
    mask_errors: dict[int, Exception] = field(default_factory=dict)  # by row
    tokens: list[int | Exception] = field(default_factory=list)  # instead of `sampled`
    encoded: int = 0  # rows of encoders' outputs
    found: Sampled | None = None  # once it was waited for, where rows want logprobs

    def wait(self) -> list[int | Exception]:
        """For each row the sampled token, or an error that ends only its sequence. Raises the error of a failed pass."""
        if self.error is not None:
            raise self.error
        assert self.made is not None
        if self.sampled is None:
            self.made.wait()
            return self.tokens
        try:
            sampled = self.sampled.wait()
            self.found = sampled if sampled.logprobs is not None else None
            tokens = tokens_or_errors(sampled, self.positions)
            return self._with_mask_errors(sampled, tokens) if self.masked else tokens
        except Exception as error:  # noqa: BLE001 - such as a device out of memory
            self.made.wait()  # raises if the pass failed, and not the sampling
            forget_frames(error)
            return [error] * len(self.positions)

    def _with_mask_errors(self, sampled: Sampled, tokens: list[int | Exception]) -> list[int | Exception]:
        """Name the mask where it left no token, or failed."""
        for place in self.masked:
            for row in range(place.row, place.row + len(place.draft) + 1):
                if row in self.mask_errors:
                    tokens[row] = self.mask_errors[row]
                elif sampled.status[row] == NOTHING_ALLOWED:
                    tokens[row] = dead_end(place.mask, self.positions[row])
        return tokens


@dataclass(slots=True)
class Flight:
    """A step under way. begin: time of its launch. prompt_tokens: with the rows of encoders' outputs."""

    parts: list[Launched]
    begin: float
    prompt_tokens: int


def take_rows(
    planned: Planned, rows: list[int | Exception], found: Sampled | None, at: int
) -> tuple[int, Exception | None]:
    """Give a sequence what its rows of a step have: logprobs of its prompt, then tokens, with their logprobs if it wants
    them; or hidden states alone. at: of its first row in `found`. Returns as `append_sampled`."""
    sequence = planned.sequence
    if not sequence.asks_more:  # nearly always
        return append_sampled(sequence, planned.draft, rows)
    if sequence.pool is not None:
        return 0, take_hidden(sequence.pool, planned.feed.hidden, sequence.log, at_end=planned.at_end)
    if sequence.beam is not None:
        planned.at_end = False  # its group goes on when all members have their rows
        return 0, sequence.beam.take(sequence, rows, found, at)
    params, scored = sequence.request.sampling, planned.scored
    if sequence.aligner is not None:
        wrong = sequence.aligner.take(planned.feed.attention)
        if wrong is not None:
            return 0, wrong
        if planned.at_end:
            sequence.log.attention = sequence.aligner.result()
    if scored:
        error = next((row for row in rows[:scored] if isinstance(row, Exception)), None)
        if error is not None:
            return 0, error
        assert found is not None and params.prompt_logprobs is not None and sequence.prompt_logprobs is not None
        first = len(sequence.prompt_logprobs)
        ids = sequence.token_ids[first : first + scored]
        sequence.add_prompt_logprobs(logprobs_of(found, ids, at, params.prompt_logprobs))
    rows, known = rows[scored:], len(sequence.token_ids)
    if not params.max_tokens:  # the row says whether the model is sound, but its token is not wanted
        return 0, next((row for row in rows if isinstance(row, Exception)), None)
    count, error = append_sampled(sequence, planned.draft, rows)
    if count and sequence.logprobs is not None:
        assert found is not None and params.logprobs is not None
        sequence.logprobs += logprobs_of(found, sequence.token_ids[known:], at + scored, params.logprobs)
    return count, error


def append_sampled(
    sequence: Sequence, draft: list[int] | tuple[int, ...], rows: list[int | Exception]
) -> tuple[int, Exception | None]:
    """Add to a sequence what was sampled behind its newest token and behind each drafted one: as long as the draft is what
    was sampled, the next row follows the text. Returns how many tokens it got, and the error of the row where they stop."""
    if len(rows) == 1 and type(rows[0]) is int and sequence.mask is None:  # nearly always
        sequence.append(rows[0])
        return 1, None
    for i, token in enumerate(rows):
        if isinstance(token, Exception):
            return i, token
        try:
            sequence.append(token)
        except Exception as error:  # noqa: BLE001 - a mask that breaks fails its request alone
            return i + 1, error
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
