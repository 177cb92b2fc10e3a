"""The operations of a model: one object per kernel backend, with the same methods. A registry says where each lives."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from cai_runtime.kernels.attention import HeadLayout, HeadNorms
from cai_runtime.kernels.batch import FULL, AttentionBatch
from cai_runtime.kernels.convolution import Convolution
from cai_runtime.kernels.cpu_library import Arena
from cai_runtime.kernels.program import Input
from cai_runtime.kernels.slim_linear import PreparedLinear
from cai_runtime.kernels.weights import LinearWeights

Compiled = Callable[..., torch.Tensor]  # (batch, **tensors by name) -> [rows, width]

# Resolved backend -> module of this package and class, made with (backend, device, arena).
BACKENDS = {
    "cpu": ("cpu_ops", "CpuOps"),
    "reference": ("reference_ops", "ReferenceOps"),
    "triton": ("gpu_ops", "GpuOps"),
    "cuda": ("gpu_ops", "GpuOps"),
}


class KVCache(Protocol):
    """Pages of one layer."""

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy pages, by number, int64 [N] on the cache's device. No target is a source too."""
        ...


class Attention(Protocol):
    """Attention of one layer over its pages; normalizes heads, rotates, writes keys and values, attends."""

    @property
    def cache(self) -> KVCache: ...

    def __call__(
        self, qkv: torch.Tensor, batch: AttentionBatch, cos_sin: torch.Tensor, scale: float
    ) -> torch.Tensor: ...


class EncoderAttention(Protocol):
    """Attention of one layer of an encoder: every position sees all of its window."""

    def __call__(self, qkv: torch.Tensor, scale: float) -> torch.Tensor:
        """qkv [windows * rows, (Hq + 2 Hkv) D] -> [windows * rows, Hq D]."""
        ...


class CrossAttention(Protocol):
    """Attention of one decoder layer to the encoder outputs in its pages; see kernels/cross_attention.py."""

    def __call__(self, q: torch.Tensor, batch: AttentionBatch, scale: float) -> torch.Tensor:
        """q [T, Hq D] -> [T, Hq D]: each query sees all positions of its sequence's encoder output."""
        ...

    def write(self, kv: torch.Tensor, pages: torch.Tensor) -> Any:
        """Put keys and values [outputs * rows, 2 Hkv D], keys first, into pages, int32 [outputs, pages of one]."""
        ...

    def weights(self, q: torch.Tensor, pages: torch.Tensor, heads: Sequence[int], scale: float) -> torch.Tensor:
        """q [T, Hq D], the pages of one encoder output int32 [P] -> fp32 [len(heads), T, rows]: each head's softmax."""
        ...


class Ops(Protocol):
    """What a model definition needs besides linears. Tensors are on the model's device, activations in its dtype."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...
    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor: ...
    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor: ...
    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """x Phi(x), element by element: the exact form. x [M, I] -> [M, I]."""
        ...

    def add_rows(self, x: torch.Tensor, table: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """x [M, H] + rows of table [N, H] by number, int32 [M]; None: row m of x and row m modulo N of the table."""
        ...

    def convolution(self, weight: torch.Tensor, bias: torch.Tensor, stride: int, rows: int) -> Convolution:
        """A convolution over windows of `rows` rows, prepared. weight [out, in, 3] of any float dtype, bias [out]; see
        `kernels.convolution.Convolution`."""
        ...

    def take_rows(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Rows of x [M, H] by number, int32 [N] -> [N, H]."""
        ...

    def kv_cache(self, heads: HeadLayout, pages: int, page_size: int, dtype: torch.dtype) -> KVCache:
        """Pages for one layer, or for a layer of each group of a pool."""
        ...

    def attention(
        self,
        heads: HeadLayout,
        cache: Any,
        sinks: torch.Tensor | None = None,
        group: str = FULL,
        norms: HeadNorms | None = None,
    ) -> Attention:
        """One layer's attention over its pages. cache: what `kv_cache` made. sinks: fp32 [query_heads], see
        `paged_attention_reference`. group: the cache group whose page table it reads. norms: of queries and keys."""
        ...

    def encoder_attention(self, heads: HeadLayout, rows: int) -> EncoderAttention:
        """One encoder layer's attention. rows: positions of a window."""
        ...

    def cross_attention(self, heads: HeadLayout, cache: Any, rows: int, group: str) -> CrossAttention:
        """One decoder layer's attention to an encoder. cache: what `kv_cache` made. rows: positions of an encoder's output.
        group: the cache group whose page table names the output's pages."""
        ...

    def page_bytes(self, page_size: int, heads: HeadLayout, dtype: torch.dtype) -> int:
        """Bytes of one page of one layer in the cache that `kv_cache` makes."""
        ...

    def embedding_and_head(
        self, table: LinearWeights, head: LinearWeights | None, dtype: torch.dtype, *, int8_activations: bool = False
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], PreparedLinear]:
        """(lookup of ids, head). `head` None: tied, both share one copy. int8_activations: round the head's input; a GPU's
        is never rounded, since a scale for each row costs too much there."""
        ...

    def compile(self, function: Callable[..., Any], inputs: Mapping[str, Input]) -> Compiled | None:
        """`function`, which takes the inputs by name and does without a batch, as one call with the same bits.

        None where the backend has nothing faster than calling the operations. Call when the caches are there.
        """
        ...


def make_ops(backend: str, device: torch.device, arena: Arena | None = None) -> Ops:
    """The operations of a resolved backend."""
    module, name = BACKENDS[backend]
    return getattr(importlib.import_module(f"cai_runtime.layers.{module}"), name)(backend, device, arena)
