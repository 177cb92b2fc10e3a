"""A sequence's place in its grammar."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from cai_runtime.errors import GrammarError


class GrammarMask:
    """A `TokenMask` over an LLMatcher.

    Args:
        name: what errors call it.
        matcher: at the grammar's start; belongs to the mask.
        permitted: uint32 [words], the tokens that the grammar may allow at all.
        own_ends: the tokens that the matcher takes for the end of a text.
        ends: those that end this one.
    """

    def __init__(
        self, name: str, matcher: Any, permitted: np.ndarray, own_ends: Collection[int], ends: Collection[int]
    ):
        self.name = name
        self._matcher, self._permitted = matcher, permitted
        self._ends = bits_of(ends, len(permitted))
        lost = set(own_ends) - set(ends)
        self._not_lost = ~bits_of(lost, len(permitted)) if lost else None

    def fill(self, row: np.ndarray) -> bool:
        """See `TokenMask`. Raises GrammarError if the grammar takes too much to follow."""
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._finish(row)
        return True

    @staticmethod
    def fill_all(masks: Sequence[tuple[GrammarMask, int]], rows: np.ndarray) -> dict[int, Exception]:
        """See `TokenMask`."""
        errors: dict[int, Exception] = {}
        if len(masks) > 1:
            matchers = [(mask._matcher, row) for mask, row in masks]
            executor().unsafe_compute_mask_ptr(matchers, rows.ctypes.data, rows.shape[1] * 4, len(rows))
        for mask, row in masks:
            try:
                if len(masks) > 1:
                    mask._finish(rows[row])
                else:
                    mask.fill(rows[row])
            except GrammarError as error:
                errors[row] = error
        return errors

    def _finish(self, row: np.ndarray) -> None:
        """What llguidance leaves open: errors, dead ends, special tokens, and which tokens end this text."""
        matcher = self._matcher
        if matcher.is_error():
            raise self._error()
        accepting = matcher.is_accepting()
        if not accepting and matcher.is_stopped():
            row.fill(0)  # llguidance would end the text
            return
        np.bitwise_and(row, self._permitted, out=row)
        if accepting:
            if self._not_lost is not None:
                np.bitwise_and(row, self._not_lost, out=row)
            np.bitwise_or(row, self._ends, out=row)

    def accept(self, token_id: int) -> None:
        """See `TokenMask`. Raises GrammarError."""
        if not self._matcher.consume_token(token_id):
            raise self._error()

    def rollback(self, count: int) -> None:
        """See `TokenMask`. Raises GrammarError."""
        if not self._matcher.rollback(count):
            raise self._error()

    def _error(self) -> GrammarError:
        reason = self._matcher.get_error().strip().partition("\n")[0]
        if reason.startswith("NoExtension"):
            reason = "no text that fits it begins like this one"
        return GrammarError(f"'{self.name}' can't be followed any further: {reason}", param=self.name)


def bits_of(token_ids: Collection[int], words: int) -> np.ndarray:
    """uint32 [words], with the bits of these tokens set."""
    bits = np.zeros(words, np.uint32)
    ids = np.fromiter(token_ids, np.int64, len(token_ids))
    np.bitwise_or.at(bits, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))
    return bits


_lock = threading.Lock()
_executors: dict[int, Any] = {}


def executor() -> Any:
    """One for the process: a forked child has none of its parent's threads."""
    import llguidance

    with _lock:
        pid = os.getpid()
        if pid not in _executors:
            _executors.clear()
            # The model computes meanwhile, on all processors: a mask takes a small part of a pass.
            _executors[pid] = llguidance.LLExecutor(num_threads=max(1, min(8, (os.cpu_count() or 1) // 4)))
        return _executors[pid]
