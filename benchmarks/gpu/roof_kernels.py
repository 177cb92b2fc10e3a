"""Triton kernels that measure the machine, not the library; see roofs.py."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def nothing(x):
    tl.store(x, 0.0, mask=tl.program_id(0) < 0)


@triton.jit
def nothing_dependent(x):
    gdc_wait()
    gdc_launch_dependents()
    tl.store(x, 0.0, mask=tl.program_id(0) < 0)


@triton.jit
def read(x, out, steps, BLOCK: tl.constexpr):
    """Each program sums `steps` blocks; in each step, the blocks of all programs are adjacent in memory."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stride = tl.num_programs(0) * BLOCK
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for _ in range(steps):
        total += tl.load(x + at)
        x += stride
    tl.store(out + tl.program_id(0), tl.sum(total))


@triton.jit
def barriers(counter, programs, rounds):
    """Runs `rounds` barriers across all programs, which must be resident at once."""
    for i in range(rounds):
        tl.debug_barrier()
        tl.atomic_add(counter, 1, sem="acq_rel")
        seen = tl.atomic_add(counter, 0, sem="acquire")
        while seen < (i + 1) * programs:
            seen = tl.atomic_add(counter, 0, sem="acquire")
        tl.debug_barrier()
