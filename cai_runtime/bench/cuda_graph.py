"""Counts the kernels in a CUDA graph, through the driver's interface."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DRIVER = "libcuda.so.1"
KERNEL_NODE = 0  # CU_GRAPH_NODE_TYPE_KERNEL


def count_kernels(graph: torch.cuda.CUDAGraph, driver: Any = None) -> int | None:
    """Kernels that one replay launches; None if the driver does not say.

    graph: captured with `keep_graph=True`. driver: the driver's library; None loads it.
    """
    library = ctypes.CDLL(DRIVER) if driver is None else driver
    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    if library.cuGraphGetNodes(handle, None, ctypes.byref(count)):
        return None
    nodes = (ctypes.c_void_p * count.value)()
    if library.cuGraphGetNodes(handle, nodes, ctypes.byref(count)):
        return None
    kernels, kind = 0, ctypes.c_int()
    for node in nodes:
        if library.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)):
            return None
        kernels += kind.value == KERNEL_NODE
    return kernels
