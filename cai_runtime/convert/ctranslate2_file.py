"""Reading CTranslate2's `model.bin`: named variables and aliases. Every length in the file is checked before it is
believed, and nothing in it is executed.

Layout of binary version 6, little-endian, without padding: the version (uint32), the name of the specification, its
revision (uint32), the number of variables (uint32); for each its name, rank (uint8), sizes (uint32 each), type (uint8),
bytes (uint32) and data; then the number of aliases (uint32) and for each its name and that of the variable it stands
for. A string is its length with a closing zero (uint16), its UTF-8, and the zero.

Format: `ModelSpec` in https://github.com/OpenNMT/CTranslate2/blob/master/python/ctranslate2/specs/model_spec.py
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cai_runtime.errors import ConversionError

VERSION = 6
# Type number to name and bytes a value.
TYPES = (("float32", 4), ("int8", 1), ("int16", 2), ("int32", 4), ("float16", 2), ("bfloat16", 2))
_MAX_DIMS = 4
_MAX_NAME = 1024  # of a specification or variable; published ones stay below 80


@dataclass(frozen=True)
class Variable:
    """One variable of the file. `shape` is row-major, () for a scalar; `offset`: absolute, in bytes."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    nbytes: int


class CTranslate2File:
    """An open model.bin, memory-mapped. A context manager.

    `spec`, `revision`: which layout of variables it has, such as "WhisperSpec"; `variables`: by name; `aliases`: another
    name to a variable's.
    Raises ConversionError when the file is not CTranslate2's, of another version, truncated, or contradicts itself.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.variables: dict[str, Variable] = {}
        self.aliases: dict[str, str] = {}
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

    def __enter__(self) -> CTranslate2File:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file. Arrays that were given out are copies and stay valid."""
        self._map.close()

    def __contains__(self, name: object) -> bool:
        return name in self.variables or name in self.aliases

    def variable(self, name: str) -> Variable:
        """A variable, or what an alias stands for. Raises ConversionError when there is none."""
        found = self.variables.get(self.aliases.get(name, name))
        if found is None:
            raise ConversionError(f"{self.path}: variable {name} is missing")
        return found

    def scalar(self, name: str) -> int:
        """The value of an integer without dimensions."""
        variable = self.variable(name)
        if variable.shape or not variable.type_name.startswith("int"):
            raise ConversionError(f"{self.path}: variable {name} is not one integer")
        return int(self._stored(variable)[()])

    def array(self, name: str) -> np.ndarray:
        """The variable's values, fp32: 8- and 16-bit integers divided by their scale, `<name>_scale` (an alias: its own or
        the variable's), which has one value for each row (first dimension) or one for all.

        Raises ConversionError for integers without a scale, a scale of another shape, NaN and infinity.
        """
        variable = self.variable(name)
        values = self._stored(variable)
        if variable.type_name == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        values = values.astype(np.float32)
        if variable.type_name.startswith("int"):
            scale_name = next((n for n in (f"{name}_scale", f"{variable.name}_scale") if n in self), f"{name}_scale")
            if variable.type_name == "int32" or scale_name not in self:
                raise ConversionError(f"{self.path}: variable {name} holds {variable.type_name} without a scale")
            scale = self.array(scale_name)
            if scale.shape not in ((), (1,), values.shape[:1]) or not scale.all():
                raise ConversionError(
                    f"{self.path}: variable {scale_name} of shape {list(scale.shape)} can't scale {list(values.shape)}"
                )
            values /= scale.reshape(-1, *[1] * (values.ndim - 1))
        if not np.isfinite(values).all():
            raise ConversionError(f"{self.path}: variable {name} holds NaN or infinity: the file is damaged")
        return values

    def _stored(self, variable: Variable) -> np.ndarray:
        """A copy as it lies in the file; bf16 as its bits, uint16."""
        dtype = np.dtype("uint16" if variable.type_name == "bfloat16" else variable.type_name).newbyteorder("<")
        raw = self._map[variable.offset : variable.offset + variable.nbytes]
        return np.frombuffer(raw, dtype).reshape(variable.shape)

    # -- the header --------------------------------------------------------------------------------------------------

    def _read_header(self) -> None:
        self._at = 0
        version = self._number("I")
        if not 0 < version < 256:  # a real version is small; anything else is another kind of file
            raise ConversionError(f"{self.path}: not a CTranslate2 model (it starts with {self._map[:4]!r})")
        if version != VERSION:
            raise ConversionError(
                f"{self.path}: CTranslate2 binary version {version}; this reads version {VERSION}: convert the model again "
                "with a newer ctranslate2"
            )
        self.spec = self._string()
        self.revision = self._number("I")
        for _ in range(self._number("I")):
            variable = self._variable()
            if variable.name in self.variables:
                raise ConversionError(f"{self.path}: variable {variable.name} appears twice")
            self.variables[variable.name] = variable
        for _ in range(self._number("I")):
            alias, name = self._string(), self._string()
            if alias in self or name not in self.variables:
                raise ConversionError(f"{self.path}: alias {alias} stands for {name}, which can't be")
            self.aliases[alias] = name
        if self._at != len(self._map):
            raise ConversionError(f"{self.path}: {len(self._map) - self._at} bytes behind the model's end: damaged")

    def _variable(self) -> Variable:
        name, n_dims = self._string(), self._number("B")
        if n_dims > _MAX_DIMS:
            raise ConversionError(f"{self.path}: variable {name} has {n_dims} dimensions")
        shape = tuple(self._number("I") for _ in range(n_dims))
        type_id, nbytes = self._number("B"), self._number("I")
        if type_id >= len(TYPES):
            raise ConversionError(f"{self.path}: variable {name} has the unknown type {type_id}")
        type_name, size = TYPES[type_id]
        for length in shape:  # not numpy's product, which would wrap around on a damaged size
            size *= length
        if size != nbytes:
            raise ConversionError(
                f"{self.path}: variable {name} has {nbytes} bytes, its shape {list(shape)} needs {size}"
            )
        return Variable(name, shape, type_name, self._take(nbytes), nbytes)

    def _take(self, nbytes: int) -> int:
        """Move past `nbytes`; returns where they start."""
        start = self._at
        if nbytes > len(self._map) - start:
            raise ConversionError(
                f"{self.path}: truncated or damaged: {nbytes} bytes expected at byte {start} of {len(self._map)}"
            )
        self._at = start + nbytes
        return start

    def _number(self, code: str) -> int:
        return struct.unpack_from("<" + code, self._map, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        length = self._number("H")
        start = self._take(length)
        raw = self._map[start : start + length]
        if not 2 <= length <= _MAX_NAME or raw[-1] != 0 or 0 in raw[:-1]:
            raise ConversionError(f"{self.path}: damaged, or not a CTranslate2 model: no name at byte {start}")
        try:
            return raw[:-1].decode()
        except UnicodeDecodeError as e:
            raise ConversionError(f"{self.path}: damaged: the name at byte {start} is not UTF-8") from e
