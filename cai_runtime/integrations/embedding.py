"""A `torch.nn.Embedding` whose table is stored as int8 or int4 codes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from cai_runtime.errors import UnsupportedModelError
from cai_runtime.integrations.stored import StoredModule
from cai_runtime.layers.linear import kernel_weights
from cai_runtime.slim.spec import ModuleSpec


class SlimEmbedding(StoredModule):
    """Rows of a packed dense module [num_embeddings, embedding_dim]; only the rows asked for are unpacked.

    It is no `torch.nn.Embedding`: what resizes one, or trains its weight, would take codes for numbers.

    stock: the module whose place it takes, if that is a subclass of torch.nn.Embedding (Gemma's, which scales the rows). Its
    own forward function is then run on a table of the rows asked for. It loses its weight.
    """

    def __init__(
        self, spec: ModuleSpec, *, padding_idx: int | None, dtype: torch.dtype, stock: nn.Embedding | None = None
    ):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = spec.out_features, spec.in_features, padding_idx
        self._is_hf_initialized = True
        self._hold(spec, dtype)
        self.stock = stock
        if stock is not None:
            del stock._parameters["weight"]
            # transformers makes the module's buffers by initializing all of it, and is not to miss what it would draw.
            nothing = torch.empty(0, self.embedding_dim, dtype=dtype, device="cpu")
            nothing._is_hf_initialized = True  # type: ignore[attr-defined]
            stock.__dict__["weight"] = nothing

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids, integers of any shape [...] -> [..., embedding_dim] in `compute_dtype`. Raises IndexError for an id outside
        the table (on a GPU, its device-side assertion)."""
        flat = ids.reshape(-1)
        with torch.no_grad():
            table = kernel_weights(self.module_weights(), dtype=None, device=self._tensor("weight").device).cores[0]
            rows = table.map(lambda t: t.index_select(0, flat)).values(torch.float32).to(self.compute_dtype)
        if self.stock is None:
            return rows.reshape(*ids.shape, self.embedding_dim)
        order = torch.arange(flat.numel(), dtype=torch.int64, device=rows.device)
        return self._stock_forward(rows, order.reshape(ids.shape))

    def check(self, name: str) -> None:
        """As `StoredModule.check`; and whether the stock module gives for an id what it makes of that row alone.

        Raises UnsupportedModelError when it does not, besides what that raises.
        """
        super().check(name)
        device = self._tensor("weight").device
        if self.stock is None or device.type == "meta":
            return
        column = torch.arange(1, self.num_embeddings + 1, dtype=torch.float32, device=device)
        column = column.to(self.compute_dtype)[:, None]
        ids = torch.tensor([[0, self.num_embeddings // 2, self.num_embeddings - 1]], dtype=torch.int64, device=device)
        whole = self._stock_forward(column, ids)
        order = torch.arange(3, dtype=torch.int64, device=device)[None]
        if not torch.equal(whole, self._stock_forward(column[ids[0]], order)):
            raise UnsupportedModelError(
                f"{name} is a {type(self.stock).__name__}, which is more than a table of rows; in transformers a packed "
                "embedding can't stand for it. Use `cai export --dense`"
            )

    def _stock_forward(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """What the stock module gives for these ids of another table, [rows, width]."""
        assert self.stock is not None
        view = copy.copy(self.stock)  # its own attributes, the same buffers
        view.__dict__["weight"] = table
        view.num_embeddings, view.padding_idx = table.shape[0], None
        with torch.no_grad():
            found: torch.Tensor = type(view).forward(view, ids)
        return found

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, store={self.spec.store[0]}, dtype={self.compute_dtype}"
