"""Closes a thought that has used up its tokens: a mask that then allows the token of its end alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cai_runtime.engine.masks import MaskFactory, TokenMask, allows


@dataclass(frozen=True)
class ThoughtBudget:
    """How many tokens all thoughts of an answer may have together.

    begin: the tokens that open a thought; empty where the model can't. end: the token that closes it. others: tokens that
    end it as well, such as a call's opener. open: whether the prompt has opened one.
    """

    tokens: int
    begin: tuple[int, ...]
    end: int
    others: frozenset[int] = frozenset()
    open: bool = False

    def mask(self, inner: MaskFactory | None = None) -> MaskFactory:
        """Makes the masks. inner: of the answer's grammar, which holds beside."""
        return lambda ends: BudgetMask(self, None if inner is None else inner(ends))


class BudgetMask:
    """See `TokenMask`."""

    def __init__(self, budget: ThoughtBudget, inner: TokenMask | None):
        self.name = "reasoning_max_tokens" if inner is None else inner.name
        self._budget, self._inner = budget, inner
        self._tokens: list[int] = []  # accepted
        self._states: list[tuple[bool, int]] = [(budget.open, 0)]  # in a thought, its tokens so far: before each token

    def fill(self, row: np.ndarray) -> bool:
        inside, spent = self._states[-1]
        held = self._inner.fill(row) if self._inner is not None else False
        # A grammar takes no end in the middle of a character, which is finished first.
        if inside and spent >= self._budget.tokens and (not held or allows(row, self._budget.end)):
            row.fill(0)
            row[self._budget.end >> 5] = np.uint32(1 << (self._budget.end & 31))
            return True
        return held

    def accept(self, token_id: int) -> None:
        if self._inner is not None:
            self._inner.accept(token_id)
        self._tokens.append(token_id)
        inside, spent = self._states[-1]
        if inside:
            ends = token_id == self._budget.end or token_id in self._budget.others
            self._states.append((False, spent) if ends else (True, spent + 1))
        else:
            begin = self._budget.begin
            begins = bool(begin) and tuple(self._tokens[-len(begin) :]) == begin
            self._states.append((begins, spent))

    def rollback(self, count: int) -> None:
        if self._inner is not None:
            self._inner.rollback(count)
        del self._tokens[len(self._tokens) - count :], self._states[len(self._states) - count :]


def budgeted(budget: ThoughtBudget | None, mask: MaskFactory | None) -> MaskFactory | None:
    """The mask of an answer with a budget, if it has one."""
    return mask if budget is None else budget.mask(mask)
