"""One safetensors file: its header parsed and checked, its data mapped.

Our own parser, because a broken file must be named precisely: which file, which tensor, truncated or contradictory.
The format (https://github.com/huggingface/safetensors): u64 little-endian header length, JSON header, data without
holes.
"""

from __future__ import annotations

import json
import math
import mmap
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.errors import CorruptFileError, MissingFileError, TensorDtypeError, TruncatedFileError
from cai_runtime.slim.files import refuse_pointer

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_SIZE = 1 << 59  # elements: what torch can count, times 16 bytes at most
MAX_DIMENSIONS = 64
_COPIED_AT_ONCE = 8 << 20  # bytes of the file whose pages `corner` holds at a time

# safetensors' name -> (torch's name, bytes per element)
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
    "BOOL": ("bool", 1), "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
}  # fmt: skip
DTYPE_NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `dtype`: safetensors' name, "F32" or "BF16" say; `start`: its byte offset in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Parse and check a shard's header; the tensors in order of their offsets. Reads no tensor data.

    Raises:
        MissingFileError: no such file, or it can't be opened.
        TruncatedFileError: the file is shorter than its header, or than a tensor's end.
        CorruptFileError: the header is not what the format says: not JSON, a size contradicts a shape, tensors
            overlap or leave bytes between or behind them.
        TensorDtypeError: a dtype that this version has no tensor type for.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            prefix = f.read(8)
            if prefix == b"version ":
                refuse_pointer(prefix + f.read(64), file)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise TruncatedFileError(f"has {size} bytes, less than a safetensors header; fetch it again", file=file)
            if length > MAX_HEADER_BYTES:
                raise CorruptFileError(f"claims a header of {length} bytes; not a safetensors file?", file=file)
            if 8 + length > size:
                raise TruncatedFileError(
                    f"has {size} bytes but a header of {length}; the download or copy is incomplete, fetch it again",
                    file=file,
                )
            raw = f.read(length)
    except OSError as e:
        raise MissingFileError(f"can't be read: {e.strerror or e}", file=file) from None
    if len(raw) != length:
        raise TruncatedFileError("ended while its header was read", file=file)
    header = _parse_json(raw, file)
    infos = [_tensor_info(name, entry, file, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    infos.sort(key=lambda info: (info.start, info.nbytes))
    end = 8 + length
    for info in infos:
        if info.start + info.nbytes > size:
            raise TruncatedFileError(
                f"has {size} bytes, but the tensor ends at {info.start + info.nbytes}; the download or copy is "
                "incomplete, fetch it again",
                file=file,
                tensor=info.name,
            )
        if info.start != end:
            what = "overlaps the one before" if info.start < end else "leaves a hole before it"
            raise CorruptFileError(f"the tensor {what}", file=file, tensor=info.name)
        end += info.nbytes
    if end != size:
        raise CorruptFileError(f"has {size - end} bytes behind the last tensor", file=file)
    return {info.name: info for info in infos}


def _parse_json(raw: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise CorruptFileError(f"the header is not valid JSON: {e}", file=file) from None
    if not isinstance(header, dict):
        raise CorruptFileError("the header is not a JSON object", file=file)
    return header


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON lets through
        return False
    return True


def _tensor_info(name: str, entry: object, file: Path, data_start: int) -> TensorInfo:
    def is_sizes(value: object) -> bool:
        return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_SIZE for v in value)

    if not _is_utf8(name):
        raise CorruptFileError(f"the name {name!r} is not valid Unicode", file=file)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFileError("the header's entry must have dtype, shape and data_offsets", file=file, tensor=name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    sizes_ok = is_sizes(shape) and len(shape) <= MAX_DIMENSIONS and math.prod(d for d in shape if d) <= MAX_SIZE
    if not sizes_ok or not is_sizes(offsets) or len(offsets) != 2:
        raise CorruptFileError(f"shape {shape!r} or data_offsets {offsets!r} is malformed", file=file, tensor=name)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise TensorDtypeError(f"dtype {dtype!r} is unknown", file=file, tensor=name)
    wanted = math.prod(shape) * DTYPES[dtype][1]
    if offsets[1] - offsets[0] != wanted:
        raise CorruptFileError(
            f"takes {offsets[1] - offsets[0]} bytes, but shape {shape} of {dtype} needs {wanted}",
            file=file,
            tensor=name,
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + offsets[0], wanted)


class MappedFile:
    """A file mapped on first use. Tensors made from it keep the mapping alive after `close`."""

    # The kernel maps neighbours of a touched page along with it (fault-around, 64 KiB by default), so pages are
    # dropped in windows of that size; a neighbour dropped too early is only mapped again.
    _WINDOW = max(mmap.ALLOCATIONGRANULARITY, 1 << 16)

    def __init__(self, file: Path):
        self._file = file
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    def _mapping(self) -> mmap.mmap:
        with self._lock:
            if self._map is None:
                try:
                    with self._file.open("rb") as f:
                        self._map = _map_private(f.fileno())
                except (OSError, ValueError) as e:
                    raise MissingFileError(f"can't be mapped: {e}", file=self._file) from None
            return self._map

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """The tensor over the mapped bytes, nothing read yet. A tensor whose place is not a multiple of its element
        size (files of old writers) is a copy."""
        import torch

        dtype = getattr(torch, DTYPES[info.dtype][0])
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype, device="cpu")
        mapping = self._mapping()
        if info.start + info.nbytes > len(mapping):
            raise TruncatedFileError("the file shrank since it was opened", file=info.file, tensor=info.name)
        if info.start % dtype.itemsize:
            raw = torch.frombuffer(mapping, dtype=torch.uint8, count=info.nbytes, offset=info.start).clone()
            return raw.view(dtype).view(info.shape)
        count = info.nbytes // dtype.itemsize
        return torch.frombuffer(mapping, dtype=dtype, count=count, offset=info.start).view(info.shape)

    def corner(self, info: TensorInfo, shape: tuple[int, ...]) -> torch.Tensor:
        """The first shape[0] rows, and of them the first shape[1] columns, of a tensor with as many dimensions. Leading rows
        are a view of the mapped bytes; leading columns are copied row by row, letting go of each page behind."""
        import torch

        if shape == info.shape:  # a scalar has no rows
            return self.tensor(info)
        rows = shape[0]
        row_bytes = info.nbytes // max(info.shape[0], 1)
        whole = self.tensor(replace(info, shape=(rows, *info.shape[1:]), nbytes=rows * row_bytes))
        if shape[1:] == info.shape[1:]:
            return whole
        found = torch.empty(shape, dtype=whole.dtype, device="cpu")
        at_once = max(1, _COPIED_AT_ONCE // max(row_bytes, 1))
        for start in range(0, rows, at_once):
            stop = min(start + at_once, rows)
            found[start:stop] = whole[start:stop, : shape[1]]
            self.release(info.start + start * row_bytes, (stop - start) * row_bytes)
        return found

    def release(self, start: int, nbytes: int) -> None:
        """Drop the resident pages of a byte range. Tensors over it stay valid: a later read maps the pages again."""
        mapping = self._map
        if mapping is None or nbytes == 0 or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = start // self._WINDOW * self._WINDOW
        last = min(-(-(start + nbytes) // self._WINDOW) * self._WINDOW, len(mapping))
        mapping.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Let go of the mapping. Never `mmap.close`: torch.frombuffer keeps the map object alive but not its buffer locked,
        so that closing would pull the memory from under live tensors. It is unmapped with the last of them."""
        with self._lock:
            self._map = None


def _map_private(fd: int) -> mmap.mmap:
    # Private and writable, because torch wants writable memory; a write would touch this process's copy of a page
    # and never the file. Without MAP_NORESERVE Linux refuses to map a shard larger than its free memory this way.
    if sys.platform == "linux":
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
        return mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
