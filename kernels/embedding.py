"""Token embedding: rows of a stored matrix, dequantized. A tied head uses the same packed matrix."""

from __future__ import annotations

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
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
        self._fields = torch.tensor(matrix.fields, dtype=torch.int64)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int32 [M] -> fp32 [M, H]. Raises KernelError for an id outside the table."""
        ids = ids.to(torch.int32).contiguous()
        out = torch.empty(ids.shape[0], self.hidden)
        try:
            cpu_library.function("gather")(self._fields.data_ptr(), ids.data_ptr(), ids.shape[0], out.data_ptr())
        except IndexError as e:
            raise KernelError(str(e)) from None
        return out
