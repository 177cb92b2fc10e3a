"""The shape of a program of the matrix products, and how it is compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DECODE_ROWS = 16  # up to here a launch is bound by reading the weights
# 64 rows would switch Hopper and Blackwell to wgmma and tcgen05, whose sums round differently; int8 sums are exact.
MAX_BLOCK_M = 32


@dataclass(frozen=True)
class Products:
    """The products of a launch, as far as they decide on its tile."""

    decode: bool  # up to DECODE_ROWS rows
    compute: torch.dtype
    store: str
    group: int  # of int4, else 0
    columns: int  # of the result, of all members
    features: int  # of the input
    device: torch.device


@dataclass(frozen=True)
class Tile:
    """What of a program changes no bit of a result. The step along the input features, which would, is `block_k`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # None: as many as the compiler likes


def block_k(compute: torch.dtype, group: int) -> int:
    """Input features per step of the products, by compute dtype and int4 group (0: not int4) alone."""
    if compute == torch.float32:
        return group or 32
    return 128


def default_tile(products: Products) -> Tile:
    """Few rows: narrow tiles, so that many programs pull on memory. Many rows: wide tiles, for reuse."""
    decode = products.decode
    if products.compute == torch.float32:
        return Tile(16, 32, 4, 3) if decode else Tile(32, 32, 4, 3)
    if products.compute == torch.int8:
        return Tile(16, 16, 2, 6) if decode else Tile(64, 128, 4, 3)
    if not decode:
        return Tile(32, 128, 4, 2)
    if products.store == "int4":
        # 16 bytes of a step for each thread. Left alone, ptxas stops at 128 registers for sm_100 and spills.
        return Tile(16, 64 if products.group == 32 else 32, 2, 4, 192)
    return Tile(16, 16, 2, 4)
