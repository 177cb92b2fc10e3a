"""Token embedding: rows of a stored matrix, dequantized. A tied head uses the same packed matrix."""

from __future__ import annotations

from typing import Any

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.cpu_library import check_rows
from cai_runtime.kernels.program import Value
from cai_runtime.kernels.slim_linear import CpuLinear
from cai_runtime.kernels.weights import Core


def embedding_reference(table: Core, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """ids [M] -> [M, H] in `dtype`."""
    at = ids.long()
    return table.map(lambda t: t[at]).values(dtype)


class CpuEmbedding:
    """Looks rows up in the packed matrix of a dense CpuLinear, so that a tied head costs no second copy."""

    def __init__(self, head: CpuLinear):
        self._head = head
        matrix = head.first_matrix()
        self.hidden = matrix.cols
        self._matrix = cpu_library.integers(matrix.fields)

    def __call__(self, ids: Any) -> Any:
        """ids int32 [M] -> fp32 [M, H]. Or a Value int32 [M, 1]. Raises KernelError for an id outside the table."""
        if isinstance(ids, Value):
            bindings = {"matrix": self._matrix}
            return ids.recorder.note("embedding", [ids], self.hidden, bindings=bindings, keep=self)
        ids = ids.to(torch.int32).contiguous()
        out = cpu_library.empty(ids.shape[0], self.hidden)
        cpu_library.operation("gather")(self._matrix, ids, out)
        return out


def take_rows(x: Any, index: Any) -> Any:
    """Rows of x [M, H] by number, int [N] -> [N, H]. Or Values, index int32 [N, 1], on the CPU."""
    if isinstance(x, Value):
        return x.recorder.note("take_rows", [x, index], x.width, axis=index.axis)
    return x.index_select(0, index)


def add_rows(x: Any, table: torch.Tensor, index: Any = None) -> Any:
    """x [M, H] + rows of table [N, H] by number, index int32 [M]; None: row m of x and row m modulo N of the table.

    For learned and sinusoidal positions. table: in x's dtype on its device. Raises KernelError for tensors that do not fit
    and, on the CPU, for a number outside the table.
    """
    if table.dim() != 2 or x.dim() != 2 or x.shape[1] != table.shape[1]:
        raise KernelError(f"add_rows: a table {list(table.shape)} for x {list(x.shape)}")
    if index is None:
        return x + table.index_select(
            0, torch.arange(x.shape[0], dtype=torch.int64, device=x.device) % max(table.shape[0], 1)
        )
    if tuple(index.shape) != (x.shape[0],):
        raise KernelError(f"add_rows: {list(index.shape)} numbers of rows for x {list(x.shape)}")
    if x.device.type == "cpu" and index.numel() and not (0 <= int(index.min()) <= int(index.max()) < table.shape[0]):
        raise KernelError(f"add_rows: numbers {int(index.min())} to {int(index.max())} of {table.shape[0]} rows")
    return x + table.index_select(0, index)


def add_rows_cpu(x: Any, table: torch.Tensor, index: Any = None) -> Any:
    """`add_rows` by the C++ kernels: x and table fp32. Or x and index Values of a recorded pass, index int32 [M, 1]."""
    if table.dtype != torch.float32 or table.device.type != "cpu" or table.dim() != 2:
        raise KernelError(f"add_rows: the table is fp32 [N, H] on the CPU, not {table.dtype} {list(table.shape)}")
    table = table.contiguous()
    if isinstance(x, Value):
        if x.width != table.shape[1]:
            raise KernelError(f"add_rows: a table {list(table.shape)} for rows of {x.width}")
        inputs = [x] if index is None else [x, index]
        return x.recorder.note("add_rows", inputs, x.width, bindings={"table": table})
    x = check_rows(x, table.shape[1], "add_rows").contiguous()
    if index is not None:
        index = index.to(torch.int32).contiguous()
        if tuple(index.shape) != (x.shape[0],):
            raise KernelError(f"add_rows: {list(index.shape)} numbers of rows for x {list(x.shape)}")
    out = torch.empty_like(x)
    cpu_library.operation("add_rows")(x, table, index, out)
    return out
