"""Which tokens of which sequences go into the next step. Continuous batching with chunked prefill.

First come, first served: `running` and `waiting` are ordered by arrival. Every running sequence that decodes takes
part in every step; prompts share a budget of tokens a step, oldest first. A sequence gets the pages of its whole
prompt when it is admitted, and one more whenever it grows over a page. When none is left, the youngest running sequence
gives its pages up and waits to be computed again (preemption by recompute). So the oldest always advances, and nothing
starves.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from cai_runtime.engine.kv_cache import KVCache, extend_digests
from cai_runtime.engine.sequence import Sequence
from cai_runtime.engine.stats import EngineStats
from cai_runtime.engine.step import Feed

logger = logging.getLogger("cai_runtime.engine")


@dataclass(eq=False, slots=True)  # not frozen: thousands are made in a second, and that would take twice the time
class Planned:
    """One sequence's part of a step: what is fed, and how many drafted tokens come last in it."""

    sequence: Sequence
    feed: Feed
    draft: list[int]
    is_decode: bool  # the newest generated token, and no part of a prompt or of a recomputation

    @classmethod
    def of(cls, sequence: Sequence, count: int, draft: list[int] | None = None) -> Planned:
        """The next `count` uncomputed tokens of a sequence; behind the last known one, a draft of what may follow it."""
        start, known = sequence.num_computed, len(sequence.token_ids)
        end, draft = start + count, draft or []
        feed = Feed(sequence.seat, start, sequence.token_ids[start:end] + draft, 1 + len(draft) if end == known else 0)
        return cls(sequence, feed, draft, count == 1 and end == known > sequence.num_prompt)


class Scheduler:
    """Sequences and their pages. Used by the owner thread only."""

    def __init__(
        self,
        cache: KVCache,
        stats: EngineStats,
        *,
        max_batch: int,
        draft: Callable[[Sequence], list[int]] | None = None,
    ):
        """draft: see `proposers.checked_draft`."""
        self.cache = cache
        self._draft = draft
        self.stats = stats
        self.max_batch = max_batch
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.newly_admitted: list[Sequence] = []  # for the first time; the step loop empties it
        self._free_seats = list(range(max_batch - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def is_decoding(self) -> bool:
        """Whether a sequence of the batch waits for its next token alone."""
        return any(sequence.num_uncomputed == 1 for sequence in self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. That it fits the whole cache has been checked."""
        insort(self.waiting, sequence, key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and free its pages."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._take_pages(sequence)

    def schedule(self, budget: int) -> list[Planned]:
        """The next step, with at most `budget` prompt tokens, at least one: never empty while there is work."""
        step, preempted = [], False
        page_size = self.cache.page_size
        for sequence in list(self.running):  # oldest first, so that nobody in `step` is preempted any more
            known = len(sequence.token_ids)
            while sequence.pages and known > len(sequence.pages) * page_size and not self._grow(sequence):
                self._preempt(self.running[-1])
                preempted = True
            if not sequence.pages:
                continue
            count = known - sequence.num_computed
            if count > 1:
                count = min(count, budget)
                budget -= count
            if count:
                draft = self._affordable_draft(sequence) if count == 1 and known > sequence.num_prompt else None
                step.append(Planned.of(sequence, count, draft))
        if not preempted:
            self._admit(step, budget)
        return step

    def _admit(self, step: list[Planned], budget: int) -> None:
        """Move waiting sequences into the batch while there are seats, pages and budget."""
        being_computed = self._prefixes_being_computed() if self.waiting else set()
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_batch:
                return
            prefix = self._find_prefix(sequence)
            if len(prefix) < self._max_prefix(sequence) and sequence.digests[len(prefix)] in being_computed:
                continue  # it can share that page in a few steps; computing it twice would be waste
            needed = self.cache.pages_for(len(sequence.token_ids)) - len(prefix)
            # One spare page for each running sequence, so that the newcomer is not preempted right away.
            if needed + len(self.running) > self.cache.num_available - self.cache.num_unused(prefix):
                return
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_arrival)
            sequence.seat = self._free_seats.pop()
            self.cache.share(prefix)
            sequence.pages = prefix + self.cache.allocate(needed)
            sequence.num_registered = len(prefix)
            sequence.num_computed = len(prefix) * self.cache.page_size
            if not sequence.was_admitted:
                sequence.was_admitted = True
                self.newly_admitted.append(sequence)
                sequence.log.cached_tokens = sequence.num_computed
                self.stats.prompt_tokens += sequence.num_prompt
                self.stats.prefix_hit_tokens += sequence.num_computed
            count = min(sequence.num_uncomputed, budget)
            budget -= count
            step.append(Planned.of(sequence, count))
            being_computed.update(sequence.digests[len(prefix) :])

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Cached pages that the sequence can start from. The last token is always fed, for its logits."""
        if not self.cache.prefix_cache:
            return []
        if not sequence.digests:
            extend_digests(sequence.prompt_digests, sequence.request.prompt_ids, self.cache.page_size)
            sequence.digests = list(sequence.prompt_digests)
        extend_digests(sequence.digests, sequence.token_ids, self.cache.page_size)
        return self.cache.find_prefix(sequence.digests[: self._max_prefix(sequence)])

    def _max_prefix(self, sequence: Sequence) -> int:
        """Pages that a sequence could share at best."""
        return (len(sequence.token_ids) - 1) // self.cache.page_size if self.cache.prefix_cache else 0

    def _prefixes_being_computed(self) -> set[bytes]:
        return {digest for sequence in self.running for digest in sequence.digests[sequence.num_registered :]}

    def _affordable_draft(self, sequence: Sequence) -> list[int]:
        """A draft of what follows a decoding sequence, cut to its pages when none is left: nobody is preempted for it."""
        draft = self._draft(sequence) if self._draft is not None else []
        if draft and not self._grow(sequence, len(draft)):
            del draft[len(sequence.pages) * self.cache.page_size - len(sequence.token_ids) :]
        return draft

    def _grow(self, sequence: Sequence, drafted: int = 0) -> bool:
        """Make sure that the sequence's pages cover all its tokens and a draft; False when no page is left."""
        missing = self.cache.pages_for(len(sequence.token_ids) + drafted) - len(sequence.pages)
        if missing <= 0:
            return True
        if missing > self.cache.num_available:
            return False
        sequence.pages += self.cache.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.stats.preemptions += 1
        logger.info(
            "no page is left: request %s is preempted after %d tokens",
            sequence.request.request_id,
            sequence.num_computed,
        )
        self.running.remove(sequence)
        self._take_pages(sequence)
        self.add(sequence)

    def _take_pages(self, sequence: Sequence) -> None:
        self.cache.release(sequence.pages)
        sequence.pages = []
        if sequence.seat >= 0:
            self._free_seats.append(sequence.seat)
            sequence.seat, sequence.num_told = -1, 0
        sequence.num_computed = sequence.num_registered = 0

    def advance(self, planned: Planned, taken: int = 0) -> None:
        """Note that a feed was computed. taken: tokens that were sampled after it and became part of the text; a drafted
        token counts as computed when the one behind it was taken."""
        count = len(planned.feed.ids)
        if planned.draft:
            count += max(taken, 1) - 1 - len(planned.draft)
        if not planned.is_decode:
            self.stats.tokens_prefilled += count
        planned.sequence.num_computed += count
        if planned.draft:
            self._take_back(planned.sequence)

    def _take_back(self, sequence: Sequence) -> None:
        """Free the pages that only tokens of a draft would have needed."""
        needed = self.cache.pages_for(len(sequence.token_ids))
        self.cache.release(sequence.pages[needed:])
        del sequence.pages[needed:]
        sequence.num_told = min(sequence.num_told, needed)

    def commit(self, sequence: Sequence) -> None:
        """Offer the pages that a sequence has filled to others. Call once logits that follow them are known to be finite:
        whatever is wrong in a page of a sequence reaches all its later logits."""
        page_size = self.cache.page_size
        if sequence.num_computed < (sequence.num_registered + 1) * page_size or not self.cache.prefix_cache:
            return
        extend_digests(sequence.digests, sequence.token_ids, page_size)
        for page in range(sequence.num_registered, sequence.num_computed // page_size):
            self.cache.register(sequence.pages[page], sequence.digests[page])
            sequence.num_registered += 1

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages and queues agree."""
        self.cache.check_integrity([sequence.pages for sequence in self.running])
        for sequence in self.waiting:
            if sequence.pages or sequence.num_computed:
                raise AssertionError(f"waiting sequence {sequence.arrival} holds pages")
        seats = [*self._free_seats, *(sequence.seat for sequence in self.running)]
        if sorted(seats) != list(range(self.max_batch)):
            raise AssertionError(f"seats are free or taken twice, or lost: {seats}")
        for queue in (self.running, self.waiting):
            if [s.arrival for s in queue] != sorted(s.arrival for s in queue):
                raise AssertionError("a queue is out of order")


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
