"""What a model declares of its caches, and how a budget of bytes is split over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cai_runtime.kernels.batch import FULL

NO_LIMIT = 1 << 26  # positions; a context that no model has


@dataclass(frozen=True)
class CacheGroup:
    """Layers that cache the same positions in the same way.

    kind: "pages" keeps every position, "window" the last ones, "state" a fixed state of each sequence in two slots, one read
    and one written by each step, "encoder" an encoder's output. page_bytes: of one page, or slot, over the group's layers.
    page_size: positions of a page. window: a query sees its own position and the window - 1 before it. reuse: pages are
    found by the prefix that they hold ("prefix"), a state by the prefix that it follows ("snapshot"), an encoder's output by
    what was encoded ("content"), or not at all ("none"). align: chunks of a prompt end at multiples of it, and a state is
    reused there alone; a multiple of page_size, or 1 where there is no state. most_pages: of an encoder's output at most.

    Raises ValueError for what does not fit together.
    """

    name: str
    kind: Literal["pages", "window", "state", "encoder"] = "pages"
    page_bytes: int = 0
    page_size: int = 16
    window: int | None = None
    reuse: Literal["prefix", "snapshot", "content", "none"] = "prefix"
    align: int = 1
    most_pages: int = 0

    def __post_init__(self) -> None:
        able = {"pages": "prefix", "window": "prefix", "state": "snapshot", "encoder": "content"}[self.kind]
        problem = (
            f"page_size is {self.page_size}; it must be at least 1"
            if self.page_size < 1
            else f"reuse is {self.reuse!r}; a group of kind {self.kind!r} takes {able!r} or 'none'"
            if self.reuse not in (able, "none")
            else "a window is given to groups of kind 'window', and to these alone: at least 1 position"
            if (self.kind == "window") != (self.window is not None) or (self.window is not None and self.window < 1)
            else f"align is {self.align}; it must be 1 or a multiple of page_size {self.page_size}"
            if self.align < 1 or (self.align > 1 and self.align % self.page_size)
            else "a state that is reused needs an align: a multiple of page_size"
            if self.kind == "state" and self.reuse == "snapshot" and self.align % self.page_size
            else "an encoder's output needs most_pages, at least 1"
            if self.kind == "encoder" and self.most_pages < 1
            else None
        )
        if problem:
            raise ValueError(f"cache group {self.name!r}: {problem}")

    def pages_for(self, positions: int) -> int:
        """Pages that hold so many positions."""
        return -(-positions // self.page_size)

    def first_page(self, position: int) -> int:
        """The first page that a query at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.page_size

    def needed(self, positions: int, align: int = 1) -> int:
        """Pages that a sequence of so many positions holds at most, its chunks being one token, or `align`."""
        if self.kind == "state":
            return 2
        if self.kind == "encoder":
            return self.most_pages
        pages = self.pages_for(positions)
        return pages if self.window is None else min(pages, self.pages_for(self.window + align) + 1)


def pools(groups: Sequence[CacheGroup]) -> list[list[CacheGroup]]:
    """The groups that share a pool of pages: those of kinds "pages" and "window" whose pages have equally many bytes."""
    made: dict[object, list[CacheGroup]] = {}
    for group in groups:
        shared = group.kind in ("pages", "window") and group.page_bytes
        made.setdefault(group.page_bytes if shared else group.name, []).append(group)
    return list(made.values())


def largest_align(groups: Sequence[CacheGroup]) -> int:
    return max(group.align for group in groups)


def split_pages(groups: Sequence[CacheGroup], positions: int) -> dict[str, int]:
    """Pages of each group's pool for one sequence of so many positions."""
    align = largest_align(groups)
    return {g.name: sum(g.needed(positions, align) for g in pool) for pool in pools(groups) for g in pool}


def split_budget(groups: Sequence[CacheGroup], budget: int, positions: int) -> dict[str, int]:
    """Pages of each group for `budget` bytes: each pool's share is what one sequence of `positions` needs of it. Groups of
    one pool get the same number, which is the pool's."""
    whole = bytes_for(groups, positions)
    return {name: count * budget // whole for name, count in split_pages(groups, positions).items()}


def bytes_for(groups: Sequence[CacheGroup], positions: int) -> int:
    """Bytes that one sequence of so many positions takes."""
    return sum(group.needed(positions, largest_align(groups)) * group.page_bytes for group in groups)


def bytes_held(groups: Sequence[CacheGroup], counts: Mapping[str, int]) -> int:
    """Bytes of so many pages of each group."""
    return sum(counts[pool[0].name] * pool[0].page_bytes for pool in pools(groups))


def positions_held(groups: Sequence[CacheGroup], counts: Mapping[str, int]) -> tuple[int, str]:
    """The most positions that one sequence can have, at most `NO_LIMIT`, and the name of the group that bounds them."""
    align, bounds = largest_align(groups), []
    for pool in pools(groups):
        low, high = 0, NO_LIMIT  # low fits
        while low < high:
            middle = (low + high + 1) // 2
            if sum(group.needed(middle, align) for group in pool) <= counts[pool[0].name]:
                low = middle
            else:
                high = middle - 1
        bounds.append((low, pool[0].name))
    return min(bounds)


def groups_of(runner: Any) -> tuple[tuple[CacheGroup, ...], dict[str, int]]:
    """The cache groups of a runner and how many pages each has. A runner that declares none has pages of every position."""
    groups = getattr(runner, "groups", None)
    if groups is None:
        page_bytes = getattr(runner, "page_bytes", 0)
        return (CacheGroup(FULL, page_bytes=page_bytes, page_size=runner.page_size),), {FULL: runner.num_pages}
    return tuple(groups), dict(runner.counts)
