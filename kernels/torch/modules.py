"""Prepared operations as `torch.nn.Module`s that torch.compile (with fullgraph=True) and torch.export can see through.

    qkv = prepare_module([q, k, v])            # for `prepare`
    qkv = torch_module(prepare([q, k, v]))     # of what is prepared already
    attention = Attention(heads, cache)

A module shares the prepared object's memory and gives its bits. Its tensors are buffers that are not saved with a
state_dict: the weights' file is the slim checkpoint. An exported program holds them, packed as this version packs them, so
it is for the version that wrote it; the process that loads it imports this module first. Inference only, see `ops`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch.utils import _pytree

from cai_runtime.errors import KernelError
from cai_runtime.kernels.attention import (
    CpuAttention,
    CpuKVCache,
    HeadLayout,
    HeadNorms,
    ReferenceAttention,
    ReferenceKVCache,
)
from cai_runtime.kernels.backend import resolve_backend
from cai_runtime.kernels.batch import FULL, AttentionBatch, PageTable
from cai_runtime.kernels.cpu_library import Arena
from cai_runtime.kernels.embedding import CpuEmbedding
from cai_runtime.kernels.norm import LayerNorm, RmsNorm
from cai_runtime.kernels.prepare import prepare
from cai_runtime.kernels.slim_linear import (
    MpoLinear,
    MpoShape,
    PreparedLinear,
    Prologue,
    SideBySide,
    as_dense,
    contract_mpo,
    side_by_side,
)
from cai_runtime.kernels.torch import ops
from cai_runtime.kernels.torch.frozen import Frozen, as_text, freeze, freeze_core, freeze_members
from cai_runtime.kernels.torch.relocation import strip_addresses
from cai_runtime.kernels.weights import Core, LinearWeights

# So that a step's batch can be an argument of an exported program, and an example of it can be in the program's file.
if AttentionBatch not in _pytree.SUPPORTED_NODES:
    for kind in (AttentionBatch, PageTable):
        torch.export.register_dataclass(kind, serialized_type_name=f"cai_runtime.{kind.__name__}")
        torch.serialization.add_safe_globals([kind])


class TensorsModule(torch.nn.Module):
    """Holds tensors in order, as buffers that move with the module and are not in its state_dict."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        super().__init__()
        for i, t in enumerate(tensors):
            self.register_buffer(f"tensor_{i}", t, persistent=False)

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in self._buffers.values() if t is not None]


class LinearModule(torch.nn.Module, ABC):
    """A `PreparedLinear` as a module, called in the same way. A subclass fills in `_run`, as one of `slim_linear.Linear`."""

    in_features: int
    out_features: int

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        norm: RmsNorm | LayerNorm | None = None,
        swiglu: bool = False,
        gelu: bool = False,
    ) -> torch.Tensor:
        """x [M, in_features] -> [M, out_features] in x's dtype; the arguments of `PreparedLinear.__call__`."""
        x, prologue = Prologue(norm, swiglu, gelu).by_torch(x)  # the operators have no LayerNorm and no GELU
        return self._run(x, prologue, residual)

    @abstractmethod
    def _run(self, x: torch.Tensor, prologue: Prologue, residual: torch.Tensor | None) -> torch.Tensor:
        """As `slim_linear.Linear._run`."""


class Linear(TensorsModule, LinearModule):
    """A group of projections that one call runs."""

    def __init__(self, frozen: Frozen):
        super().__init__(frozen.tensors)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.backend, self._layout = frozen.backend, frozen.layout

    def _run(self, x: torch.Tensor, prologue: Prologue, residual: torch.Tensor | None) -> torch.Tensor:
        norm = prologue.norm
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return ops.slim_linear(
            x, residual, weight, eps, prologue.swiglu, self.tensors(), self._layout, self.in_features, self.out_features,
            self.backend,
        )  # fmt: skip


class Mpo(LinearModule):
    """A matrix product operator: an operator call for each core."""

    bias: torch.Tensor | None

    def __init__(self, w: LinearWeights | MpoShape, cores: Sequence[Linear], bias: torch.Tensor | None):
        super().__init__()
        self.in_features, self.out_features = w.in_features, w.out_features
        self._shape = MpoShape(w.in_features, w.out_features, w.out_dims, w.in_dims, w.bonds)
        self.cores = torch.nn.ModuleList(cores)
        self.backend = cores[0].backend
        self.register_buffer("bias", bias, persistent=False)

    def _run(self, x: torch.Tensor, prologue: Prologue, residual: torch.Tensor | None) -> torch.Tensor:
        norm_op = partial(ops.rms_norm, backend=self.backend)
        x = prologue.apply(x, norm_op, partial(ops.swiglu, backend=self.backend))
        y = contract_mpo(x, self._shape, list(self.cores))
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y if residual is None else y + residual


class SideBySideModule(LinearModule):
    """A `SideBySide` as a module."""

    def __init__(self, parts: Sequence[LinearModule]):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)
        self.in_features = parts[0].in_features
        self.out_features = sum(p.out_features for p in parts)

    def _run(self, x: torch.Tensor, prologue: Prologue, residual: torch.Tensor | None) -> torch.Tensor:
        return side_by_side(self.parts, x, prologue, residual)


class Attention(torch.nn.Module):
    """One layer's attention over its pages; called like the attention of a backend, but leaves qkv as it is.

    cache: of the backend, shared; its k and v are buffers of the module, changed by every call. sinks: fp32 [query_heads].
    group: the cache's, of the batch's page tables. norms: of queries and keys, if any.
    """

    def __init__(
        self,
        heads: HeadLayout,
        cache: CpuKVCache | ReferenceKVCache,
        sinks: torch.Tensor | None = None,
        *,
        backend: str | None = None,
        group: str = FULL,
        norms: HeadNorms | None = None,
    ):
        super().__init__()
        self.heads, self._page_size, self.group = heads, cache.page_size, group
        self.backend = resolve_backend(backend, cache.k.device)
        if (self.backend == "cpu") != isinstance(cache, CpuKVCache):
            raise KernelError(f"a {type(cache).__name__} is not a cache of the {self.backend} kernels")
        self.register_buffer("k", cache.k, persistent=False)
        self.register_buffer("v", cache.v, persistent=False)
        self.register_buffer("sinks", sinks, persistent=False)
        self.register_buffer("head_norms", None if norms is None else norms.weight, persistent=False)
        self._norm_eps = 0.0 if norms is None else norms.eps

    def forward(self, qkv: torch.Tensor, batch: AttentionBatch, cos_sin: torch.Tensor, scale: float) -> torch.Tensor:
        """qkv [T, (Hq + 2 Hkv) D], cos_sin fp32 [positions, rotary_dim] -> [T, Hq D]."""
        table = batch.tables[self.group]
        return ops.rope_paged_attention(
            qkv, batch.positions, table.slots, batch.query_start, batch.context_len, table.pages, cos_sin, scale,
            self.k, self.v, self.sinks, self.heads.query_heads, self.heads.kv_heads, self._page_size, self.heads.window,
            self.backend, self.head_norms, self._norm_eps,
        )  # fmt: skip


class Embedding(TensorsModule):
    """Rows of a stored matrix: of the packed one of a `CpuEmbedding`, or of a plain `Core` in any float dtype."""

    def __init__(self, table: CpuEmbedding | Core, dtype: torch.dtype = torch.float32):
        numbers: list[int] = []
        if isinstance(table, Core):
            tensors: list[torch.Tensor] = []
            freeze_core(table, tensors, numbers)
            hidden = table.shape[1]
        else:
            if dtype != torch.float32:
                raise KernelError(f"the CPU kernels look up fp32 rows, not {dtype}")
            matrix = table._head.first_matrix()
            tensors, hidden = matrix.tensors, table.hidden
            numbers = strip_addresses(matrix.fields, tensors)
        super().__init__(tensors)
        self.hidden, self._dtype, self._layout = hidden, dtype, as_text(numbers)
        self._backend = "reference" if isinstance(table, Core) else "cpu"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int32 or int64 [M] -> [M, hidden]."""
        return ops.embedding(ids, self.tensors(), self._layout, self.hidden, self._dtype, self._backend)


def torch_module(prepared: Any) -> LinearModule | Attention | Embedding:
    """A module over what the reference or the CPU kernels have ready: a prepared group of linears, an attention object, an
    embedding (`CpuEmbedding`, or a table as a `Core`). Raises KernelError for anything else."""
    if isinstance(prepared, CpuAttention | ReferenceAttention):
        backend = "cpu" if isinstance(prepared, CpuAttention) else "reference"
        return Attention(
            prepared.heads, prepared.cache, prepared.sinks, backend=backend, group=prepared.group, norms=prepared.norms
        )
    if isinstance(prepared, CpuEmbedding | Core):
        return Embedding(prepared)
    return linear_module(prepared)


def linear_module(prepared: PreparedLinear) -> LinearModule:
    if isinstance(prepared, SideBySide):
        return SideBySideModule([linear_module(p) for p in prepared.parts])
    if isinstance(prepared, MpoLinear):
        return Mpo(prepared.shape, [Linear(freeze(c)) for c in prepared.cores], prepared.bias)
    return Linear(freeze(prepared))


def prepare_module(
    members: Sequence[LinearWeights],
    *,
    backend: str | None = None,
    arena: Arena | None = None,
    int8_activations: bool = False,
) -> LinearModule:
    """`prepare`, of any backend, as a module. Raises KernelError as it does."""
    prepared = prepare(members, backend=backend, arena=arena, int8_activations=int8_activations)
    name = resolve_backend(backend, members[0].cores[0].data.device)
    if name in ("reference", "cpu"):
        return linear_module(prepared)
    if all(w.kind != "mpo" for w in members):
        return Linear(freeze_members(members, name, prepared, int8_activations=int8_activations))
    alone = partial(prepare_module, backend=name, int8_activations=int8_activations)
    if len(members) > 1:
        return SideBySideModule([alone([w]) for w in members])
    cores = [cast(Linear, alone([as_dense(c)])) for c in members[0].cores]
    return Mpo(members[0], cores, members[0].bias)
