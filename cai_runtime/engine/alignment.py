"""The cross-attention of a prompt's last tokens, by which a speech model's words get their times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cai_runtime.engine.step import AttentionRows
from cai_runtime.errors import CaiError, NonFiniteLogitsError, RunnerError


@dataclass(frozen=True)
class Alignment:
    """The cross-attention weights that are wanted of a prompt.

    heads: (layer, head) pairs, both from 0, in the order of the result. count: of the prompt's last so many tokens.
    """

    heads: tuple[tuple[int, int], ...]
    count: int


class Aligner:
    """Collects the weights of a prompt of `length` tokens over an encoder's output of `rows` positions.

    next: positions before this one need no weights any more.
    """

    def __init__(self, alignment: Alignment, length: int, rows: int):
        self.next = length - alignment.count
        self._heads, self._length, self._rows = alignment.heads, length, rows
        self._parts: list[np.ndarray] = []  # fp32 [heads, n, rows], in the order of the positions

    def wanted(self, start: int, end: int) -> AttentionRows | None:
        """What a feed of the positions start to end - 1 has to give."""
        count = end - max(start, self.next)
        return AttentionRows(self._heads, count) if count > 0 else None

    def take(self, found: AttentionRows | None) -> CaiError | None:
        """Add what a feed has of the next positions. Returns what is wrong with it."""
        if found is None:
            return None
        expected = (len(self._heads), found.count, self._rows)
        weights = np.asarray(found.weights, np.float32) if found.weights is not None else None
        if weights is None or weights.shape != expected:
            shape = None if weights is None else weights.shape
            return RunnerError(f"the runner gave cross-attention weights of shape {shape} instead of {expected}")
        if not np.isfinite(weights).all():
            return NonFiniteLogitsError("the model's cross-attention weights of this prompt are not finite")
        self._parts.append(weights)
        self.next += found.count
        return None

    def result(self) -> np.ndarray:
        """fp32 [heads, count, rows]."""
        assert self.next == self._length
        return np.concatenate(self._parts, axis=1)
