"""Programmatic dependent launch: a kernel's programs start while the kernel ahead of it ends, and wait for it themselves.

Every kernel waits before its first access to memory, and only then lets the next one start: the end of a kernel then means
the end of all before it. What is saved is the time between kernels; the CUDA decode kernel behind one of these has its
weights fetched meanwhile. `aot.py` checks in the compiled code that nothing is read before the wait."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from cai_runtime.kernels.triton.launch import compute_capability


@triton.jit
def wait_for_previous_kernel(DEPENDENT: tl.constexpr):
    """First in a kernel. DEPENDENT: whether it is launched so."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launches_dependently(device: torch.device) -> bool:
    """Whether the device has it: NVIDIA's, of compute capability 9.0 or later."""
    return compute_capability(device) >= 9


def dependent_options(device: torch.device) -> dict[str, Any]:
    """A launch's keyword arguments: the kernel's constant DEPENDENT, and the launch option where there is one."""
    return {"DEPENDENT": True, "launch_pdl": True} if launches_dependently(device) else {"DEPENDENT": False}
