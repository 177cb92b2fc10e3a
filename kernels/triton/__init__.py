"""The Triton backend: every operation of `cai_runtime.kernels` for NVIDIA and AMD GPUs.

Importing this package imports neither torch nor triton; the first attribute does. Under `TRITON_INTERPRET=1`, set
before triton is first imported, the same kernels run on the CPU, which is how they are tested without a GPU.

Batch invariance. No reduction depends on the number of rows: the step along the reduced dimension is fixed by dtype and
int4 group alone, attention's splits lie at fixed positions, no kernel is specialized on the number of rows, and sums run
through one chain of matrix instructions of one shape (m16n8k16 on NVIDIA, 16x16 on AMD). The wider wgmma and tcgen05
instructions need 64 rows and could round a long prompt differently from a short one: the tiles' height keeps them out,
except for int8 activations, whose int32 sums are exact. `aot.py` checks that on the compiled code, and `tuning.py` lets a
measured tile change only what changes no bit.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "TritonLinear": "linear",
    "quantize_rows": "quantized_rows",
    "slim_linear": "linear",
    "grouped_linear": "linear",
    "rms_norm": "rows",
    "add_rms_norm": "rows",
    "swiglu": "rows",
    "rope_kv_write": "rope",
    "paged_attention": "attention",
}

__all__ = [
    "TritonLinear",
    "add_rms_norm",
    "available",
    "grouped_linear",
    "paged_attention",
    "quantize_rows",
    "rms_norm",
    "rope_kv_write",
    "slim_linear",
    "swiglu",
]


def available() -> bool:
    """Whether these kernels can run here: triton is installed and torch sees a GPU, or triton is interpreting."""
    try:
        import torch
        import triton
    except ImportError:
        return False
    return torch.cuda.is_available() or bool(triton.knobs.runtime.interpret)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
