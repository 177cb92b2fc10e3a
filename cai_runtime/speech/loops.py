"""Finds text that repeats itself without end, and where its first turn ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TURNS = 3  # fewest times that a loop says its turn; twice is what people do
SURPLUS = 10  # fewest tokens beyond the first turn, so that a short turn has to come more often
LONGEST_TURN = 100  # tokens


@dataclass(frozen=True)
class Loop:
    """tokens[begin : begin + period], a turn, said `turns` times, the last one perhaps in part; `end`: behind the last."""

    begin: int
    period: int
    end: int

    @property
    def cut(self) -> int:
        """Number of tokens to keep: those up to the end of the first turn."""
        return self.begin + self.period

    @property
    def turns(self) -> float:
        return (self.end - self.begin) / self.period


def find_loop(tokens: Sequence[int]) -> Loop | None:
    """The first loop of a list of text tokens (without time tokens, which differ from turn to turn); None if there is none.

    A loop says the same tokens at least `TURNS` times in a row, with at least `SURPLUS` tokens beyond the first turn:
    three turns of five tokens or more, six of two, eleven of one. Of several that begin together it is the one of the
    shortest turn.
    """
    array = np.asarray(tokens)
    found: Loop | None = None
    for period in range(1, min(LONGEST_TURN, len(array) // TURNS) + 1):
        surplus = max(SURPLUS, (TURNS - 1) * period)
        same = np.concatenate(([False], array[period:] == array[:-period], [False]))
        edges = np.flatnonzero(np.diff(same.astype(np.int8)))
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if end - begin >= surplus:
                if found is None or begin < found.begin:
                    found = Loop(begin, period, end + period)
                break
    return found


def loops_at_end(tokens: Sequence[int]) -> bool:
    """Whether the tokens end in a loop as `find_loop` finds them: for every step of decoding, in microseconds."""
    length = len(tokens)
    for period in range(1, min(LONGEST_TURN, length // TURNS) + 1):
        if tokens[-1] != tokens[-1 - period]:
            continue
        surplus = max(SURPLUS, (TURNS - 1) * period)
        if surplus + period <= length and all(tokens[-k] == tokens[-k - period] for k in range(1, surplus + 1)):
            return True
    return False
