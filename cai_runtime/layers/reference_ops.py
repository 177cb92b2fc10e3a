"""The operations between linears in plain torch, on any device: slow, and the judge of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cai_runtime.kernels.activation import gelu_reference, swiglu_reference
from cai_runtime.kernels.attention import HeadLayout, ReferenceAttention, ReferenceKVCache
from cai_runtime.kernels.convolution import TorchConvolution
from cai_runtime.kernels.cpu_library import Arena
from cai_runtime.kernels.cross_attention import ReferenceCrossAttention
from cai_runtime.kernels.embedding import add_rows, embedding_reference, take_rows
from cai_runtime.kernels.encoder_attention import ReferenceEncoderAttention
from cai_runtime.kernels.norm import layer_norm_reference, rms_norm_reference
from cai_runtime.kernels.prepare import prepare
from cai_runtime.kernels.program import Input
from cai_runtime.kernels.slim_linear import PreparedLinear
from cai_runtime.kernels.weights import LinearWeights


class ReferenceOps:
    """Implements `Ops`."""

    rms_norm = staticmethod(rms_norm_reference)
    layer_norm = staticmethod(layer_norm_reference)
    swiglu = staticmethod(swiglu_reference)
    gelu = staticmethod(gelu_reference)
    take_rows = staticmethod(take_rows)
    add_rows = staticmethod(add_rows)
    convolution = staticmethod(TorchConvolution)
    attention = staticmethod(ReferenceAttention)
    encoder_attention = staticmethod(ReferenceEncoderAttention)
    cross_attention = staticmethod(ReferenceCrossAttention)
    page_bytes = staticmethod(ReferenceKVCache.page_bytes)

    def __init__(self, backend: str, device: torch.device, arena: Arena | None = None):
        self._device = device

    def kv_cache(self, heads: HeadLayout, pages: int, page_size: int, dtype: torch.dtype) -> ReferenceKVCache:
        return ReferenceKVCache(pages, page_size, heads, dtype, self._device)

    def embedding_and_head(
        self, table: LinearWeights, head: LinearWeights | None, dtype: torch.dtype, *, int8_activations: bool = False
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], PreparedLinear]:
        core = table.cores[0]
        prepared = prepare([head or table], backend="reference", int8_activations=int8_activations)
        return lambda ids: embedding_reference(core, ids, dtype), prepared

    def compile(self, function: Callable[..., Any], inputs: Mapping[str, Input]) -> None:
        return None
