"""Global memory, where only what the arguments own may be touched, and the shared memory of blocks."""

from __future__ import annotations

import numpy as np

from ptx.program import PtxError
from ptx.values import Array

GUARD = 256  # bytes between allocations that nobody owns


class Memory:
    """Bytes at addresses from `base` on. What was never written is all ones: NaN as a float."""

    def __init__(self, size: int, base: int):
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.base = base

    def offsets(self, addresses: Array, threads: Array, size: int) -> Array:
        """Where in `bytes` `size` bytes at the addresses of some threads lie. Raises PtxError unless they are there,
        owned and aligned."""
        raise NotImplementedError

    def load(self, offsets: Array, dtype: np.dtype, count: int) -> list[Array]:
        words, at = self.bytes.view(dtype), offsets // dtype.itemsize
        return [words[at + i] for i in range(count)]

    def store(self, offsets: Array, values: list[Array]) -> None:
        """Raises PtxError if two threads store different values to one address."""
        for i, value in enumerate(values):
            words, at = self.bytes.view(value.dtype), offsets // value.dtype.itemsize + i
            words[at] = value
            if not np.array_equal(words[at], value):
                raise PtxError("two threads store different values to one address")


class Global(Memory):
    def __init__(self, size: int):
        super().__init__(-(-size // 128) * 128, 1 << 20)
        self._owned = np.zeros(len(self.bytes), bool)
        self._end = GUARD

    def allocate(self, data: Array, alignment: int) -> int:
        """The address of a copy of `data` (bytes), which is `alignment` beyond a multiple of 128."""
        start = -(-self._end // 128) * 128 + alignment
        self._end = start + len(data) + GUARD
        self.bytes[start : start + len(data)] = data
        self._owned[start : start + len(data)] = True
        return self.base + start

    def at(self, address: int, size: int) -> Array:
        return self.bytes[address - self.base : address - self.base + size]

    def offsets(self, addresses: Array, threads: Array, size: int) -> Array:
        found = addresses.view(np.int64) - self.base
        if (addresses % np.uint64(size)).any():
            raise PtxError(f"an address is not a multiple of {size}")
        inside = (found >= 0) & (found <= len(self.bytes) - size)
        if not inside.all() or not (self._owned[found].all() and self._owned[found + size - 1].all()):
            raise PtxError("an address is outside of every argument")
        return found


class Shared(Memory):
    """`size` bytes for each block, whose addresses start at 0."""

    def __init__(self, size: int, blocks: int, threads: int):
        self._size = -(-size // 128) * 128
        self._used = size
        super().__init__(self._size * blocks, 0)
        self._start = np.repeat(np.arange(blocks, dtype=np.int64) * self._size, threads)

    def offsets(self, addresses: Array, threads: Array, size: int) -> Array:
        at = addresses.astype(np.int64)
        if (at % size).any():
            raise PtxError(f"a shared address is not a multiple of {size}")
        if (at + size > self._used).any():
            raise PtxError(f"a shared address is beyond the block's {self._used} bytes")
        return at + self._start[threads]
