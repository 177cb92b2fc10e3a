"""Which tokens of which sequences go into the next step. Continuous batching with chunked prefill.

First come, first served: `running` and `waiting` are ordered by arrival. Every running sequence that decodes takes
part in every step; prompts share a budget of tokens a step, oldest first. The rows of an encoder's output count as tokens
of the prompt that they belong to; they are computed in one pass, which may exceed the budget of a step that feeds no other
prompt. A request with beam search has a seat for each of its texts from the beginning. A sequence gets the pages of its
whole prompt when it is admitted, and one more whenever it grows over a page. When none is left, the youngest running
sequence gives its pages up and waits to be computed again (preemption by recompute). So the oldest always advances, and
nothing starves.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from cai_runtime.engine.beams import BeamGroup
from cai_runtime.engine.cache import CacheManager
from cai_runtime.engine.sequence import Sequence
from cai_runtime.engine.stats import EngineStats
from cai_runtime.engine.step import NEXT, Feed

# Rows of logits of prompts in a step, of all sequences that want logprobs of their prompt: a prompt's would need gigabytes
# at a large vocabulary.
SCORED_ROWS = 256

logger = logging.getLogger("cai_runtime.engine")


@dataclass(eq=False, slots=True)  # not frozen: thousands are made in a second, and that would take twice the time
class Planned:
    """One sequence's part of a step: what is fed, and which drafted tokens come last in it. scored: how many of the wanted
    rows, the first ones, say logprobs of the prompt. at_end: whether the feed reaches the end of what is known."""

    sequence: Sequence
    feed: Feed
    draft: list[int] | tuple[int, ...]
    is_decode: bool  # the newest generated token, and no part of a prompt or of a recomputation
    scored: int = 0
    at_end: bool = True

    @classmethod
    def decode(cls, sequence: Sequence, start: int, token_id: int) -> Planned:
        """The newest token at its position, without a draft: nearly every part of nearly every step."""
        return cls(sequence, Feed(sequence.seat, start, [token_id], 1), (), True)

    @classmethod
    def of(cls, sequence: Sequence, count: int, draft: list[int] | None = None) -> Planned:
        """The next `count` uncomputed tokens of a sequence; behind the last known one, a draft of what may follow it."""
        start, known = sequence.num_computed, len(sequence.token_ids)
        end, draft = start + count, draft or []
        inputs = tuple(found for rows in sequence.prompt.given if (found := rows.within(start, end)) is not None)
        ids, wanted = sequence.token_ids[start:end] + draft, 1 + len(draft) if end == known else 0
        if sequence.pool is not None:
            feed = Feed(sequence.seat, start, ids, 0, inputs, sequence.pool.wanted(start, end))
            return cls(sequence, feed, (), False, at_end=end == known)
        scored = sequence.rows_to_score(start, end)
        feed = Feed(sequence.seat, start, ids, scored + wanted, inputs)
        if sequence.aligner is not None:
            feed.attention = sequence.aligner.wanted(start, end)
        return cls(sequence, feed, draft, count == 1 and end == known > sequence.num_prompt, scored, end == known)

    def known(self) -> Planned:
        """The same with its token in place of `NEXT`, once that has come."""
        if self.feed.ids == [NEXT]:
            self.feed.ids = [self.sequence.token_ids[self.feed.start]]
        return self


class Scheduler:
    """Sequences and their pages. Used by the owner thread only."""

    def __init__(
        self,
        cache: CacheManager,
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
        self.groups: list[BeamGroup] = []  # of running requests with beam search
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
        """Forget a sequence, finished or not, and free its pages; with beam search, all sequences of its request."""
        if sequence.beam is not None:
            sequence = self._disband(sequence.beam)
            sequence.beam = None  # which holds the sequence: a cycle, and what was encoded for it in it
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._take_pages(sequence)

    def schedule(self, budget: int) -> list[Planned]:
        """The next step, with at most `budget` prompt tokens, at least one: never empty while there is work."""
        step, preempted, rows, whole = [], False, SCORED_ROWS, budget
        for sequence in list(self.running):  # oldest first, so that nobody in `step` is preempted any more
            held = sequence.held
            if not held.by_group:
                continue
            known, start = len(sequence.token_ids), sequence.num_computed
            end = known
            if known - start > 1:
                most = min(budget, rows) if sequence.is_scoring else budget
                end = self.cache.chunk_end(start, known, most) if most > 0 else start
                budget -= end - start
                rows -= sequence.rows_to_score(start, end)
            if end == start:
                continue
            while held.by_group and not self.cache.grow(sequence, end):
                if self.cache.reclaim(self.running):
                    continue
                self._preempt(self.running[-1])
                preempted = True
            if not held.by_group:
                continue
            is_decode = known - start == 1 and known > sequence.num_prompt
            if is_decode and self._draft is None:
                step.append(Planned.decode(sequence, start, sequence.token_ids[-1]))
            else:
                draft = self._affordable_draft(sequence) if is_decode else None
                step.append(Planned.of(sequence, end - start, draft))
        if preempted:  # a group may have lost its pages for one of its last members
            return [planned for planned in step if planned.sequence.held.by_group]
        if self.waiting:
            self._admit(step, budget, rows, untouched=budget == whole)
        return step

    def schedule_ahead(self, under_way: list[Planned]) -> list[Planned]:
        """The step behind one that is under way, as far as it is known: each sequence goes on with the token that it is
        about to get. Empty where it depends on that token (penalties, logits processors), where a prompt or a draft is
        fed, where somebody could be admitted, where pages run short, or where a state's slots change with the step."""
        if self.cache.has_state or self._draft is not None or (self.waiting and self._free_seats):
            return []
        if len(under_way) != len(self.running):
            return []
        step = []
        for planned in under_way:
            sequence, known = planned.sequence, len(planned.sequence.token_ids)
            if planned.feed.wanted != 1 or not sequence.sampler.is_ahead:
                return []
            if sequence.num_generated + 1 >= sequence.request.sampling.max_tokens:
                continue
            if not self.cache.grow(sequence, known + 1):
                return []
            step.append(Planned.decode(sequence, known, NEXT))
        return step

    def _admit(self, step: list[Planned], budget: int, rows: int, *, untouched: bool) -> None:
        """Move waiting sequences into the batch while there are seats, pages and budget. rows: of prompts, that may still be
        wanted in the step. untouched: whether the step feeds no prompt yet."""
        being_computed = self._being_computed()
        for sequence in list(self.waiting):
            seats = 1 if sequence.beam is None else sequence.beam.width
            if budget <= 0 or len(self._free_seats) < seats:
                return
            if sequence.is_scoring and rows <= 0:
                continue
            most = min(budget, rows) if sequence.is_scoring else budget
            found = self.cache.find(sequence)
            if self.cache.waits_for(sequence, found, being_computed):
                continue  # it can share that in a few steps; computing it twice would be waste
            encoded = self.cache.rows_to_encode(sequence)
            if encoded > budget and not untouched:
                return
            # One spare page for each seat that is taken, so that the newcomer is not preempted right away.
            spare = self.max_batch - len(self._free_seats) + seats - 1 if self.running else 0
            admission = self.cache.admit(sequence, found, most, spare=spare)
            if admission is None and self.cache.reclaim(self.running):
                admission = self.cache.admit(sequence, found, most, spare=spare)
            if admission is None:
                return
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_arrival)
            sequence.seat = self._free_seats.pop()
            if sequence.beam is not None:
                sequence.beam.idle = [self._free_seats.pop() for _ in range(seats - 1)]
                self.groups.append(sequence.beam)
            sequence.num_computed = admission.start
            if not sequence.was_admitted:
                sequence.was_admitted = True
                self.newly_admitted.append(sequence)
                sequence.log.cached_tokens = sequence.num_computed
                self.stats.prompt_tokens += sequence.num_prompt
                self.stats.prefix_hit_tokens += sequence.num_computed
            count = admission.end - admission.start
            budget -= count + encoded
            untouched = False
            step.append(Planned.of(sequence, count))
            rows -= step[-1].scored
            being_computed.update(self.cache.being_computed(sequence))

    def _being_computed(self) -> set[bytes]:
        return {name for sequence in self.running for name in self.cache.being_computed(sequence)}

    def _affordable_draft(self, sequence: Sequence) -> list[int]:
        """A draft of what follows a decoding sequence, cut to its pages when none is left: nobody is preempted for it."""
        draft = self._draft(sequence) if self._draft is not None and sequence.beam is None else []
        known = len(sequence.token_ids)
        if draft and not self.cache.grow(sequence, known + len(draft)):
            del draft[sequence.held.room - known :]
        return draft

    def _preempt(self, sequence: Sequence) -> None:
        self.stats.preemptions += 1
        logger.info(
            "no page is left: request %s is preempted after %d tokens",
            sequence.request.request_id,
            sequence.num_computed,
        )
        if sequence.beam is not None:
            sequence = self._disband(sequence.beam)
        self.running.remove(sequence)
        self._take_pages(sequence)
        if sequence.beam is not None:
            sequence.beam.restart()
        self.add(sequence)

    def _take_pages(self, sequence: Sequence) -> None:
        self.cache.release(sequence)
        if sequence.seat >= 0:
            self._free_seats.append(sequence.seat)
            sequence.seat = -1
        sequence.num_computed = 0

    def regroup(self, group: BeamGroup, parents: list[int]) -> bool:
        """Make the members of a group those of its next texts, of which each follows the text of the member that `parents`
        has in its place. False: no page was left, and the group waits to begin again. Call it between two steps."""
        if group.members.index(group.leader) not in parents:
            group.lead(parents[0])
        before, followed = group.members, set(parents)
        for i, member in enumerate(before):
            if i not in followed:  # first of all: its pages may be needed
                self.running.remove(member)
                self.cache.release(member)
                group.idle.append(member.seat)
        group.members = [before[i] for i in followed]
        members: list[Sequence] = []
        for i in parents:
            if i in followed:
                followed.remove(i)
                members.append(before[i])
                continue
            child = self._fork(group, before[i])
            if child is None:
                return False
            group.members.append(child)
            members.append(child)
        group.members = members
        return True

    def _fork(self, group: BeamGroup, parent: Sequence) -> Sequence | None:
        """Another running sequence of the same text. None if the group itself had to be preempted."""
        child = group.branch(parent)
        while self.cache.fork(parent, child) is None:
            if self.cache.reclaim(self.running):
                continue
            if self.running[-1].beam is group:
                group.idle.append(child.seat)
                self._preempt(group.leader)
                return None
            self._preempt(self.running[-1])
        insort(self.running, child, key=_arrival)
        return child

    def _disband(self, group: BeamGroup) -> Sequence:
        """Drop all sequences of a group but the leader, which is returned, and free their seats."""
        for member in group.members:
            if member is not group.leader:
                self.running.remove(member)
                self._take_pages(member)
        self._free_seats += group.idle
        group.members, group.idle = [group.leader], []
        if group in self.groups:
            self.groups.remove(group)
        return group.leader

    def advance(self, planned: Planned, taken: int = 0) -> None:
        """Note that a feed was computed. taken: tokens that were sampled after it and became part of the text; a drafted
        token counts as computed when the one behind it was taken."""
        if (
            planned.is_decode and not planned.draft and self.cache.is_plain
        ):  # nearly always, and then nothing else changes
            planned.sequence.num_computed += 1
            return
        fed = kept = len(planned.feed.ids)
        if planned.draft:
            kept += max(taken, 1) - 1 - len(planned.draft)
        if not planned.is_decode:
            self.stats.tokens_prefilled += kept
        planned.sequence.num_computed += self.cache.advance(planned.sequence, fed, kept)
        if planned.draft:
            self.cache.take_back(planned.sequence)

    def commit(self, sequence: Sequence) -> None:
        """Offer what a sequence has computed to others. Call once logits that follow it are known to be finite."""
        self.cache.commit(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages and queues agree."""
        self.cache.check_integrity(self.running)
        for sequence in self.waiting:
            if sequence.held or sequence.num_computed:
                raise AssertionError(f"waiting sequence {sequence.arrival} holds pages")
        seats = [*self._free_seats, *(sequence.seat for sequence in self.running)]
        for group in self.groups:
            seats += group.idle
            if len(group.members) + len(group.idle) != group.width or group.leader not in group.members:
                raise AssertionError(f"a group of width {group.width} has {len(group.members)} members")
        searching = [sequence for sequence in self.running if sequence.beam is not None]
        if sorted(map(id, searching)) != sorted(id(member) for group in self.groups for member in group.members):
            raise AssertionError("groups and running sequences disagree")
        if sorted(seats) != list(range(self.max_batch)):
            raise AssertionError(f"seats are free or taken twice, or lost: {seats}")
        for queue in (self.running, self.waiting):
            if [s.arrival for s in queue] != sorted(s.arrival for s in queue):
                raise AssertionError("a queue is out of order")


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
