"""A PTX interpreter: executes on the CPU what Triton compiled for an NVIDIA GPU, so that tests see the compiled code.

    program.py     text -> instructions, registers, labels
    values.py      PTX types as numpy arrays, operands, results
    scalar.py      arithmetic, comparisons, conversions
    movement.py    loads, stores, asynchronous copies, shuffles
    matrix.py      mma, wgmma, ldmatrix, stmatrix
    memory.py      global and shared memory, with bounds
    machine.py     threads, branches, barriers
    device.py      launches of Triton kernels go to a machine instead of a GPU

All threads of all blocks run in lockstep, each register an array over the threads. So a race between warps is not seen. What
is seen: a wrong layout, mask, address or alignment, a read of shared memory before its copy was waited for, two threads
that store different values to one address, a barrier that a part of a block skips. An unknown instruction raises.

Semantics: PTX ISA 8.8 (NVIDIA), https://docs.nvidia.com/cuda/parallel-thread-execution. Fused multiply-adds, matrix products
and approximations are rounded from float64, once.
"""
