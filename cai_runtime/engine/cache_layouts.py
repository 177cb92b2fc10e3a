"""What a sequence holds of one cache group: a layout for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cai_runtime.engine.cache_groups import NO_LIMIT
from cai_runtime.engine.pages import PageBook
from cai_runtime.engine.segments import EncoderInput, Prompt
from cai_runtime.kernels.cache_groups import CacheGroup

SCRATCH = 0  # what a table says of a page before the window; nobody reads it


@dataclass(frozen=True, slots=True)
class PageCopy:
    """The content of page `source` of a group goes to page `target`."""

    group: str
    source: int
    target: int


class Layout:
    """Base of the layouts. `held` is what `start` made; pages are of `book`."""

    grows = False  # whether a sequence comes to hold more

    def __init__(self, group: CacheGroup, book: PageBook):
        self.group, self.book = group, book

    def most_found(self, digests: Sequence[bytes]) -> int:
        """An upper bound of the pages of a prefix that is found."""
        return len(digests)

    def finds(self, digests: Sequence[bytes], count: int) -> bool:
        """Whether a sequence can start behind the first `count` pages of a prefix."""
        return True

    def start(self, digests: Sequence[bytes], count: int, prompt: Prompt, reuse: bool) -> Any:
        """Of a sequence that starts there: it holds what is reused, to which no reference was taken yet."""
        raise NotImplementedError

    def missing(self, held: Any, known: int, end: int) -> int:
        """Pages that `grow` would allocate, for `known` positions and a chunk that ends at `end`."""
        return 0

    def grow(self, held: Any, known: int, end: int) -> None:
        """Allocate them."""

    def room(self, held: Any) -> int:
        """Positions that a sequence can have with what it holds."""
        return NO_LIMIT

    def shrink(self, held: Any, positions: int) -> None:
        """Free what lies behind so many positions."""

    def slide(self, held: Any, position: int) -> None:
        """Free what a query at `position`, or after it, does not see."""

    def advance(self, held: Any, position: int, kept: int) -> None:
        """`kept` more positions were computed, `position` in all."""

    def commit(self, held: Any, digests: Sequence[bytes], first: int, count: int, prompt: Prompt) -> None:
        """Offer the full pages from `first` to `count` - 1, whose names are `digests`, to others."""

    def changes(self, held: Any, everything: bool) -> tuple[int, list[int]] | None:
        """(at, pages): what the page table at the seat must become; None if it is that."""
        raise NotImplementedError

    def pages(self, held: Any) -> list[int]:
        """All references, in the order of the positions."""
        raise NotImplementedError

    def is_encoded(self, held: Any) -> bool:
        return True

    def most_forked(self, prompt: int, length: int, width: int, align: int) -> int:
        """Pages that `width` sequences of up to `length` positions hold at most, which were forked behind a prompt."""
        return width * self.group.needed(length, align)

    def fork_needs(self, held: Any, position: int) -> int:
        """Pages that `fork` allocates."""
        raise NotImplementedError

    def fork(self, held: Any, position: int, copies: list[PageCopy]) -> Any:
        """What another sequence holds that goes on at `position`. Adds the copies that this needs."""
        raise NotImplementedError


@dataclass(eq=False, slots=True)
class Pages:
    table: list[int]  # page of every `page_size` positions; `SCRATCH` before `first`
    first: int = 0
    told: int = 0  # entries that the runner has


class PagedLayout(Layout):
    """Pages of every position, or of those in a window."""

    grows = True

    def most_found(self, digests: Sequence[bytes]) -> int:
        if self.group.window is not None:
            return len(digests)
        name, find = self.group.name, self.book.find
        return next((i for i, digest in enumerate(digests) if find((name, digest)) is None), len(digests))

    def finds(self, digests: Sequence[bytes], count: int) -> bool:
        first = self._first(count)
        return all(self.book.find((self.group.name, digest)) is not None for digest in reversed(digests[first:count]))

    def _first(self, count: int) -> int:
        """The first page that is needed behind `count` pages."""
        return self.group.first_page(count * self.group.page_size)

    def start(self, digests: Sequence[bytes], count: int, prompt: Prompt, reuse: bool) -> Pages:
        first, table = self._first(count), []
        for i in range(count):
            page = self.book.find((self.group.name, digests[i])) if i >= first else SCRATCH
            assert page is not None
            table.append(page)
        return Pages(table, first)

    def missing(self, held: Pages, known: int, end: int) -> int:
        return max(0, self.group.pages_for(known if self.group.window is None else end) - len(held.table))

    def grow(self, held: Pages, known: int, end: int) -> None:
        held.table += self.book.allocate(self.missing(held, known, end))

    def room(self, held: Pages) -> int:
        return len(held.table) * self.group.page_size

    def shrink(self, held: Pages, positions: int) -> None:
        needed = self.group.pages_for(positions)
        self.book.release(held.table[needed:])
        del held.table[needed:]
        held.told = min(held.told, needed)

    def slide(self, held: Pages, position: int) -> None:
        first = self.group.first_page(position)
        if first > held.first:
            self.book.release(held.table[held.first : first])
            held.table[held.first : first] = [SCRATCH] * (first - held.first)
            held.first = first

    def commit(self, held: Pages, digests: Sequence[bytes], first: int, count: int, prompt: Prompt) -> None:
        for i in range(max(first, held.first), count):
            self.book.register(held.table[i], (self.group.name, digests[i]))

    def changes(self, held: Pages, everything: bool) -> tuple[int, list[int]] | None:
        told = 0 if everything else held.told
        if told == len(held.table):
            return None
        held.told = len(held.table)
        return told, held.table[told:]

    def pages(self, held: Pages) -> list[int]:
        return held.table[held.first :]

    def most_forked(self, prompt: int, length: int, width: int, align: int) -> int:
        shared = 0 if self.group.window is not None else prompt // self.group.page_size
        return shared + width * (self.group.needed(length, align) - shared)

    def fork_needs(self, held: Pages, position: int) -> int:
        return int(position % self.group.page_size > 0)

    def fork(self, held: Pages, position: int, copies: list[PageCopy]) -> Pages:
        full = position // self.group.page_size
        self.book.share(held.table[held.first : full])
        own = self.book.allocate(self.fork_needs(held, position))
        copies += [PageCopy(self.group.name, held.table[full], page) for page in own]
        return Pages(held.table[:full] + own, held.first)


@dataclass(eq=False, slots=True)
class State:
    """Slots of a state. A step reads `read`, or nothing at position 0, and writes `write`: what it read stays, so that it
    can be fed again, or be kept for others."""

    read: int | None
    write: int = -1
    spare: list[int] = field(default_factory=list)
    pending: tuple[int, int] | None = None  # a slot and the pages before it: offered once logits are known finite
    told: tuple[int, int] | None = None


class StateLayout(Layout):
    """A state in two slots. A snapshot is a slot that is not written any more, found by the name of the page before it."""

    def finds(self, digests: Sequence[bytes], count: int) -> bool:
        aligned = count * self.group.page_size % self.group.align == 0
        return aligned and self.book.find((self.group.name, digests[count - 1])) is not None

    def start(self, digests: Sequence[bytes], count: int, prompt: Prompt, reuse: bool) -> State:
        return State(self.book.find((self.group.name, digests[count - 1])) if count else None)

    def missing(self, held: State, known: int, end: int) -> int:
        return 2 if held.write < 0 else 0

    def grow(self, held: State, known: int, end: int) -> None:
        if held.write < 0:
            held.write, *held.spare = self.book.allocate(2)

    def advance(self, held: State, position: int, kept: int) -> None:
        if not kept:
            return
        old, held.read = held.read, held.write
        aligned = self.group.reuse == "snapshot" and position % self.group.align == 0
        if old is not None:
            keeps = held.pending is not None and held.pending[0] == old and not aligned
            if keeps and not held.spare and self.book.num_available:
                held.spare += self.book.allocate(1)  # in place of the slot that is kept until it is known to be good
            if not keeps or not held.spare:
                if held.pending is not None and held.pending[0] == old:
                    held.pending = None
                self._let_go(held, old)
        if aligned:
            self._drop_pending(held)
            held.pending = (held.read, position // self.group.page_size)
        held.write = held.spare.pop()

    def _let_go(self, held: State, slot: int) -> None:
        if not held.spare and self.book.is_private(
            slot
        ):  # the last of a fork's sequences to go on has a spare one already
            held.spare.append(slot)
        else:
            self.book.release([slot])

    def _drop_pending(self, held: State) -> None:
        if held.pending is not None and held.pending[0] != held.read:
            self.book.release([held.pending[0]])
        held.pending = None

    def commit(self, held: State, digests: Sequence[bytes], first: int, count: int, prompt: Prompt) -> None:
        if held.pending is None:
            return
        slot, pages = held.pending
        if slot != held.read:
            self.book.register(slot, (self.group.name, digests[pages - 1]))
        elif self.book.num_available:  # it is not written again, so that another slot must take its place
            self.book.register(slot, (self.group.name, digests[pages - 1]))
            if not self.book.is_private(slot):
                held.spare += self.book.allocate(1)
        self._drop_pending(held)

    def changes(self, held: State, everything: bool) -> tuple[int, list[int]] | None:
        slots = (held.write if held.read is None else held.read, held.write)
        if slots == held.told and not everything:
            return None
        held.told = slots
        return 0, list(slots)

    def pages(self, held: State) -> list[int]:
        own = [held.read] if held.read is not None else []
        own += [held.write] if held.write >= 0 else []
        if held.pending is not None and held.pending[0] != held.read:
            own.append(held.pending[0])
        return own + held.spare

    def most_forked(self, prompt: int, length: int, width: int, align: int) -> int:
        return 2 if width == 1 else 3 * width  # a slot that is read with others may need one in its place

    def fork_needs(self, held: State, position: int) -> int:
        return 3 if held.read is not None and self.book.is_private(held.read) else 2

    def fork(self, held: State, position: int, copies: list[PageCopy]) -> State:
        if self.fork_needs(held, position) == 3:
            held.spare += self.book.allocate(1)  # in place of the slot that both read now
        if held.read is not None:
            self.book.share([held.read])
        write, spare = self.book.allocate(2)
        return State(held.read, write, [spare])


@dataclass(eq=False, slots=True)
class Encoded:
    table: list[int]
    missing: int  # pages to allocate
    done: bool  # whether the encoder's pass went through
    told: bool = False
    offered: bool = False


class EncoderLayout(Layout):
    """Pages of an encoder's output, shared by equal content."""

    def start(self, digests: Sequence[bytes], count: int, prompt: Prompt, reuse: bool) -> Encoded:
        encoder = prompt.encoder
        if encoder is None:
            return Encoded([], 0, True)
        pages = self.found(encoder) if reuse else None
        return (
            Encoded([], self.group.pages_for(encoder.rows), False)
            if pages is None
            else Encoded(pages, 0, True, offered=True)
        )

    def found(self, encoder: EncoderInput) -> list[int] | None:
        """The pages of an equal input's output, if all of them are still there."""
        found = [self.book.find(self._name(encoder.digest, i)) for i in range(self.group.pages_for(encoder.rows))]
        pages = [page for page in found if page is not None]
        return pages if len(pages) == len(found) else None

    def _name(self, digest: bytes, page: int) -> tuple[str, bytes]:
        return self.group.name, page.to_bytes(4, "little") + digest

    def missing(self, held: Encoded, known: int, end: int) -> int:
        return held.missing

    def grow(self, held: Encoded, known: int, end: int) -> None:
        held.table += self.book.allocate(held.missing)
        held.missing = 0

    def advance(self, held: Encoded, position: int, kept: int) -> None:
        held.done = True

    def commit(self, held: Encoded, digests: Sequence[bytes], first: int, count: int, prompt: Prompt) -> None:
        if held.offered:  # nearly always
            return
        if held.done and prompt.encoder is not None and self.group.reuse == "content":
            held.offered = True
            for i, page in enumerate(held.table):
                self.book.register(page, self._name(prompt.encoder.digest, i))

    def changes(self, held: Encoded, everything: bool) -> tuple[int, list[int]] | None:
        if not held.table or (held.told and not everything):
            return None
        held.told = True
        return 0, list(held.table)

    def pages(self, held: Encoded) -> list[int]:
        return held.table

    def is_encoded(self, held: Encoded) -> bool:
        return held.done

    def will_offer(self, held: Encoded) -> bool:
        """Whether the output will be found by others, and is not yet."""
        return bool(held.table) and not held.offered and self.group.reuse == "content"

    def most_forked(self, prompt: int, length: int, width: int, align: int) -> int:
        return self.group.most_pages

    def fork_needs(self, held: Encoded, position: int) -> int:
        return 0

    def fork(self, held: Encoded, position: int, copies: list[PageCopy]) -> Encoded:
        self.book.share(held.table)
        return Encoded(list(held.table), 0, held.done, offered=held.offered)


def layout_of(group: CacheGroup, book: PageBook) -> Layout:
    """The layout of a group over a pool."""
    kinds = {"pages": PagedLayout, "window": PagedLayout, "state": StateLayout, "encoder": EncoderLayout}
    return kinds[group.kind](group, book)
