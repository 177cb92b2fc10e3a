"""What a model declares of its caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


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
    """The groups that share a pool of pages: those of kinds "pages" and "window" whose pages have equally many bytes.

    A page of a pool belongs to one group at a time, so that the layers of its groups lie in the same memory."""
    made: dict[object, list[CacheGroup]] = {}
    for group in groups:
        shared = group.kind in ("pages", "window") and group.page_bytes
        made.setdefault(group.page_bytes if shared else group.name, []).append(group)
    return list(made.values())
