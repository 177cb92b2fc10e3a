"""Cores as the CUDA decode kernel reads them: tiles of 16 rows, each one run of bytes, in the order of the lanes.

The layout is described, and its constants are, in csrc/cuda/packed.cuh. Packing happens once, on the device that holds the
core, by torch's functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cai_runtime.kernels.weights import Core

TILE_ROWS = 16
BLOCK = 32  # columns
BLOCKS_OF_STEP = {"bf16": 1, "fp16": 1, "int8": 2, "int4": 4}
STORES = {"bf16": 0, "fp16": 0, "int8": 1, "int4": 2}  # as csrc/cuda/launch.cuh numbers them


@dataclass(frozen=True)
class PackedCore:
    """A core [rows, cols] ready for the decode kernel. data: uint8 [bytes], 16-byte aligned. scale: of int8, fp32 [rows];
    int4 has its scales and zero points among the data. store: "bf16", "fp16", "int8" or "int4"."""

    data: torch.Tensor
    scale: torch.Tensor | None
    rows: int
    cols: int
    store: str
    group: int
    zero: bool

    @property
    def description(self) -> tuple[int, int, int, int, int]:
        """What the library is told of it: rows, columns, store, columns of a scale group, whether it has zero points."""
        return self.rows, self.cols, STORES[self.store], self.group, int(self.zero)


def pack(core: Core) -> PackedCore:
    """Copy a bf16, fp16, int8 or int4 core into the kernel's layout. Peak memory: about four times the packed core."""
    rows, cols = core.shape
    scale, zero = core.scale if core.store == "int8" else None, core.zero is not None
    if rows == 0:  # an interpolative core_1 of full rank
        data = torch.empty(0, dtype=torch.uint8, device=core.data.device)
        return PackedCore(data, scale, rows, cols, core.store, core.group, zero)
    full = BLOCKS_OF_STEP[core.store]
    codes = _codes(core)
    tiles, blocks = -(-rows // TILE_ROWS), -(-cols // BLOCK)
    steps = -(-blocks // full)
    # [tile, half, row of 8, block, quarter, 8 columns]: lane 4 g + t has row g and quarter t
    lanes = _padded(codes, tiles * TILE_ROWS, blocks * BLOCK).view(tiles, 2, 8, blocks, 4, 8)
    scales = _scales(core, tiles)  # uint8 [tile, group, bytes] or None
    groups_of_step = full * BLOCK // core.group if core.is_int4 else 0
    parts = []
    if steps > 1:
        whole = lanes[:, :, :, : (steps - 1) * full].reshape(tiles, 2, 8, steps - 1, full, 4, 8)
        parts.append(_bytes(whole.permute(0, 3, 1, 2, 5, 4, 6), core, scales, 0, groups_of_step))
    last = lanes[:, :, :, None, (steps - 1) * full :]
    parts.append(_bytes(last.permute(0, 3, 1, 2, 5, 4, 6), core, scales, (steps - 1) * groups_of_step, groups_of_step))
    data = torch.cat([p.reshape(tiles, -1) for p in parts], dim=1).flatten()
    return PackedCore(data, scale, rows, cols, core.store, core.group, zero)


def _codes(core: Core) -> torch.Tensor:
    """The core's numbers as they are stored, one element each [rows, cols]."""
    if not core.is_int4:
        return core.data
    return torch.stack([core.data & 15, core.data >> 4], dim=-1).flatten(1)[:, : core.shape[1]]


def _padded(t: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    if t.shape == (rows, cols):
        return t.contiguous()
    wide = t.new_zeros(rows, cols)
    wide[: t.shape[0], : t.shape[1]] = t
    return wide


def _scales(core: Core, tiles: int) -> torch.Tensor | None:
    """Of int4, by tile and group: 16 scales, then 16 zero points where there are any. In bytes, apart: [2] of them."""
    if not core.is_int4:
        return None
    assert core.scale is not None
    groups = core.scale.shape[1]

    def by_tile(t: torch.Tensor) -> torch.Tensor:
        rows = _padded(t, tiles * TILE_ROWS, groups).view(tiles, TILE_ROWS, groups)
        return rows.transpose(1, 2).contiguous().view(torch.uint8)

    scales = by_tile(core.scale)
    return scales if core.zero is None else torch.cat([scales, by_tile(core.zero)], dim=2)


def _bytes(
    lanes: torch.Tensor, core: Core, scales: torch.Tensor | None, first: int, groups_of_step: int
) -> torch.Tensor:
    """Steps as bytes [tiles, steps, bytes]. lanes: [tile, step, half, g, t, block, 8 columns]; scales: from group `first`
    on."""
    tiles, steps = lanes.shape[:2]
    if scales is None:
        return lanes.contiguous().view(tiles, steps, -1).view(torch.uint8)
    # A word: columns 0, 2, 4, 6 in its low half, 1, 3, 5, 7 in its high one, four bits each.
    columns = lanes.contiguous().view(tiles, steps, -1, 8)
    order = columns[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    words = (order[..., 0::2] | order[..., 1::2] << 4).flatten(2)  # little-endian bytes
    own = scales[:, first : first + steps * groups_of_step]
    own = own.reshape(tiles, steps, -1, own.shape[2])
    scale, zero = own[..., : 2 * TILE_ROWS].flatten(2), own[..., 2 * TILE_ROWS :].flatten(2)
    return torch.cat([words, scale, zero], dim=2)
