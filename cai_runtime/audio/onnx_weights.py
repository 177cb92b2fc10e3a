"""Reads the weights of an ONNX file: its initializers, and nothing of its program.

Format: protocol buffers (https://protobuf.dev/programming-guides/encoding) of
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_GRAPH, _INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _RAW = 1, 2, 8, 9
_FLOAT = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_initializers(path: Path) -> dict[str, np.ndarray]:
    """The file's fp32 initializers that hold raw data, by name.

    Raises OSError, and ValueError for a file that ends early or is no protocol buffer.
    """
    found: dict[str, np.ndarray] = {}
    for number, graph in _messages(memoryview(path.read_bytes())):
        if number != _GRAPH or isinstance(graph, int):
            continue
        for kind, tensor in _messages(graph):
            if kind == _INITIALIZER and not isinstance(tensor, int):
                found |= _tensor(tensor)
    return found


def _tensor(message: memoryview) -> dict[str, np.ndarray]:
    shape: list[int] = []
    name, dtype, raw = "", 0, memoryview(b"")
    for number, value in _messages(message):
        if number == _DIMS:
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif number == _DATA_TYPE and isinstance(value, int):
            dtype = value
        elif number == _NAME and not isinstance(value, int):
            name = bytes(value).decode()
        elif number == _RAW and not isinstance(value, int):
            raw = value
    if dtype != _FLOAT or len(raw) != 4 * math.prod(shape):
        return {}
    return {name: np.frombuffer(raw, "<f4").astype(np.float32).reshape(shape)}


def _messages(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of each field; numbers of fixed size come as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"field {key >> 3} has the unknown type {kind}")
        if at + size > len(data):
            raise ValueError(f"field {key >> 3} ends behind the end of the file")
        yield key >> 3, data[at : at + size]
        at += size


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number ends behind the end of the file")
