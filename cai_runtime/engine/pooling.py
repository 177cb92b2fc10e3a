"""The embedding of one prompt: a mean of its hidden states, or its last one.

The sum is taken in fp64, row after row, so that its bits depend neither on the chunks in which the prompt is computed nor on
what else is in a step.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from cai_runtime.engine.step import HiddenRows
from cai_runtime.errors import CaiError, NonFiniteLogitsError

Pooling = Literal["mean", "last"]  # over all tokens of a prompt, or of its last one


class Pool:
    """Collects the hidden states of a prompt of `length` tokens.

    count: positions before this one need no hidden state any more.
    """

    def __init__(self, pooling: Pooling, length: int):
        self._first = 0 if pooling == "mean" else length - 1
        self._length = length
        self.count = self._first
        self._sum: np.ndarray | None = None

    def wanted(self, start: int, end: int) -> HiddenRows | None:
        """What a feed of the positions start to end - 1 has to give."""
        count = end - max(start, self.count)
        return HiddenRows(count) if count > 0 else None

    def add(self, found: HiddenRows) -> None:
        """Add the rows of the next positions."""
        rows: np.ndarray = found.rows.detach().cpu().numpy()
        if self._sum is None:
            self._sum = np.zeros(rows.shape[1])
        for row in rows:
            self._sum += row
        self.count += found.count

    def result(self) -> np.ndarray:
        """fp64 [hidden]. Raises NonFiniteLogitsError."""
        assert self._sum is not None and self.count == self._length
        if not np.isfinite(self._sum).all():
            raise NonFiniteLogitsError("the model's hidden states of this prompt are not finite")
        return self._sum / (self._length - self._first)


def take_hidden(pool: Pool, found: HiddenRows | None, log: Any, *, at_end: bool) -> CaiError | None:
    """Give a pool what a feed has. at_end: of the prompt; the log then gets the embedding. Returns what is wrong with it."""
    if found is not None:
        pool.add(found)
    if at_end:
        try:
            log.embedding = pool.result()
        except NonFiniteLogitsError as error:
            return error
    return None
