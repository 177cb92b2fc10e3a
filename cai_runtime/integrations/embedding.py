"""A `torch.nn.Embedding` whose table is stored as int8 or int4 codes."""

from __future__ import annotations

import torch
from torch import nn

from cai_runtime.integrations.stored import StoredModule
from cai_runtime.layers.linear import kernel_weights
from cai_runtime.slim.spec import ModuleSpec


class SlimEmbedding(StoredModule):
    """Rows of a packed dense module [num_embeddings, embedding_dim]; only the rows asked for are unpacked.

    It is no `torch.nn.Embedding`: what resizes one, or trains its weight, would take codes for numbers.
    """

    def __init__(self, spec: ModuleSpec, *, padding_idx: int | None, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = spec.out_features, spec.in_features, padding_idx
        self._is_hf_initialized = True
        self._hold(spec, dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids, integers of any shape [...] -> [..., embedding_dim] in `compute_dtype`. Raises IndexError for an id outside
        the table (on a GPU, its device-side assertion)."""
        flat = ids.reshape(-1)
        with torch.no_grad():
            table = kernel_weights(self.module_weights(), dtype=None, device=self._tensor("weight").device).cores[0]
            rows = table.map(lambda t: t.index_select(0, flat)).values(torch.float32).to(self.compute_dtype)
        return rows.reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, store={self.spec.store[0]}, dtype={self.compute_dtype}"
