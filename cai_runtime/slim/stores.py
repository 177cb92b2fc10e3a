"""How a core's numbers are stored: fp32, bf16, fp16, int8 with one fp32 scale per row of the core's matrix, or int4 with a
scale per group of columns (see `int4.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cai_runtime.errors import (
    InvalidConfigError,
    NonFiniteTensorError,
    TensorDtypeError,
    TensorShapeError,
    UnknownStoreError,
)
from cai_runtime.slim.int4 import MAX_CODE, dequantize_int4, quantize_int4
from cai_runtime.slim.shard import DTYPE_NAMES, DTYPES
from cai_runtime.slim.spec import STORES, StoreType, matrix_shape

INT8_MAX = 127  # symmetric: -128 is never written, so that a product of two codes always fits 15 bits
_CHUNK = 1 << 17  # elements; keeps the finite check inside the cache
_EXPONENT_BITS = {
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}


@dataclass(frozen=True)
class CoreData:
    """One stored core.

    Attributes:
        data: the packed tensor, in the shape and dtype on disk.
        scale: int8: fp32 [matrix rows]; int4: bf16 [matrix rows, groups]; otherwise None.
        store: a name of `STORES`.
        zero: int4 with zero points: uint8 of the scale's shape; otherwise None.
        shape: the core's, 2-D or the 4-D of an mpo core. Needed for int4, whose data does not tell; others take `data`'s.
    """

    data: torch.Tensor
    scale: torch.Tensor | None
    store: str
    zero: torch.Tensor | None = None
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.shape:
            if self.store in STORES and STORES[self.store].bits == 4:
                raise InvalidConfigError(f"a core stored as {self.store} needs its shape")
            object.__setattr__(self, "shape", tuple(self.data.shape))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What there is on disk: what follows the core's name ("", "_scale", "_zero") -> tensor."""
        found = {"": self.data, "_scale": self.scale, "_zero": self.zero}
        return {suffix: tensor for suffix, tensor in found.items() if tensor is not None}

    def matrix(self) -> torch.Tensor:
        """[rows, columns] in the stored dtype, as the runtime applies it; int4: the packed codes of that matrix, uint8
        [rows, ceil(columns / 2)]. See `as_matrix`."""
        return self.data if store_type(self.store).bits == 4 else as_matrix(self.data)

    def values(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The core's numbers in its own shape, computed in fp32 or in `dtype` where that is wider.

        Raises:
            TensorShapeError, TensorDtypeError: the tensors are not those of the store.
        """
        self.check_layout()
        store = store_type(self.store)
        if self.scale is None:
            return self.data.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        if store.bits == 4:
            columns = matrix_shape(self.shape)[1]
            matrix = dequantize_int4(self.data, self.scale, self.zero, columns, store.group, wide)
            return from_matrix(matrix, self.shape).to(dtype)
        return (self.data.to(wide) * spread_rows(self.scale.to(wide), self.data.shape)).to(dtype)

    def check_layout(self, name: str | None = None) -> None:
        """Whether shapes and dtypes are those of the store; no value is read. `name`: the core's, for the errors.

        Raises:
            TensorShapeError, TensorDtypeError: they are not, or a tensor is missing or one too many.
            UnknownStoreError: no such store.
        """
        wanted, given = store_type(self.store).tensors(self.shape), self.tensors
        for suffix in dict.fromkeys([*wanted, *given]):
            tensor = None if name is None else name + suffix
            if suffix not in wanted:
                raise TensorShapeError(f"a core stored as {self.store} has no {suffix[1:]}", tensor=tensor)
            dtype, shape = wanted[suffix]
            if suffix not in given or tuple(given[suffix].shape) != shape:
                found = f"is {list(given[suffix].shape)}" if suffix in given else "there is none"
                raise TensorShapeError(
                    f"a core {list(self.shape)} stored as {self.store} needs {dtype} {list(shape)}, {found}",
                    tensor=tensor,
                )
            if _dtype_name(given[suffix]) != dtype:
                raise TensorDtypeError(
                    f"a core stored as {self.store} needs {dtype}, is {given[suffix].dtype}", tensor=tensor
                )


def store_type(store: str) -> StoreType:
    """Raises UnknownStoreError for a name that is none of `STORES`."""
    if store not in STORES:
        raise UnknownStoreError(f"store {store!r} is unknown; this version knows {', '.join(STORES)}")
    return STORES[store]


def damage(suffix: str, tensor: torch.Tensor, store: str, core_shape: tuple[int, ...]) -> str | None:
    """What is wrong with the values of one of a core's tensors, by its suffix (`StoreType.tensors`), or None. NaN and
    infinity are `all_finite`'s to find, but a NaN scale is not positive either."""
    if not tensor.numel():
        return None
    if suffix == "_scale":
        return None if bool((tensor > 0).all()) else "a scale is not positive"
    if suffix == "_zero":
        return None if int(tensor.max()) <= MAX_CODE else f"a zero point is above {MAX_CODE}"
    if STORES[store].bits == 4 and matrix_shape(core_shape)[1] % 2 and int(tensor[:, -1].max()) > MAX_CODE:
        return "the unused half of a row's last byte is not zero"
    return None


def as_matrix(core: torch.Tensor) -> torch.Tensor:
    """A core as the matrix that is applied, [rows, columns]: itself when 2-D; for an mpo core
    [chi_{k-1}, out_k, in_k, chi_k] rows (out_k, chi_k) and columns (chi_{k-1}, in_k), a copy unless the layout
    allows a view.
    """
    if core.ndim == 2:
        return core
    left, out, inp, right = core.shape
    return core.permute(1, 3, 0, 2).reshape(out * right, left * inp)


def from_matrix(matrix: torch.Tensor, core_shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `as_matrix`: a core's matrix in the core's own shape, as a view."""
    if len(core_shape) == 2:
        return matrix
    left, out, inp, right = core_shape
    return matrix.reshape(out, right, left, inp).permute(2, 0, 3, 1)


def spread_rows(rows: torch.Tensor, core_shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """One value per matrix row, [rows], as a view that broadcasts over the core in its own shape."""
    if len(core_shape) == 2:
        return rows[:, None]
    _, out, _, right = core_shape
    return rows.view(1, out, 1, right)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. One pass in chunks, without temporaries of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    flat = tensor.detach().reshape(-1)
    if flat.device.type != "cpu" or flat.dtype not in _EXPONENT_BITS:
        parts = flat.split(_CHUNK)
        return all(bool((part.float() if part.itemsize == 1 else part).isfinite().all()) for part in parts)
    # NaN and infinity are the numbers whose exponent bits are all ones. As integers in numpy: on one thread, because
    # torch's reductions over chunks this small lose more to waking threads than they gain when the cores are busy.
    as_int, mask = _EXPONENT_BITS[flat.dtype]
    bits = flat.view(as_int).numpy()
    wanted, scratch = bits.dtype.type(mask), np.empty(min(_CHUNK, bits.size), bits.dtype)
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK]
        if np.bitwise_and(part, wanted, out=scratch[: part.size]).max() == wanted:
            return False
    return True


def quantize(tensor: torch.Tensor, store: str) -> CoreData:
    """Pack one core, 2-D or a 4-D mpo core, float of any width, each value rounded to the nearest of its store.

    int8: scale = max|row| / 127, code = round(value / scale), so that the error is at most scale / 2. int4: the scale of
    a group (and its zero point) is the one of a few that gives the least squared error. The result shares no memory with
    `tensor`.

    Raises:
        UnknownStoreError: `store` is not one of `STORES`.
        NonFiniteTensorError: a value is NaN or infinite, or too large for the store (fp16 ends at 65504).
    """
    kind = store_type(store)
    if tensor.ndim not in (2, 4) or not tensor.is_floating_point():
        raise InvalidConfigError(f"a core must be a 2-D or 4-D float tensor, is {tuple(tensor.shape)} {tensor.dtype}")
    tensor = tensor.detach()
    if not all_finite(tensor):
        raise NonFiniteTensorError("the core to store holds NaN or infinity")
    if kind.scale is None:
        data = tensor.to(getattr(torch, DTYPES[kind.dtype][0]), copy=True).contiguous()
        if not all_finite(data):
            raise NonFiniteTensorError(
                f"a value of the core exceeds the range of {store}; store it as bf16, int8 or fp32"
            )
        return CoreData(data, None, store)
    values = tensor.to(torch.float32)
    if not all_finite(values):
        raise NonFiniteTensorError("a value of the core exceeds the range of fp32")
    shape = tuple(values.shape)
    if kind.bits == 4:
        data, scale, zero = quantize_int4(as_matrix(values), kind.group, kind.zeros)
        return CoreData(data, scale, store, zero, shape)
    reduced = 1 if values.ndim == 2 else (0, 2)
    if values.numel() == 0:
        peak = values.new_zeros(matrix_shape(shape)[0])
    else:
        peak = values.abs().amax(dim=reduced).reshape(-1)
    # A row of zeros, or of denormals, gets the smallest normal scale: no division by zero, and the bound holds.
    scale = (peak / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (values / spread_rows(scale, shape)).round_().clamp_(-INT8_MAX, INT8_MAX)
    return CoreData(codes.to(torch.int8).contiguous(), scale.contiguous(), store)


def _dtype_name(tensor: torch.Tensor) -> str | None:
    return DTYPE_NAMES.get(str(tensor.dtype).removeprefix("torch."))
