"""Tiles of the matrix products that were measured on a device, by shape family; without them, the defaults of `tiles.py`.

A file is JSON: {"device": its name, "tiles": {family: {"block_m": 16, "block_n": 32, "num_warps": 2, "num_stages": 4}}},
with "max_registers" where it matters. Files come with the package, in `tuned/`, and are written to `<cai home>/tuning/` by
`python -m cai_runtime.kernels.triton.tune`; what is in the latter goes before. Only what changes no bit of a result can
be said there: never the step along the input features, nor rows enough for other matrix instructions.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from cai_runtime.errors import KernelError
from cai_runtime.home import cai_home
from cai_runtime.kernels.triton.tiles import MAX_BLOCK_M, Products, Tile, default_tile

SHIPPED = Path(__file__).parent / "tuned"
_SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # of families, by either dimension
_ALLOWED = {
    "block_m": (16, 32, 64, 128),
    "block_n": (16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8),
    "num_stages": range(1, 11),
    "max_registers": (*range(32, 256), None),
}


def family(products: Products) -> str:
    """The shapes that share a tile, such as "bfloat16/int4-64/decode/n4096-k4096": either dimension up to the size named,
    the largest without end."""
    store = f"{products.store}-{products.group}" if products.group else products.store
    n, k = (next((size for size in _SIZES if size >= d), _SIZES[-1]) for d in (products.columns, products.features))
    compute = str(products.compute).removeprefix("torch.")
    return f"{compute}/{store}/{'decode' if products.decode else 'prefill'}/n{n}-k{k}"


def tile_for(products: Products) -> Tile:
    """The tile measured for these products on their device, or the default. Raises KernelError for a malformed file."""
    default = default_tile(products)
    if products.device.type != "cuda":
        return default
    return tuned_tiles(torch.cuda.get_device_name(products.device)).get(family(products), default)


@functools.cache
def tuned_tiles(device: str) -> Mapping[str, Tile]:
    """Family -> tile of a device by its name, from the package and the cai home; read once. Raises KernelError for a file
    that is not as the module says, naming it."""
    tiles: dict[str, Tile] = {}
    for folder in (SHIPPED, cai_home() / "tuning"):
        path = folder / file_name(device)
        if path.exists():
            tiles |= read_tiles(path)
    return tiles


def file_name(device: str) -> str:
    """Of a device's file: its name in lower case, with dashes."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def read_tiles(path: Path) -> dict[str, Tile]:
    """Family -> tile from a file. Raises KernelError that names the file and what is wrong in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KernelError(f"the tuned tiles in {path} can't be read: {error}; delete the file or tune again") from error
    entries = content.get("tiles") if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        raise KernelError(f"{path} has no object named tiles; delete the file or tune again")
    return {name: _tile(path, name, entry) for name, entry in entries.items()}


def _tile(path: Path, name: str, entry: Any) -> Tile:
    known = {f.name for f in fields(Tile)}
    if not isinstance(entry, dict) or set(entry) - known or known - {"max_registers"} - set(entry):
        raise KernelError(f"{path}: the tile of {name} must have {', '.join(sorted(known))}, not {entry!r}")
    for field, value in entry.items():
        if value not in _ALLOWED[field] or isinstance(value, bool | float):
            raise KernelError(f"{path}: {field} of {name} can't be {value!r}")
    if entry["block_m"] > MAX_BLOCK_M and not name.startswith("int8/"):
        raise KernelError(
            f"{path}: block_m of {name} can't be {entry['block_m']}: above {MAX_BLOCK_M} sums round otherwise"
        )
    return Tile(**entry)


def write_tiles(path: Path, device: str, tiles: Mapping[str, Tile]) -> None:
    """Put `tiles` into the file at `path`, over those of the same families that it has. Raises KernelError when it can't be
    written, or holds something else."""
    merged = (read_tiles(path) if path.exists() else {}) | dict(tiles)
    entries = {name: {f.name: getattr(merged[name], f.name) for f in fields(Tile)} for name in sorted(merged)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"device": device, "tiles": entries}, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise KernelError(
            f"can't write the tuned tiles to {path}: {error}; free space there or set CAI_HOME"
        ) from error
