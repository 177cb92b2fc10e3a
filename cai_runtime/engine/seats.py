"""The page tables of a persistent batch, on the host, and the numbers of a step made from them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cai_runtime.engine.step import Feed, NewPages
from cai_runtime.kernels.batch import FULL, AttentionBatch, PageTable

_NO_SLOTS = np.zeros(0, np.int32)  # a step writes nothing to an encoder's output


@dataclass(frozen=True)
class StepNumbers:
    """A step's T tokens of S sequences on the host, all int32: what `AttentionBatch` holds, with ids and wanted rows.

    tables: by cache group, slots [T] and pages [S, P]; of an encoder's output slots [0].
    """

    ids: np.ndarray  # [T]
    positions: np.ndarray  # [T]
    query_start: np.ndarray  # [S + 1]
    context_len: np.ndarray  # [S]
    wanted: np.ndarray  # [N] rows of the tokens
    tables: dict[str, tuple[np.ndarray, np.ndarray]]

    @property
    def width(self) -> int:
        """Pages of the longest sequence."""
        return next(iter(self.tables.values()))[1].shape[1]

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, AttentionBatch]:
        """(ids, wanted, batch) as tensors: on the CPU the same memory, to a GPU in one copy."""
        parts = [self.ids, self.wanted, self.positions, self.query_start, self.context_len]
        for slots, pages in self.tables.values():
            parts += [slots, pages]
        if device.type == "cpu":
            tensors = [torch.from_numpy(part) for part in parts]
        else:
            whole = torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts])).to(device)
            pieces = whole.split([part.size for part in parts])
            tensors = [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        ids, wanted, positions, query_start, context_len, *rest = tensors
        tables = {
            group: PageTable(slots, pages)
            for group, slots, pages in zip(self.tables, rest[::2], rest[1::2], strict=True)
        }
        return ids, wanted, AttentionBatch(positions, query_start, context_len, tables)


class Seats:
    """Page tables by cache group and seat. They grow with the seats and pages that are named.

    page_size: of every group. encoders: those of `groups` that hold an encoder's output, whole at once, whose pages may be
    of another size.
    """

    def __init__(self, page_size: int, groups: Sequence[str] = (FULL,), encoders: Collection[str] = ()):
        self._page_size = page_size
        self._tables = {group: np.zeros((1, 1), np.int32) for group in groups}
        self._encoders = frozenset(encoders)

    def write(self, changes: Iterable[NewPages]) -> None:
        """Carry out page changes."""
        for change in changes:
            table = self._tables[change.group]
            end = change.at + len(change.pages)
            if change.seat >= table.shape[0] or end > table.shape[1]:
                grown = np.zeros((_room(table.shape[0], change.seat + 1), _room(table.shape[1], end)), np.int32)
                grown[: table.shape[0], : table.shape[1]] = table
                self._tables[change.group] = table = grown
            table[change.seat, change.at : end] = change.pages

    def pages(self, group: str, seats: Sequence[int]) -> np.ndarray:
        """int32 [seats, pages]: a group's table at seats that were written."""
        return self._tables[group][list(seats)]

    def numbers(self, feeds: Sequence[Feed]) -> StepNumbers:
        """The numbers of a step, at least one feed."""
        seats = np.array([feed.seat for feed in feeds], np.int32)
        starts = np.array([feed.start for feed in feeds], np.int32)
        counts = np.array([len(feed.ids) for feed in feeds], np.int32)
        wanted = np.array([feed.wanted for feed in feeds], np.int32)
        query_start = np.zeros(len(feeds) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        context_len = starts + counts
        if query_start[-1] == len(feeds):  # one token each: the usual step
            ids = np.array([feed.ids[0] for feed in feeds], np.int32)
            positions, seat_of = starts, seats
        else:
            ids = np.array([token_id for feed in feeds for token_id in feed.ids], np.int32)
            positions = _runs(starts, counts)
            seat_of = np.repeat(seats, counts)
        rows = _runs(query_start[1:] - wanted, wanted)
        size = self._page_size
        width = (int(context_len.max()) + size - 1) // size
        page, offset = np.divmod(positions, size)
        tables = {
            group: (_NO_SLOTS, table[seats])
            if group in self._encoders
            else (table[seat_of, page] * size + offset, table[seats, :width])
            for group, table in self._tables.items()
        }
        return StepNumbers(ids, positions, query_start, context_len, rows, tables)


def _runs(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int32: starts[0], starts[0] + 1, ... counts[0] of them, then those from starts[1] on, and so forth."""
    ends = np.cumsum(counts, dtype=np.int32)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int32) + np.repeat(starts - ends + counts, counts)


def _room(size: int, needed: int) -> int:
    return size if needed <= size else max(needed, 2 * size)
