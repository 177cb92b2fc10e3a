"""What every launch of a kernel with matrix products decides the same way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def interpreting() -> bool:
    """Whether `TRITON_INTERPRET=1` was set when triton was imported: kernels run on the CPU."""
    return bool(triton.knobs.runtime.interpret)


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
