"""The caches of all sequences: one manager over the groups that the model declares. Bookkeeping only: the tensors are the
runner's.

Every group has a layout, which knows what a sequence holds of it. The manager asks all of them: a prefix is reused where
every group has it, and a sequence is admitted where every group has room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from cai_runtime.engine.cache_groups import largest_align
from cai_runtime.engine.cache_layouts import EncoderLayout, Layout, PageCopy, layout_of
from cai_runtime.engine.pages import PageBook, extend_digests
from cai_runtime.engine.segments import EncoderInput
from cai_runtime.engine.step import NewPages
from cai_runtime.kernels.cache_groups import CacheGroup, pools

if TYPE_CHECKING:
    from cai_runtime.engine.sequence import Sequence as EngineSequence


@dataclass(frozen=True, slots=True)
class EncoderPass:
    """An encoder's pass: its output goes to the pages that `group` has at `seat`."""

    seat: int
    group: str
    input: EncoderInput


@dataclass(eq=False)
class Held:
    """What a sequence holds of every group, and the names of its pages."""

    by_group: dict[str, Any] = field(default_factory=dict)  # empty while it waits
    digests: list[bytes] = field(default_factory=list)  # of the full pages of its tokens
    num_registered: int = 0  # pages offered to others
    room: int = 0  # positions that the pages of every group cover
    is_changed: bool = False  # the runner does not know all of the page tables
    copies: list[PageCopy] = field(default_factory=list)  # of a fork, before its first pass

    def __bool__(self) -> bool:
        return bool(self.by_group)


@dataclass(frozen=True, slots=True)
class Admission:
    """start: positions whose content was found. end: where the first chunk ends."""

    start: int
    end: int


class CacheManager:
    """Who holds which page of which group.

    counts: pages of each group, one number for groups of one pool. prefix_cache: whether anything is kept for reuse.
    Raises ValueError for groups that don't fit together.
    """

    def __init__(self, groups: Sequence[CacheGroup], counts: Mapping[str, int], *, prefix_cache: bool = True):
        sizes = {group.page_size for group in groups if group.kind in ("pages", "window")} or {groups[0].page_size}
        if len(sizes) > 1:
            raise ValueError(f"the groups' pages have different sizes, {sorted(sizes)}: give all of them one")
        self.groups = tuple(groups)
        self.page_size = sizes.pop()
        self.align = largest_align(groups)
        if any(self.align % group.align for group in groups) or (self.align > 1 and self.align % self.page_size):
            raise ValueError("the groups' aligns must divide the largest one, and page_size must divide them")
        self._books: list[PageBook] = []
        self._layouts: dict[str, Layout] = {}
        for pool in pools(groups):
            if len({counts[group.name] for group in pool}) > 1:
                raise ValueError(f"the groups {[group.name for group in pool]} share a pool, but their counts differ")
            # Of an encoder's output whatever was encoded lately is worth keeping, not everything that was ever encoded.
            self._books.append(PageBook(counts[pool[0].name], lean=pool[0].kind == "encoder"))
            for group in pool:
                self._layouts[group.name] = layout_of(group, self._books[-1])
        layouts = self._layouts.values()
        self._windows = [layout for layout in layouts if layout.group.kind == "window"]
        self._encoders = [layout for layout in layouts if isinstance(layout, EncoderLayout)]
        self.has_state = any(group.kind == "state" for group in groups)
        self.is_plain = all(group.kind == "pages" for group in groups)
        self.prefix_cache = prefix_cache
        self._reuses = prefix_cache and all(group.reuse != "none" for group in groups)

    @property
    def num_pages(self) -> int:
        return sum(book.num_pages for book in self._books)

    @property
    def num_free(self) -> int:
        return sum(book.num_free for book in self._books)

    @property
    def num_cached(self) -> int:
        return sum(book.num_cached for book in self._books)

    @property
    def num_used(self) -> int:
        return sum(book.num_used for book in self._books)

    def room_for_encoder(self, rows: int) -> bool:
        """Whether an encoder's output of so many rows could ever be held."""
        return all(layout.group.pages_for(rows) <= layout.group.most_pages for layout in self._encoders)

    def room_for_beams(self, prompt: int, length: int, width: int) -> bool:
        """Whether `width` texts of up to `length` tokens that share a prompt could be held beside each other, with nothing
        else. They share the prompt's full pages at least."""
        needed: Counter[PageBook] = Counter()
        for layout in self._layouts.values():
            needed[layout.book] += layout.most_forked(prompt, length, width, self.align)
        return all(count <= book.num_pages for book, count in needed.items())

    def rows_to_encode(self, sequence: EngineSequence) -> int:
        """Rows of the encoder's output that a waiting sequence needs, and that are not found."""
        encoder = sequence.prompt.encoder
        if encoder is None or (self.prefix_cache and all(layout.found(encoder) for layout in self._encoders)):
            return 0
        return encoder.rows

    # A sequence comes

    def chunk_end(self, start: int, known: int, budget: int) -> int:
        """Where a chunk that begins at `start` ends: after `budget` tokens at most, or `align` where that is more; at the
        last known token or a multiple of `align`. A window has room for as much of it as its pool has pages."""
        end = min(known, start + budget)
        for layout in self._layouts.values():
            if layout.group.window is not None:
                beside = [g for g in self.groups if self._layouts[g.name].book is layout.book and g is not layout.group]
                room = layout.book.num_pages - sum(group.needed(known, self.align) for group in beside)
                end = min(end, (layout.group.first_page(start) + max(room, 1)) * self.page_size)
        if self.align > 1:
            aligned = end // self.align * self.align
            if aligned > start:
                end = aligned
            elif end < known:
                end = min(known, (start // self.align + 1) * self.align)
        return end

    def find(self, sequence: EngineSequence) -> int:
        """Pages of the longest prefix that every group has. The last token is always fed, for its logits."""
        count = self.most_reused(sequence)
        if not count:
            return 0
        self._name_pages(sequence)
        digests = sequence.held.digests
        for layout in self._layouts.values():
            count = min(count, layout.most_found(digests[:count]))
        step = self.align // self.page_size or 1
        count -= count % step
        while count and not all(layout.finds(digests, count) for layout in self._layouts.values()):
            count -= step
        return count

    def most_reused(self, sequence: EngineSequence) -> int:
        """Pages of a prefix that could be reused at best."""
        return (sequence.num_reusable - 1) // self.page_size if self._reuses else 0

    def waits_for(self, sequence: EngineSequence, found: int, being_computed: set[bytes]) -> bool:
        """Whether a running sequence computes what this one could reuse soon."""
        encoder = sequence.prompt.encoder
        if self.prefix_cache and encoder is not None and encoder.digest in being_computed:
            return True
        next_page = found + max(self.align // self.page_size, 1)
        return next_page <= self.most_reused(sequence) and sequence.held.digests[next_page - 1] in being_computed

    def being_computed(self, sequence: EngineSequence) -> list[bytes]:
        """The names of what a running sequence will offer to others."""
        names = sequence.held.digests[sequence.held.num_registered :]
        encoder = sequence.prompt.encoder
        if encoder is not None and any(
            layout.will_offer(sequence.held.by_group[layout.group.name]) for layout in self._encoders
        ):
            names.append(encoder.digest)
        return names

    def _name_pages(self, sequence: EngineSequence) -> None:
        prompt, held = sequence.prompt, sequence.held
        extend = partial(extend_digests, page_size=self.page_size, salt=prompt.salt, given=prompt.given)
        if not held.digests:
            extend(sequence.prompt_digests, prompt.token_ids)
            held.digests = list(sequence.prompt_digests)
        extend(held.digests, sequence.token_ids)

    def admit(self, sequence: EngineSequence, found: int, budget: int, spare: int) -> Admission | None:
        """Give a sequence the pages of its whole prompt, of a window those of its first chunk. found: see `find`. spare:
        pages to leave in every pool.

        None if a pool lacks pages; nothing is changed then."""
        known, start = len(sequence.token_ids), found * self.page_size
        end = self.chunk_end(start, known, budget)
        digests, prompt = sequence.held.digests, sequence.prompt
        reuse = self.prefix_cache
        made = {n: layout.start(digests, found, prompt, reuse) for n, layout in self._layouts.items()}
        needed: Counter[PageBook] = Counter()
        for name, layout in self._layouts.items():
            book, held = layout.book, made[name]
            needed[book] += layout.missing(held, known, end) + book.num_unused(layout.pages(held))
        growing = {layout.book for layout in self._layouts.values() if layout.grows}
        if any(needed[book] + spare * (book in growing) > book.num_available for book in self._books):
            return None
        for name, layout in self._layouts.items():  # all are shared first: `allocate` evicts what nobody holds
            layout.book.share(layout.pages(made[name]))
        for name, layout in self._layouts.items():
            layout.grow(made[name], known, end)
        sequence.held.by_group = made
        sequence.held.num_registered = found
        self._note_change(sequence.held)
        return Admission(start, end)

    def _note_change(self, held: Held) -> None:
        held.room = min(layout.room(held.by_group[name]) for name, layout in self._layouts.items())
        held.is_changed = True

    # A sequence runs

    def grow(self, sequence: EngineSequence, end: int) -> bool:
        """Make sure that positions before `end` have pages; False, and nothing is changed, when a pool lacks them."""
        if end <= sequence.held.room:  # nearly always
            return True
        held = sequence.held.by_group
        needed: Counter[PageBook] = Counter()
        for name, layout in self._layouts.items():
            missing = layout.missing(held[name], end, end)
            if missing:
                needed[layout.book] += missing
        if any(count > book.num_available for book, count in needed.items()):
            return False
        if needed:
            for name, layout in self._layouts.items():
                layout.grow(held[name], end, end)
        self._note_change(sequence.held)
        return True

    def take_back(self, sequence: EngineSequence) -> None:
        """Free the pages that only tokens of a draft would have needed."""
        for name, layout in self._layouts.items():
            layout.shrink(sequence.held.by_group[name], len(sequence.token_ids))
        self._note_change(sequence.held)

    def advance(self, sequence: EngineSequence, fed: int, kept: int) -> int:
        """Note that a pass over `fed` tokens went through, of which the first `kept` are part of the text. Returns how many
        count as computed: a state can't be taken back in part, so that what was kept is fed again."""
        if self.has_state and kept < fed:
            kept = 0
        position = sequence.num_computed + kept
        for name, layout in self._layouts.items():
            layout.advance(sequence.held.by_group[name], position, kept)
            if not self._reuses:
                layout.slide(sequence.held.by_group[name], position)
        sequence.held.is_changed |= self.has_state  # its slots have changed places
        return kept

    def reclaim(self, sequences: Sequence[EngineSequence]) -> bool:
        """Free pages before the windows of sequences that were kept to be offered to others. Returns whether any were."""
        before = self.num_used
        for layout in self._windows:
            for sequence in sequences:
                layout.slide(sequence.held.by_group[layout.group.name], sequence.num_computed)
        return self.num_used < before

    def commit(self, sequence: EngineSequence) -> None:
        """Offer what a sequence has computed to others. Call once logits that follow it are known to be finite: whatever is
        wrong in a cache of a sequence reaches all its later logits."""
        if not self.prefix_cache:
            return
        held, pages = sequence.held, sequence.num_computed // self.page_size
        for encoder in self._encoders:
            encoder.commit(held.by_group[encoder.group.name], [], 0, 0, sequence.prompt)
        if not self._reuses or pages <= held.num_registered:
            return
        self._name_pages(sequence)
        for name, layout in self._layouts.items():
            layout.commit(held.by_group[name], held.digests, held.num_registered, pages, sequence.prompt)
            layout.slide(held.by_group[name], sequence.num_computed)
        held.num_registered = pages

    def page_changes(self, sequence: EngineSequence, *, everything: bool = False) -> list[NewPages]:
        """What the runner does not know yet of the page tables of the sequence's seat. everything: whole tables."""
        sequence.held.is_changed = False
        changes = []
        for name, layout in self._layouts.items():
            found = layout.changes(sequence.held.by_group[name], everything)
            if found is not None:
                changes.append(NewPages(sequence.seat, name, *found))
        return changes

    def encoder_passes(self, sequence: EngineSequence) -> list[EncoderPass]:
        """The passes that a step of the sequence needs first."""
        encoder = sequence.prompt.encoder
        if encoder is None:
            return []
        return [
            EncoderPass(sequence.seat, layout.group.name, encoder)
            for layout in self._encoders
            if not layout.is_encoded(sequence.held.by_group[layout.group.name])
        ]

    def fork(self, parent: EngineSequence, child: EngineSequence) -> list[PageCopy] | None:
        """Let `child`, which holds nothing, go on from the computed tokens of `parent`. Returns the copies that must come
        before the next feed of either; None, and nothing is changed, when a pool lacks pages."""
        held, position = parent.held, parent.num_computed
        needed: Counter[PageBook] = Counter()
        for name, layout in self._layouts.items():
            needed[layout.book] += layout.fork_needs(held.by_group[name], position)
        if any(count > book.num_available for book, count in needed.items()):
            return None
        copies: list[PageCopy] = []
        for name, layout in self._layouts.items():
            child.held.by_group[name] = layout.fork(held.by_group[name], position, copies)
        child.held.digests = list(held.digests[: position // self.page_size])
        child.held.num_registered = min(held.num_registered, len(child.held.digests))
        child.num_computed = position
        child.held.copies = copies
        self._note_change(child.held)
        held.is_changed = True  # of a state
        return copies

    # A sequence goes

    def release(self, sequence: EngineSequence) -> None:
        """Free what a sequence holds; what it has offered may be found until it is evicted."""
        for name, held in sequence.held.by_group.items():
            layout = self._layouts[name]
            layout.book.release(layout.pages(held))
        sequence.held.by_group = {}
        sequence.held.num_registered = sequence.held.room = 0

    def check_integrity(self, sequences: Sequence[EngineSequence]) -> None:
        """Raise AssertionError unless every page of every pool is accounted for. sequences: all that hold something."""
        for book in self._books:
            book.check_integrity(
                layout.pages(sequence.held.by_group[name])
                for name, layout in self._layouts.items()
                if layout.book is book
                for sequence in sequences
            )
