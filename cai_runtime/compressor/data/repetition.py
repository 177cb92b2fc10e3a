"""Measures of repetition in a text, to detect loops and to judge sampled text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WINDOW = 128  # tokens checked: several periods of the usual loops, which are a sentence or two long
GRAM = 4
DISTINCT = 0.6  # threshold: prose, lists and code stay above 0.8; a loop of period p has p / WINDOW


def distinct_share(tokens: Sequence[int], n: int = GRAM) -> float:
    """Distinct n-grams over all n-grams of a text, in (0, 1] (Li et al. 2016, "distinct-n"); 1 without n-grams."""
    count = len(tokens) - n + 1
    return len(set(zip(*(tokens[k:] for k in range(n)), strict=False))) / count if count > 0 else 1.0


def loops(tokens: Sequence[int]) -> bool:
    """Whether the last `WINDOW` tokens are a loop: `distinct_share` below `DISTINCT`. False for a shorter text."""
    return len(tokens) >= WINDOW and distinct_share(tokens[-WINDOW:]) < DISTINCT


def repeated_share(texts: Iterable[Sequence[int]], n: int = 8) -> float:
    """Share of n-grams that occurred before, in the same or an earlier text; 0: all are new."""
    seen: set[tuple[int, ...]] = set()
    count = 0
    for tokens in texts:
        grams = list(zip(*(tokens[k:] for k in range(n)), strict=False))
        count += len(grams)
        seen.update(grams)
    return 1 - len(seen) / count if count else 0.0
