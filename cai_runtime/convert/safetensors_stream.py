"""Writing safetensors shards tensor by tensor, holding one chunk at a time.

Format: https://github.com/huggingface/safetensors#format. The header comes first and states every offset, so shapes are
declared before data; values are then appended in the declared order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Safetensors name, bytes a value.
DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}


@dataclass(frozen=True)
class Declared:
    """A tensor to be written: name, row-major shape, dtype ("float32", "float16" or "bfloat16")."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype][1]


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 values as an array whose bytes are those of `dtype`, rounded to nearest even. Overflow gives infinity."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.astype(dtype, copy=False))


def write_shards(
    directory: Path,
    tensors: Iterable[tuple[Declared, Iterable[np.ndarray]]],
    *,
    max_shard_bytes: int = 5 << 30,
) -> list[str]:
    """Write `model.safetensors`, or numbered shards and their index when the tensors exceed `max_shard_bytes`.

    `tensors`: each with its values as encoded chunks in row order (`encode`). Returns the shards' file names.
    Raises ValueError when a tensor's chunks don't fill its declared shape.
    """
    shards: list[list[tuple[Declared, Iterable[np.ndarray]]]] = [[]]
    size = 0
    for declared, chunks in tensors:
        if size and size + declared.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((declared, chunks))
        size += declared.nbytes
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(directory / name, shard)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(d.nbytes for shard in shards for d, _ in shard)},
            "weight_map": {d.name: name for name, shard in zip(names, shards, strict=True) for d, _ in shard},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return names


def _write_shard(path: Path, shard: list[tuple[Declared, Iterable[np.ndarray]]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for declared, _ in shard:
        header[declared.name] = {
            "dtype": DTYPES[declared.dtype][0],
            "shape": list(declared.shape),
            "data_offsets": [offset, offset + declared.nbytes],
        }
        offset += declared.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts on an 8-byte boundary
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)))
        f.write(text)
        for declared, chunks in shard:
            written = sum(f.write(chunk.data) for chunk in chunks)
            if written != declared.nbytes:
                raise ValueError(f"tensor {declared.name}: {written} bytes written, {declared.nbytes} declared")
