"""How a core's numbers are stored: fp32, bf16, fp16, or int8 with one fp32 scale per row of the core's matrix."""

from __future__ import annotations

import numpy as np
import torch

from cai_runtime.errors import InvalidConfigError, NonFiniteTensorError, UnknownStoreError
from cai_runtime.slim.spec import STORES

FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INT8_MAX = 127  # symmetric: -128 is never written, so that a product of two codes always fits 15 bits
_CHUNK = 1 << 17  # elements; keeps the finite check inside the cache
_EXPONENT_BITS = {
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}


def store_dtype(store: str) -> torch.dtype:
    """The dtype of a packed tensor."""
    if store not in STORES:
        raise UnknownStoreError(f"store {store!r} is unknown; this version knows {', '.join(STORES)}")
    return FLOAT_DTYPES.get(store, torch.int8)


def as_matrix(core: torch.Tensor) -> torch.Tensor:
    """A core as the matrix that is applied, [rows, columns]: itself when 2-D; for an mpo core
    [chi_{k-1}, out_k, in_k, chi_k] rows (out_k, chi_k) and columns (chi_{k-1}, in_k), a copy unless the layout
    allows a view.
    """
    if core.ndim == 2:
        return core
    left, out, inp, right = core.shape
    return core.permute(1, 3, 0, 2).reshape(out * right, left * inp)


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


def quantize(tensor: torch.Tensor, store: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pack one core, 2-D or a 4-D mpo core, float of any width.

    Returns the packed tensor in the core's shape and, for int8, its scale, fp32 [rows of `as_matrix`]: scale =
    max|row| / 127, code = round(value / scale), so that the error is at most scale / 2. The result shares no memory
    with `tensor`.

    Raises:
        UnknownStoreError: `store` is not one of `STORES`.
        NonFiniteTensorError: a value is NaN or infinite, or too large for the store (fp16 ends at 65504).
    """
    dtype = store_dtype(store)
    if tensor.ndim not in (2, 4) or not tensor.is_floating_point():
        raise InvalidConfigError(f"a core must be a 2-D or 4-D float tensor, is {tuple(tensor.shape)} {tensor.dtype}")
    tensor = tensor.detach()
    if not all_finite(tensor):
        raise NonFiniteTensorError("the core to store holds NaN or infinity")
    if not STORES[store].scaled:
        data = tensor.to(dtype, copy=True).contiguous()
        if not all_finite(data):
            raise NonFiniteTensorError(
                f"a value of the core exceeds the range of {store}; store it as bf16, int8 or fp32"
            )
        return data, None
    values = tensor.to(torch.float32)
    if not all_finite(values):
        raise NonFiniteTensorError("a value of the core exceeds the range of fp32")
    reduced = 1 if values.ndim == 2 else (0, 2)
    if values.numel() == 0:
        peak = values.new_zeros(values.shape[0])
    else:
        peak = values.abs().amax(dim=reduced).reshape(-1)
    # A row of zeros, or of denormals, gets the smallest normal scale: no division by zero, and the bound holds.
    scale = (peak / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (values / spread_rows(scale, values.shape)).round_().clamp_(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8).contiguous(), scale.contiguous()


def dequantize(
    data: torch.Tensor, scale: torch.Tensor | None, store: str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The core's values, in its own shape, as `dtype`; code times scale is taken in fp32, or in fp64 when asked."""
    if data.dtype != store_dtype(store):
        raise InvalidConfigError(f"a core stored as {store} must be {store_dtype(store)}, is {data.dtype}")
    if not STORES[store].scaled:
        return data.to(dtype)
    if scale is None:
        raise InvalidConfigError(f"a core stored as {store} needs its scale")
    wide = torch.promote_types(dtype, torch.float32)
    return (data.to(wide) * spread_rows(scale.to(wide), data.shape)).to(dtype)
