"""A request with beam search: several sequences, one for each live text, which share the pages of what they have in common.

The first of them, the leader, is the one that was submitted; it is live as long as the request is. A step gives each live
text its row. When all rows are there, the search chooses, and the sequences become the new texts: one that is followed once
goes on in its place, one that is followed several times is forked, one that is not followed is dropped.

Nothing is put out before the end. So a group that loses its pages drops everything and begins at its prompt again: the
search is deterministic, and its result the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cai_runtime.engine.beam_search import BeamSearch, Row, Search
from cai_runtime.engine.cache import Held
from cai_runtime.engine.sampling import SequenceSampler
from cai_runtime.kernels.sampling import NEUTRAL, NO_TABLES, LogitsProcessor, RowTables, Sampled

if TYPE_CHECKING:
    from cai_runtime.engine.scheduler import Scheduler
    from cai_runtime.engine.sequence import Sequence
    from cai_runtime.engine.stats import EngineStats

_CONTENT = ("token_ids", "num_computed", "seat", "held", "sampler")  # what makes a sequence the one of its text


class BeamSampler:
    """The row of a text in a search: the likeliest tokens by the logits after all that the request does to them, which are
    its rules, penalties, biases and bans. sampler: knows them. k: tokens."""

    row_bytes = NEUTRAL.copy().view(np.uint8).data
    tables = NO_TABLES
    wants_more = True
    scored = -1
    is_ahead = False

    def __init__(self, sampler: SequenceSampler, k: int):
        self._sampler, self.logprobs = sampler, k

    def tables_after(self, drafted: Items[int]) -> RowTables:
        return self.tables

    def processor_after(self, drafted: Items[int]) -> LogitsProcessor | None:
        rules, tables = self._sampler.processor_after(drafted), self._sampler.tables
        if not len(tables.penalty_tokens) and not len(tables.biases):
            return rules
        return partial(_process, rules, self._sampler.row[0].copy(), tables)

    def observe(self, token_id: int) -> None:
        self._sampler.observe(token_id)

    def fork(self) -> BeamSampler:
        return BeamSampler(self._sampler.fork(), self.logprobs)


def _process(rules: LogitsProcessor | None, numbers: np.void, tables: RowTables, row: np.ndarray) -> None:
    from cai_runtime.kernels.sampling_reference import processed_logits

    if rules is not None:
        rules(row)
    row[:] = processed_logits(row, numbers, tables, None)


class BeamGroup:
    """The sequences of one request with beam search.

    members: of the live texts, in the search's order. idle: seats of the group that no member has.
    """

    def __init__(self, leader: Sequence, beam: BeamSearch):
        self.leader, self.width = leader, beam.width
        self.members, self.idle = [leader], list[int]()
        params = leader.request.sampling
        self._make_search = partial(Search, beam, leader.ends, params.max_tokens, params.logprobs or 0)
        self._search = self._make_search()
        self._sampler = self._sampler_of(leader).fork()  # as it is before the first token
        self._rows: dict[Sequence, Row] = {}

    @staticmethod
    def _sampler_of(member: Sequence) -> BeamSampler:
        assert isinstance(member.sampler, BeamSampler)
        return member.sampler

    @property
    def is_ready(self) -> bool:
        """Whether each live text has its row."""
        return len(self._rows) == len(self.members)

    def take(self, member: Sequence, rows: list[int | Exception], found: Sampled | None, at: int) -> Exception | None:
        """Take what a step has for a member: no row for a part of a prompt, else one, which is row `at` of `found`. Returns
        its error."""
        member.held.copies = []  # they came before this pass, which went through
        if not rows:
            return None
        if isinstance(rows[0], Exception):
            return rows[0]
        assert found is not None and found.top is not None
        k = self._sampler.logprobs
        self._rows[member] = found.top[0][at, :k].tolist(), found.top[1][at, :k].tolist()
        return None

    def choose(self) -> list[int] | None:
        """Take a step of the search, once all rows are there. Returns which member each new live text follows; None when
        the search is over."""
        rows = [self._rows[member] for member in self.members]
        self._rows = {}
        return self._search.step(rows)

    def lead(self, member: int) -> None:
        """Make the leader the sequence of the text of this member, whose sequence gets the leader's text."""
        at, leader, other = self.members.index(self.leader), self.leader, self.members[member]
        for name in _CONTENT:
            mine, theirs = getattr(leader, name), getattr(other, name)
            setattr(leader, name, theirs)
            setattr(other, name, mine)
        self.members[at], self.members[member] = other, leader

    def branch(self, parent: Sequence) -> Sequence:
        """A sequence of the same text, which holds nothing yet but a seat of the group."""
        child = copy.copy(parent)
        child.token_ids, child.held = list(parent.token_ids), Held()
        child.sampler, child.seat = self._sampler_of(parent).fork(), self.idle.pop()
        return child

    def follow(self) -> None:
        """Add to each member the token that makes it its new text."""
        for member, path in zip(self.members, self._search.live, strict=True):
            assert path.logprobs is not None
            member.append(path.logprobs.token_id)

    def finish(self) -> None:
        """Make the winner the leader's text, of which nothing was put out yet."""
        leader, steps = self.leader, self._search.winner().steps()
        leader.token_ids[leader.num_prompt :] = [step.token_id for step in steps]
        leader.logprobs = steps
        # Whatever its output makes of the tokens, none follows them.
        sampling = replace(leader.request.sampling, max_tokens=len(steps))
        leader.request = replace(leader.request, sampling=sampling)

    def restart(self) -> None:
        """Go back to the prompt, once the leader is the only member and holds nothing."""
        leader = self.leader
        del leader.token_ids[leader.num_prompt :]
        leader.held, leader.sampler = Held(), self._sampler.fork()
        self._search, self._rows = self._make_search(), {}


def search_on(scheduler: Scheduler, stats: EngineStats, now: float, put_out: Callable[[Sequence, float], None]) -> None:
    """Take a step of each beam search whose rows are all there. put_out: called with the leader of one that is over."""
    for group in [group for group in scheduler.groups if group.is_ready]:
        if not group.is_ready:  # it was preempted for the pages of one before it
            continue
        leader = group.leader
        for member in group.members:
            scheduler.commit(member)
        if leader.last_token_at is None:
            leader.first_token_at = now
        else:
            stats.worst_token_gap = max(stats.worst_token_gap, now - leader.last_token_at)
        leader.last_token_at = now
        parents = group.choose()
        if parents is None:
            group.finish()
            put_out(leader, now)
        elif scheduler.regroup(group, parents):
            group.follow()
