"""Reading a GGUF file: metadata and where each tensor lies. Every length in the file is checked before it is believed.

The format's constants and block decoders are the `gguf` library's. Its reader isn't used: it takes seconds for a large
vocabulary, and a damaged length makes it loop or index out of range instead of saying what is wrong.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cai_runtime.errors import ConversionError

# Value types of the metadata; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file. `shape` is row-major ([out, in] for a linear layer); `type_name` such as "Q4_1"."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    """Absolute, in bytes."""
    nbytes: int


class GGUFFile:
    """An open GGUF file, memory-mapped. A context manager.

    `metadata`: key to bool, int, float, str or list of these; `tensors`: name to `GGUFTensor`.
    Raises ConversionError when the file is not GGUF, is truncated, or contradicts itself.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            with self.path.open("rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:  # ValueError: an empty file
            raise ConversionError(f"{self.path}: can't be read: {e}") from e
        try:
            self._read_header()
        except BaseException:
            self._map.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file. Arrays that `rows` gave out are copies and stay valid."""
        self._map.close()

    def rows(self, tensor: GGUFTensor, rows_per_chunk: int) -> Iterator[np.ndarray]:
        """Yield the tensor's values as fp32 arrays of up to `rows_per_chunk` rows of its first dimension, in order.

        Raises ConversionError for a type that the gguf library can't decode and for NaN or infinity.
        """
        import gguf

        kind = gguf.GGMLQuantizationType[tensor.type_name]
        n_rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        row_shape = tensor.shape[1:] if len(tensor.shape) > 1 else tensor.shape
        row_bytes = tensor.nbytes // n_rows
        for start in range(0, n_rows, rows_per_chunk):
            count = min(rows_per_chunk, n_rows - start)
            # Slicing a map copies: no array holds on to it.
            at = tensor.offset + start * row_bytes
            raw = np.frombuffer(self._map[at : at + count * row_bytes], np.uint8).reshape(count, row_bytes)
            try:
                values = gguf.quants.dequantize(raw, kind)
            except NotImplementedError as e:
                raise ConversionError(f"{self.path}: tensor {tensor.name}: type {tensor.type_name}: {e}") from e
            values = np.asarray(values, np.float32).reshape(count, *row_shape)
            if not np.isfinite(values).all():
                raise ConversionError(f"{self.path}: tensor {tensor.name} holds NaN or infinity: the file is damaged")
            yield values.reshape(row_shape) if len(tensor.shape) == 1 else values

    def array(self, tensor: GGUFTensor) -> np.ndarray:
        """All values of a small tensor, fp32."""
        return np.concatenate(list(self.rows(tensor, 1 << 20)))

    # -- the header --------------------------------------------------------------------------------------------------

    def _read_header(self) -> None:
        self._at = 0
        if self._map[:4] != b"GGUF":
            raise ConversionError(f"{self.path}: not a GGUF file (it starts with {self._map[:4]!r})")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            hint = "; it looks big-endian, which is not supported" if version & 0xFFFF == 0 else ""
            raise ConversionError(f"{self.path}: GGUF version {version}; this reads versions 2 and 3{hint}")
        n_tensors, n_values = self._scalar("Q"), self._scalar("Q")
        for _ in range(n_values):
            key = self._string()
            if key in self.metadata:
                raise ConversionError(f"{self.path}: metadata key {key} appears twice")
            self.metadata[key] = self._value(self._scalar("I"), key)
        headers = [self._tensor_header() for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ConversionError(f"{self.path}: general.alignment is {alignment!r}, not a power of two")
        data = -(-self._at // alignment) * alignment
        for name, shape, type_name, nbytes, offset in headers:
            if name in self.tensors:
                raise ConversionError(f"{self.path}: tensor {name} appears twice")
            end = data + offset + nbytes
            if end > len(self._map):
                raise ConversionError(
                    f"{self.path}: truncated: tensor {name} ends at byte {end}, the file at {len(self._map)}"
                )
            self.tensors[name] = GGUFTensor(name, shape, type_name, data + offset, nbytes)

    def _tensor_header(self) -> tuple[str, tuple[int, ...], str, int, int]:
        """(name, shape, type name, bytes, offset in the data section)."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string()
        n_dims = self._scalar("I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise ConversionError(f"{self.path}: tensor {name} has {n_dims} dimensions")
        # The file lists dimensions innermost first.
        shape = tuple(self._scalar("Q") for _ in range(n_dims))[::-1]
        type_id, offset = self._scalar("I"), self._scalar("Q")
        try:
            kind = GGMLQuantizationType(type_id)
        except ValueError:
            raise ConversionError(f"{self.path}: tensor {name} has the unknown type {type_id}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise ConversionError(f"{self.path}: tensor {name} of type {kind.name} can't have the shape {list(shape)}")
        elements = 1
        for size in shape:  # not numpy's product, which would wrap around on a damaged size
            elements *= size
        return name, shape, kind.name, elements // block * block_bytes, offset

    def _take(self, nbytes: int) -> int:
        """Move past `nbytes`; returns where they start."""
        start = self._at
        if nbytes > len(self._map) - start:
            raise ConversionError(
                f"{self.path}: truncated or damaged: {nbytes} bytes expected at byte {start} of {len(self._map)}"
            )
        self._at = start + nbytes
        return start

    def _scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self._map, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        length = self._scalar("Q")
        start = self._take(length)
        try:
            return self._map[start : start + length].decode()
        except UnicodeDecodeError as e:
            raise ConversionError(f"{self.path}: damaged: text at byte {start} is not UTF-8") from e

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._scalar("I"), self._scalar("Q")
            if item in _SCALARS:
                dtype = np.dtype("<" + _SCALARS[item]) if item != 7 else np.dtype(np.bool_)
                start = self._take(count * dtype.itemsize)
                return np.frombuffer(self._map[start : start + count * dtype.itemsize], dtype).tolist()
            if item == _STRING:
                return [self._string() for _ in range(count)]
        raise ConversionError(f"{self.path}: metadata key {key} has a type ({kind}) that this version can't read")
