"""What a step tells the attention layers: where each row of its flattened tokens belongs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FULL = "full"  # the cache group of layers that keep every position
WINDOW = "window"  # of layers that keep the last positions


@dataclass(frozen=True)
class PageTable:
    """Where the tokens of a step lie in one cache group. All int32, on the model's device.

    A slot is page * page_size + offset.
    """

    slots: torch.Tensor  # [T]: where each new token's key and value are written; [0] of an encoder's output
    pages: torch.Tensor  # [S, P]: the pages of each sequence, in order


@dataclass(frozen=True)
class GivenEmbeddings:
    """Rows in place of token embeddings, on the model's device."""

    index: torch.Tensor  # int64 [n]: which of a step's tokens
    rows: torch.Tensor  # [n, hidden], any float dtype


@dataclass(frozen=True)
class AttentionBatch:
    """T tokens of S sequences, sequence i owning rows query_start[i] to query_start[i + 1].

    All int32, on the model's device. context_len counts a sequence's tokens in the cache after this step. tables: by cache
    group.
    """

    positions: torch.Tensor  # [T]
    query_start: torch.Tensor  # [S + 1]
    context_len: torch.Tensor  # [S]
    tables: Mapping[str, PageTable]

    @classmethod
    def of(
        cls,
        positions: torch.Tensor,
        slots: torch.Tensor,
        query_start: torch.Tensor,
        context_len: torch.Tensor,
        page_table: torch.Tensor,
        group: str = FULL,
    ) -> AttentionBatch:
        """A batch over one cache group."""
        return cls(positions, query_start, context_len, {group: PageTable(slots, page_table)})
