"""What every launch of a kernel with matrix products decides the same way."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl

_NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}


def interpreting() -> bool:
    """Whether `TRITON_INTERPRET=1` was set when triton was imported: kernels run on the CPU."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def compute_capability(device: torch.device) -> int:
    """The first number of an NVIDIA device's; 0 elsewhere."""
    if device.type != "cuda" or torch.version.hip is not None or interpreting():
        return 0
    return torch.cuda.get_device_capability(device)[0]


def is_hopper(device: torch.device) -> bool:
    """Whether the device has products of warp groups (wgmma)."""
    return compute_capability(device) == 9


def operand_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype that the operands of a matrix product have. The interpreter keeps bfloat16 as raw 16-bit integers and
    would multiply those: there the same values are multiplied as float32."""
    return tl.float32 if interpreting() and dtype == torch.bfloat16 else _NAMES[dtype]


def compile_options(
    num_warps: int, num_stages: int, *, max_registers: int | None = None, hip: bool | None = None
) -> dict[str, int]:
    """Launch options for the vendor (hip None: the one torch was built for). AMD: one shape of matrix instruction for every
    tile, and two stages, which fit its 64 KB of shared memory."""
    if torch.version.hip is not None if hip is None else hip:
        return {"num_warps": num_warps, "num_stages": 2, "matrix_instr_nonkdim": 16}
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return options if max_registers is None else options | {"maxnreg": max_registers}


def on_device(t: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """The context in which a launch goes to `t`'s GPU; free where that is the current one."""
    if t.device.type == "cuda" and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()


def number_class(value: int) -> int:
    """What Triton compiles an integer argument for: 1 is a constant, multiples of 16 are known as such, 64 bits apart."""
    if value == 1:
        return -1
    return (16 if value % 16 == 0 else 0) + (value >> 31 != 0)


def pointer_class(t: torch.Tensor | None) -> int:
    """What Triton compiles a pointer argument of a known dtype for: absent, aligned to 16 bytes, or neither."""
    return -1 if t is None else t.data_ptr() & 15 == 0


class Launcher:
    """A kernel with arguments that mostly stay, launched past Triton's binder.

    The binder looks at every argument of every launch to find the compiled kernel, tens of microseconds where there are
    fifty. Here the first launch of a `key` goes through it, and later ones straight to what that compiled. So a key must
    say all that the binder would: `number_class` and `pointer_class` of each argument that may change, and the constants.
    """

    def __init__(self, kernel: Any):
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        key: Hashable,
        grid: tuple[int, int, int],
        head: tuple[Any, ...],
        kept: tuple[tuple[Any, ...], tuple[Any, ...]],
        constants: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        """Launch with head, then what is kept between launches (as tensors, and with addresses in their place), then
        constants."""
        tensors, addresses = kept
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*head, *addresses, *constants)
            return
        compiled = self._kernel[grid](*head, *tensors, *constants, **options)
        if compiled is not None:  # None: interpreted
            self._compiled[key] = compiled
