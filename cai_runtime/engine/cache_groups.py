"""How a budget of bytes is split over the cache groups that a model declares, and what fits into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from cai_runtime.kernels.batch import FULL
from cai_runtime.kernels.cache_groups import CacheGroup, pools

NO_LIMIT = 1 << 26  # positions; a context that no model has


def largest_align(groups: Sequence[CacheGroup]) -> int:
    return max(group.align for group in groups)


def split_pages(groups: Sequence[CacheGroup], positions: int) -> dict[str, int]:
    """Pages of each group's pool for one sequence of so many positions."""
    align = largest_align(groups)
    return {g.name: sum(g.needed(positions, align) for g in pool) for pool in pools(groups) for g in pool}


def split_budget(groups: Sequence[CacheGroup], budget: int, positions: int, chunk: int = 0) -> dict[str, int]:
    """Pages of each group for `budget` bytes: each pool's share is what one sequence of `positions`, or of the most that
    fit, needs of it. Groups of one pool get the same number, which is the pool's.

    chunk: prompt tokens of a step. Windows get room for them beside sequences that decode, where the budget allows."""
    positions = _most(positions, lambda n: bytes_for(groups, n) <= budget) or 1
    whole, room = bytes_for(groups, positions), _chunk_pages(groups, chunk)
    room_bytes = bytes_held(groups, room)
    for_chunks = min(room_bytes, max(budget - whole, 0))
    return {
        name: count * (budget - for_chunks) // whole + (room[name] * for_chunks // room_bytes if for_chunks else 0)
        for name, count in split_pages(groups, positions).items()
    }


def useful_bytes(groups: Sequence[CacheGroup], positions: int, sequences: int, chunk: int = 0) -> int:
    """Bytes beyond which a budget is of no use: for so many sequences of so many positions. chunk: see `split_budget`."""
    return sequences * bytes_for(groups, positions) + bytes_held(groups, _chunk_pages(groups, chunk))


def _chunk_pages(groups: Sequence[CacheGroup], chunk: int) -> dict[str, int]:
    """Pages of each group's pool that its windows take for `chunk` tokens of a prompt, until they slide."""
    return {
        g.name: sum(w.pages_for(chunk) for w in pool if w.window is not None) for pool in pools(groups) for g in pool
    }


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, as all smaller ones do; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def bytes_for(groups: Sequence[CacheGroup], positions: int) -> int:
    """Bytes that one sequence of so many positions takes."""
    return sum(group.needed(positions, largest_align(groups)) * group.page_bytes for group in groups)


def bytes_held(groups: Sequence[CacheGroup], counts: Mapping[str, int]) -> int:
    """Bytes of so many pages of each group."""
    return sum(counts[pool[0].name] * pool[0].page_bytes for pool in pools(groups))


def positions_held(groups: Sequence[CacheGroup], counts: Mapping[str, int]) -> tuple[int, str]:
    """The most positions that one sequence can have, at most `NO_LIMIT`, and the name of the group that bounds them."""
    align = largest_align(groups)
    return min(
        (_most(NO_LIMIT, partial(_fits, pool, counts[pool[0].name], align)), pool[0].name) for pool in pools(groups)
    )


def _fits(pool: Sequence[CacheGroup], pages: int, align: int, positions: int) -> bool:
    return sum(group.needed(positions, align) for group in pool) <= pages


def bytes_wanted(groups: Sequence[CacheGroup], counts: Mapping[str, int], positions: int) -> int:
    """Bytes of a cache, split as `counts` are, that holds a sequence of so many positions; these are too few for it."""
    wanted, held = bytes_for(groups, positions), bytes_held(groups, counts)
    if wanted > held:
        return wanted
    needed = split_pages(groups, positions)
    return max(-(-held * count // max(counts[name], 1)) for name, count in needed.items())


def groups_of(runner: Any) -> tuple[tuple[CacheGroup, ...], dict[str, int]]:
    """The cache groups of a runner and how many pages each has. A runner that declares none has pages of every position."""
    groups = getattr(runner, "groups", None)
    if groups is None:
        page_bytes = getattr(runner, "page_bytes", 0)
        return (CacheGroup(FULL, page_bytes=page_bytes, page_size=runner.page_size),), {FULL: runner.num_pages}
    return tuple(groups), dict(runner.counts)
