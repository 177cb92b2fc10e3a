"""The operations between linears on a GPU, by the Triton kernels; LayerNorm, GELU and convolution by torch's functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cai_runtime.kernels.activation import gelu_reference
from cai_runtime.kernels.attention import HeadLayout, LayerAttention, ReferenceKVCache
from cai_runtime.kernels.batch import AttentionBatch
from cai_runtime.kernels.convolution import TorchConvolution
from cai_runtime.kernels.cpu_library import Arena
from cai_runtime.kernels.cross_attention import TorchCrossAttention
from cai_runtime.kernels.embedding import add_rows, embedding_reference, take_rows
from cai_runtime.kernels.encoder_attention import TorchEncoderAttention
from cai_runtime.kernels.norm import layer_norm_torch
from cai_runtime.kernels.prepare import prepare
from cai_runtime.kernels.program import Input
from cai_runtime.kernels.slim_linear import PreparedLinear
from cai_runtime.kernels.weights import LinearWeights


class GpuAttention(LayerAttention[ReferenceKVCache]):
    """RoPE with the cache write, then attention over pages [pages, kv_heads, page_size, head_dim]. Sinks and norms are on
    the model's device."""

    def __call__(self, qkv: torch.Tensor, batch: AttentionBatch, cos_sin: torch.Tensor, scale: float) -> torch.Tensor:
        """qkv [T, (Hq + 2 Hkv) D], whose queries and keys are normalized and rotated in place -> [T, Hq D]."""
        from cai_runtime.kernels.triton import paged_attention, rope_kv_write

        heads, cache, table = self.heads, self.cache, batch.tables[self.group]
        rope_kv_write(
            qkv, batch.positions, cos_sin, cache.k, cache.v, table.slots, heads.query_heads, heads.kv_heads,
            heads.head_dim, norms=self.norms, k_scale=cache.k_scale, v_scale=cache.v_scale,
        )  # fmt: skip
        q = qkv[:, : heads.query_width].view(-1, heads.query_heads, heads.head_dim)
        return paged_attention(
            q, cache.k, cache.v, batch.query_start, batch.context_len, table.pages, scale,
            window=heads.window, sinks=self.sinks, k_scale=cache.k_scale, v_scale=cache.v_scale,
        )  # fmt: skip


class GpuOps:
    """Implements `Ops`. backend: "triton" or "cuda", for the linears."""

    layer_norm = staticmethod(layer_norm_torch)
    gelu = staticmethod(gelu_reference)
    take_rows = staticmethod(take_rows)
    add_rows = staticmethod(add_rows)
    convolution = staticmethod(TorchConvolution)
    attention = staticmethod(GpuAttention)
    encoder_attention = staticmethod(TorchEncoderAttention)
    cross_attention = staticmethod(TorchCrossAttention)
    page_bytes = staticmethod(ReferenceKVCache.page_bytes)

    def __init__(self, backend: str, device: torch.device, arena: Arena | None = None):
        self._backend, self._device = backend, device

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        from cai_runtime.kernels.triton import rms_norm

        return rms_norm(x, weight, eps)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        from cai_runtime.kernels.triton import swiglu

        return swiglu(gate_up)

    def kv_cache(self, heads: HeadLayout, pages: int, page_size: int, dtype: torch.dtype) -> ReferenceKVCache:
        return ReferenceKVCache(pages, page_size, heads, dtype, self._device)

    def embedding_and_head(
        self, table: LinearWeights, head: LinearWeights | None, dtype: torch.dtype, *, int8_activations: bool = False
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], PreparedLinear]:
        core = table.cores[0]
        prepared = prepare([head or table], backend=self._backend, activations=dtype)
        return lambda ids: embedding_reference(core, ids, dtype), prepared

    def compile(self, function: Callable[..., Any], inputs: Mapping[str, Input]) -> None:
        return None
