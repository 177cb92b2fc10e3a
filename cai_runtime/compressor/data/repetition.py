"""How much a text repeats itself: to end a document that has fallen into a loop, and to judge sampled text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WINDOW = 128  # tokens looked at: several rounds of the loops that small models fall into, a sentence or two each
GRAM = 4
DISTINCT = 0.6  # prose, lists and code keep above 0.8; a loop of p tokens has p / WINDOW


def distinct_share(tokens: Sequence[int], n: int = GRAM) -> float:
    """Distinct n-grams of a text over all its n-grams, in (0, 1] (Li et al. 2016, "distinct-n"); 1 where there is none."""
    count = len(tokens) - n + 1
    return len(set(zip(*(tokens[k:] for k in range(n)), strict=False))) / count if count > 0 else 1.0


def loops(tokens: Sequence[int]) -> bool:
    """Whether the last `WINDOW` tokens say the same few things again and again. False for a shorter text."""
    return len(tokens) >= WINDOW and distinct_share(tokens[-WINDOW:]) < DISTINCT


def repeated_share(texts: Iterable[Sequence[int]], n: int = 8) -> float:
    """Share of the n-grams of all texts together that stood before, in the same text or another: 0 is all new."""
    seen: set[tuple[int, ...]] = set()
    count = 0
    for tokens in texts:
        grams = list(zip(*(tokens[k:] for k in range(n)), strict=False))
        count += len(grams)
        seen.update(grams)
    return 1 - len(seen) / count if count else 0.0
