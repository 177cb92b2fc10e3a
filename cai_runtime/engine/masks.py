"""Which tokens may come next: the seam for grammars, timestamp rules and the like.

A mask is one step's logits processor among others: its bans and those of logit_bias and min_tokens hold together, in any
order, and come before the temperature (step 4 of kernels/sampling.py). Log probabilities are of the logits without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np

from cai_runtime.errors import GrammarError

ALL = np.uint32(0xFFFFFFFF)


class TokenMask(Protocol):
    """The allowed next tokens of one sequence. Lies beside its `Output`; called by one thread at a time.

    name: what errors call it, such as the parameter that it came from. A mask whose class has a function
    `fill_all(masks, rows)` fills the rows of a step in one call: masks is a list of (mask, row number), rows uint32
    [n, words], all set; it returns the errors by row number.
    """

    name: str

    def fill(self, row: np.ndarray) -> bool:
        """Clear the bits of the tokens that may not come next. `row`: uint32 [ceil(vocabulary / 32)], all set; token t is
        bit t % 32 of word t // 32. False: every token is allowed, and `row` was left as it is."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on by a token, which `fill` allowed and which does not end the text."""
        ...

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens: those of a draft that was not taken."""
        ...


MaskFactory = Callable[[Collection[int]], TokenMask]
"""Makes a sequence's mask. Its argument: the tokens that end the text, to be allowed wherever the text may end."""


class MaskedRow:
    """Where a sequence's mask goes: its first row of a step. Behind each token of its draft follows another row."""

    __slots__ = ("draft", "ends", "mask", "row")

    def __init__(self, row: int, mask: TokenMask, draft: Sequence[int], ends: Collection[int]):
        self.row, self.mask, self.draft, self.ends = row, mask, draft, ends


def fill_masks(masked: Sequence[MaskedRow], count: int, vocab_size: int) -> tuple[np.ndarray, dict[int, Exception]]:
    """The masks of a step of `count` rows: uint32 [count, ceil(vocab_size / 32)], all set where a row has none; and the
    errors by row number. All masks are left as they were."""
    rows = np.full((count, -(-vocab_size // 32)), ALL, np.uint32)
    errors: dict[int, Exception] = {}
    together: dict[Any, list[tuple[TokenMask, int]]] = {}
    for place in masked:
        fill_all = None if place.draft else getattr(type(place.mask), "fill_all", None)
        if fill_all is not None:
            together.setdefault(fill_all, []).append((place.mask, place.row))
        else:
            _fill_drafted(place, rows, errors)
    for fill_all, masks in together.items():
        try:
            errors.update(fill_all(masks, rows))
        except Exception as error:  # noqa: BLE001 - fails the sequences that have masks, not the engine
            errors.update((row, error) for _, row in masks)
    return rows, errors


def _fill_drafted(place: MaskedRow, rows: np.ndarray, errors: dict[int, Exception]) -> None:
    """Fill the row behind the text and those behind the draft, as far as the mask allows that. A draft is cut there anyway,
    for another token is sampled in the place of the one that is not allowed: what the rows behind hold does not matter."""
    mask, draft, taken = place.mask, place.draft, 0
    try:
        for row in range(place.row, place.row + len(draft) + 1):
            mask.fill(rows[row])
            if taken == len(draft) or draft[taken] in place.ends or not allows(rows[row], draft[taken]):
                break
            mask.accept(draft[taken])
            taken += 1
    except Exception as error:  # noqa: BLE001 - of this sequence alone
        errors[place.row + taken] = error
    finally:
        if taken:
            mask.rollback(taken)


def allows(row: np.ndarray, token_id: int) -> bool:
    """Whether the bit of a token is set."""
    return bool(int(row[token_id >> 5]) >> (token_id & 31) & 1)


def dead_end(mask: TokenMask, position: int) -> GrammarError:
    """The error of a row in which no token is left."""
    return GrammarError(
        f"no token is allowed at position {position}: '{mask.name}' leaves none beside the bans of logit_bias, "
        "min_tokens and ignore_eos; loosen one of them",
        param=mask.name,
    )
