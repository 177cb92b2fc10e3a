"""The operations between linears, chosen once per model: one object per kernel backend, with the same methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from cai_runtime.kernels.activation import swiglu_cpu, swiglu_reference
from cai_runtime.kernels.attention import (
    AttentionBatch,
    CpuAttention,
    CpuKVCache,
    HeadLayout,
    ReferenceAttention,
    ReferenceKVCache,
)
from cai_runtime.kernels.cpu_library import Arena
from cai_runtime.kernels.embedding import CpuEmbedding, embedding_reference
from cai_runtime.kernels.norm import rms_norm_cpu, rms_norm_reference
from cai_runtime.kernels.program import NotRecordable, record
from cai_runtime.kernels.slim_linear import CpuLinear, PreparedLinear, prepare
from cai_runtime.kernels.weights import LinearWeights

Layers = Callable[[Any, Any], Any]  # (x [T, hidden], batch) -> [T, hidden]


class Attention(Protocol):
    """Attention of one layer over its pages; rotates, writes keys and values, attends."""

    def __call__(
        self, qkv: torch.Tensor, batch: AttentionBatch, cos_sin: torch.Tensor, scale: float
    ) -> torch.Tensor: ...


class Ops(Protocol):
    """What a model definition needs besides linears."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...
    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor: ...
    def attention(
        self, heads: HeadLayout, pages: int, page_size: int, dtype: torch.dtype, sinks: torch.Tensor | None = None
    ) -> Attention:
        """One layer's attention with its pages. sinks: fp32 [query_heads], see `paged_attention_reference`."""
        ...

    def page_bytes(self, page_size: int, heads: HeadLayout, dtype: torch.dtype) -> int:
        """Bytes of one page of one layer in the cache that `attention` makes."""
        ...

    def embedding_and_head(
        self, table: LinearWeights, head: LinearWeights | None, dtype: torch.dtype
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], PreparedLinear]:
        """(lookup of ids, head). `head` None: tied, both share one copy."""
        ...

    def compile(self, layers: Layers, width: int) -> Layers:
        """`layers` made faster where the backend can, its results the same bits. Call when the caches are there."""
        ...


class CpuOps:
    rms_norm = staticmethod(rms_norm_cpu)
    swiglu = staticmethod(swiglu_cpu)
    page_bytes = staticmethod(CpuKVCache.page_bytes)

    def __init__(self, arena: Arena | None = None):
        self._arena = arena

    def attention(
        self, heads: HeadLayout, pages: int, page_size: int, dtype: torch.dtype, sinks: torch.Tensor | None = None
    ) -> Attention:
        return CpuAttention(heads, CpuKVCache(pages, page_size, heads, dtype), sinks)

    def embedding_and_head(self, table: LinearWeights, head: LinearWeights | None, dtype: torch.dtype):
        packed = CpuLinear([table], self._arena)
        return CpuEmbedding(packed), packed if head is None else prepare([head], backend="cpu", arena=self._arena)

    def compile(self, layers: Layers, width: int) -> Layers:
        """One call into C++ for all layers; call by call where a layer can't be recorded."""
        try:
            return record(lambda x: layers(x, None), width)
        except NotRecordable:
            return layers


class ReferenceOps:
    """Plain torch on any device."""

    page_bytes = staticmethod(ReferenceKVCache.page_bytes)
    rms_norm = staticmethod(rms_norm_reference)
    swiglu = staticmethod(swiglu_reference)

    def __init__(self, device: torch.device):
        self._device = device

    def attention(
        self, heads: HeadLayout, pages: int, page_size: int, dtype: torch.dtype, sinks: torch.Tensor | None = None
    ) -> Attention:
        return ReferenceAttention(heads, ReferenceKVCache(pages, page_size, heads, dtype, self._device), sinks)

    def embedding_and_head(self, table: LinearWeights, head: LinearWeights | None, dtype: torch.dtype):
        core = table.cores[0]
        return lambda ids: embedding_reference(core, ids, dtype), prepare([head or table], backend="reference")

    def compile(self, layers: Layers, width: int) -> Layers:
        return layers


def make_ops(backend: str, device: torch.device, arena: Arena | None = None) -> Ops:
    """The operations of a resolved backend."""
    if backend == "cpu":
        return CpuOps(arena)
    if backend == "reference":
        return ReferenceOps(device)
    from cai_runtime.layers.gpu_ops import GpuOps

    return GpuOps(backend, device)
