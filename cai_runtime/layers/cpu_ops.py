"""The operations between linears on a CPU, by the C++ kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cai_runtime.kernels.activation import gelu_cpu, swiglu_cpu
from cai_runtime.kernels.attention import CpuAttention, CpuKVCache, HeadLayout
from cai_runtime.kernels.convolution import CpuConvolution
from cai_runtime.kernels.cpu_library import Arena
from cai_runtime.kernels.cross_attention import CpuCrossAttention
from cai_runtime.kernels.embedding import CpuEmbedding, add_rows_cpu, take_rows
from cai_runtime.kernels.encoder_attention import CpuEncoderAttention
from cai_runtime.kernels.norm import layer_norm_cpu, rms_norm_cpu
from cai_runtime.kernels.prepare import prepare
from cai_runtime.kernels.program import Input, NotRecordable, Program, record
from cai_runtime.kernels.slim_linear import CpuLinear, PreparedLinear
from cai_runtime.kernels.weights import LinearWeights


class CpuOps:
    """Implements `Ops`. Every operation takes a tensor, or a Value of a pass being recorded."""

    rms_norm = staticmethod(rms_norm_cpu)
    layer_norm = staticmethod(layer_norm_cpu)
    swiglu = staticmethod(swiglu_cpu)
    gelu = staticmethod(gelu_cpu)
    take_rows = staticmethod(take_rows)
    add_rows = staticmethod(add_rows_cpu)
    attention = staticmethod(CpuAttention)
    encoder_attention = staticmethod(CpuEncoderAttention)
    cross_attention = staticmethod(CpuCrossAttention)
    page_bytes = staticmethod(CpuKVCache.page_bytes)

    def __init__(self, backend: str, device: torch.device, arena: Arena | None = None):
        self._arena = arena

    def convolution(self, weight: torch.Tensor, bias: torch.Tensor, stride: int, rows: int) -> CpuConvolution:
        return CpuConvolution(weight, bias, stride, rows, self._arena)

    def kv_cache(self, heads: HeadLayout, pages: int, page_size: int, dtype: torch.dtype) -> CpuKVCache:
        return CpuKVCache(pages, page_size, heads, dtype)

    def embedding_and_head(
        self, table: LinearWeights, head: LinearWeights | None, dtype: torch.dtype, *, int8_activations: bool = False
    ) -> tuple[CpuEmbedding, PreparedLinear]:
        if head is None:
            packed = CpuLinear([table], self._arena, int8_activations=int8_activations)
            return CpuEmbedding(packed), packed
        prepared = prepare([head], backend="cpu", arena=self._arena, int8_activations=int8_activations)
        return CpuEmbedding(CpuLinear([table], self._arena)), prepared

    def compile(self, function: Callable[..., Any], inputs: Mapping[str, Input]) -> Program | None:
        """One call into C++ for the whole pass; None where an operation of it can't be recorded."""
        try:
            return record(function, inputs)
        except NotRecordable:
            return None
