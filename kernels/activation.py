"""SwiGLU (Shazeer 2020): silu(gate) * up over a row that holds both. GELU (Hendrycks and Gimpel 2016): x Phi(x)."""

from __future__ import annotations

from typing import Any

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.cpu_library import check_rows
from cai_runtime.kernels.program import Value


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [M, 2 I], the gate first -> [M, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x) = x (1 + erf(x / sqrt 2)) / 2, element by element: the exact form, not that of tanh."""
    return torch.nn.functional.gelu(x)


def swiglu_cpu(gate_up: Any) -> Any:
    """gate_up fp32 [M, 2 I], or a Value of a pass being recorded."""
    width = gate_up.width if isinstance(gate_up, Value) else gate_up.shape[-1] if gate_up.dim() else 1
    if width % 2:
        raise KernelError(f"swiglu takes gate and up side by side, not {width} columns")
    if isinstance(gate_up, Value):
        return gate_up.recorder.note("swiglu", [gate_up], gate_up.width // 2)
    gate_up = check_rows(gate_up, width, "swiglu").contiguous()
    out = cpu_library.empty(gate_up.shape[0], width // 2)
    cpu_library.operation("swiglu")(gate_up, out)
    return out


def gelu_cpu(x: Any) -> Any:
    """x fp32 [M, I] -> x Phi(x), error below 1e-6 (of |x| above 9: a unit in its last place). Or a Value of a pass being
    recorded."""
    if isinstance(x, Value):
        return x.recorder.note("gelu", [x], x.width)
    x = check_rows(x, x.shape[-1] if x.dim() else 0, "gelu")
    out = cpu_library.empty(x.shape[0], x.shape[1])
    cpu_library.operation("gelu")(x, out)
    return out
