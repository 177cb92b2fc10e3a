"""What moves between the scheduler, which thinks in tokens and pages, and a runner, which thinks in tensors.

A runner keeps a persistent batch of seats. A running sequence has a seat; its page tables lie there and change by what a
step names alone, so that a step costs as much as it changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

NEXT = -1  # in `Feed.ids`: the token that the seat sampled last, which may still be on the device


@dataclass(slots=True)
class HiddenRows:
    """Hidden states, after the last norm, of the last `count` tokens of a feed, at least one. rows: fp32 [count, hidden], a
    tensor on the runner's device, once the pass is done; the runner sets it."""

    count: int
    rows: Any = None


@dataclass(slots=True)
class AttentionRows:
    """Cross-attention weights of the last `count` tokens of a feed, at least one.

    heads: (layer, head) pairs. weights: fp32 [heads, count, rows], a numpy array, once the pass is done; the runner sets it.
    rows: of the encoder's output, over which the weights are a softmax."""

    heads: tuple[tuple[int, int], ...]
    count: int
    weights: Any = None


@dataclass(slots=True)  # not frozen: one is made for each sequence in each step
class Feed:
    """One sequence's tokens in a step: a chunk of its prompt, its newest token, or that and a draft of the next ones."""

    seat: int
    start: int  # absolute position of ids[0]; positions before it are already in the cache
    ids: list[int]  # tokens, at least one; `NEXT` where the runner is `ahead`
    wanted: int  # logits of the last so many tokens: 0 for a chunk, 1 to decode, 1 + n with n drafted tokens
    inputs: tuple[Any, ...] = ()  # rows given in place of embeddings
    hidden: HiddenRows | None = None  # wanted beside logits, of runners that are able
    attention: AttentionRows | None = None  # likewise


@dataclass(slots=True)
class NewPages:
    """A change of a seat's page table: from entry `at` on it holds `pages`. Entries after them are as before."""

    seat: int
    group: str
    at: int
    pages: list[int]


@dataclass(slots=True)
class Step:
    """One pass of the model. Page changes come first, then copies and encoder passes, then the feeds.

    Writing the same change twice is harmless: a step that failed is tried again with all pages of its sequences.
    """

    feeds: list[Feed]
    pages: list[NewPages] = field(default_factory=list)
    copies: list[Any] = field(default_factory=list)
    encode: list[Any] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows of logits that are wanted."""
        return sum(feed.wanted for feed in self.feeds)


@dataclass(slots=True)
class ScheduledSequence:
    """One sequence of a step that is run at once, for callers and runners that keep no seats.

    `pages` are the physical page ids of the whole sequence so far, position p living in pages[p // page_size]; they
    cover at least `start + len(token_ids)` positions.
    """

    token_ids: list[int]  # the tokens fed in this step, at least one
    start: int  # absolute position of token_ids[0]; positions before it are already in the cache
    pages: list[int]
    wanted: int  # logits of the last so many tokens


def seated(sequences: Iterable[ScheduledSequence], groups: Mapping[str, tuple[int, int]]) -> Step:
    """The same as a `Step` of the first seats, with all pages.

    groups: (n, i) of each cache group, the i-th of n that share a pool: it has page p of a sequence as page p * n + i."""
    step = Step([])
    for seat, s in enumerate(sequences):
        step.feeds.append(Feed(seat, s.start, s.token_ids, int(s.wanted)))
        for name, (n, i) in groups.items():
            pages = s.pages if n == 1 else [page * n + i for page in s.pages]
            step.pages.append(NewPages(seat, name, 0, pages))
    return step
