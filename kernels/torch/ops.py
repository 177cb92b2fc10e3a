"""The operations as `torch.library` custom operators, for torch.compile and torch.export.

Importing this module registers them, and nothing else does; a process that loads an exported program imports it first.
Models use them through `modules.torch_module`.

    cai::slim_linear            a prepared group of linears, with its prologue and residual
    cai::rms_norm, cai::add_rms_norm, cai::swiglu, cai::embedding
    cai::rope_paged_attention   RoPE, cache write, attention; changes the caches

Each has a fake kernel, so a graph sees the shapes without running anything, and one real kernel for all devices, which is
the backend's own call: the bits are those of the eager operation. Weights travel as the tensors and numbers of
`frozen.Frozen`.

Inference only: there is no derivative. An output of an input that requires one raises RuntimeError in `backward`, naming the
operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import activation, cpu_library, norm
from cai_runtime.kernels.attention import (
    CpuAttention,
    CpuKVCache,
    HeadLayout,
    HeadNorms,
    ReferenceAttention,
    ReferenceKVCache,
)
from cai_runtime.kernels.backend import resolve_backend
from cai_runtime.kernels.batch import AttentionBatch
from cai_runtime.kernels.embedding import embedding_reference
from cai_runtime.kernels.norm import RmsNorm
from cai_runtime.kernels.torch.frozen import as_numbers, thaw, thaw_core
from cai_runtime.kernels.torch.relocation import with_addresses

# ----------------------------------------------------------------------------------------------------------- linear


@torch.library.custom_op(
    "cai::slim_linear",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor? residual, Tensor? norm_weight, float norm_eps, bool swiglu, Tensor[] weights, str layout, "
        "int in_features, int out_features, str backend) -> Tensor"
    ),
)
def slim_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    swiglu: bool,
    weights: Sequence[torch.Tensor],
    layout: str,
    in_features: int,
    out_features: int,
    backend: str,
) -> torch.Tensor:
    """x [M, in_features] (twice that with `swiglu`) -> [M, out_features]: `PreparedLinear.__call__`.

    weights to backend: of a `frozen.Frozen`. norm_eps counts with norm_weight alone.
    """
    rms_norm = None if norm_weight is None else RmsNorm(norm_weight, norm_eps)
    return thaw(backend, weights, layout)(x, residual, norm=rms_norm, swiglu=swiglu)


@slim_linear.register_fake
def _(x, residual, norm_weight, norm_eps, swiglu, weights, layout, in_features, out_features, backend):
    expected = 2 * in_features if swiglu else in_features
    torch._check(x.dim() == 2 and x.shape[1] == expected, lambda: f"slim_linear: expected [rows, {expected}]")
    return x.new_empty(x.shape[0], out_features)


# -------------------------------------------------------------------------------------------------- rows and lookup


@torch.library.custom_op(
    "cai::rms_norm", mutates_args=(), schema="(Tensor x, Tensor weight, float eps, str? backend=None) -> Tensor"
)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, backend: str | None = None) -> torch.Tensor:
    """x [M, H] / rms(x) * weight [H]. backend: as `resolve_backend` takes it, None for the best on x's device."""
    match resolve_backend(backend, x.device):
        case "reference":
            return norm.rms_norm_reference(x, weight, eps)
        case "cpu":
            return norm.rms_norm_cpu(x, weight, eps)
    from cai_runtime.kernels import triton

    return triton.rms_norm(x, weight, eps)


@rms_norm.register_fake
def _(x, weight, eps, backend=None):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "cai::add_rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor weight, float eps, str? backend=None) -> (Tensor, Tensor)",
)
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), both [M, H]."""
    match resolve_backend(backend, x.device):
        case "reference":
            return norm.add_rms_norm_reference(x, residual, weight, eps)
        case "cpu":
            return norm.add_rms_norm_cpu(x, residual, weight, eps)
    from cai_runtime.kernels import triton

    return triton.add_rms_norm(x, residual, weight, eps)


@add_rms_norm.register_fake
def _(x, residual, weight, eps, backend=None):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("cai::swiglu", mutates_args=(), schema="(Tensor gate_up, str? backend=None) -> Tensor")
def swiglu(gate_up: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """gate_up [M, 2 I], the gate first -> silu(gate) * up, [M, I]."""
    match resolve_backend(backend, gate_up.device):
        case "reference":
            return activation.swiglu_reference(gate_up)
        case "cpu":
            return activation.swiglu_cpu(gate_up)
    from cai_runtime.kernels import triton

    return triton.swiglu(gate_up)


@swiglu.register_fake
def _(gate_up, backend=None):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op(
    "cai::embedding",
    mutates_args=(),
    schema="(Tensor ids, Tensor[] table, str layout, int hidden, ScalarType dtype, str backend) -> Tensor",
)
def embedding(
    ids: torch.Tensor,
    table: Sequence[torch.Tensor],
    layout: str,
    hidden: int,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    """ids int32 or int64 [M] -> the rows [M, hidden] in `dtype`; fp32 on the CPU kernels.

    table, layout: of `modules.Embedding`. Raises KernelError for an id outside the table (CPU kernels).
    """
    if backend != "cpu":
        return embedding_reference(thaw_core(iter(table), iter(as_numbers(layout))), ids, dtype)
    matrix = cpu_library.integers(with_addresses(as_numbers(layout), table))
    ids = ids.to(torch.int32).contiguous()
    out = cpu_library.empty(ids.shape[0], hidden)
    cpu_library.operation("gather")(matrix, ids, out)
    return out


@embedding.register_fake
def _(ids, table, layout, hidden, dtype, backend):
    return ids.new_empty(ids.shape[0], hidden, dtype=dtype)


# -------------------------------------------------------------------------------------------------------- attention


class BorrowedCpuCache(CpuKVCache):
    """A cache in memory that somebody else holds: k, v as `CpuKVCache` lays them out, flat."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, page_size: int, heads: HeadLayout):
        if k.dtype not in (torch.float32, torch.bfloat16, torch.float16) or k.dtype != v.dtype:
            raise KernelError(f"a KV cache is fp32, bf16 or fp16, not {k.dtype} and {v.dtype}")
        if not (k.is_contiguous() and v.is_contiguous() and k.device.type == v.device.type == "cpu"):
            raise KernelError("the CPU kernels take contiguous caches on the CPU")
        padded = -(-heads.head_dim // 16) * 16
        page = heads.kv_heads * page_size
        self.k, self.v, self.page_size = k, v, page_size
        self.pages = min(k.numel() // (page * heads.head_dim), v.numel() // (page * padded))


class BorrowedCache(ReferenceKVCache):
    """k, v [pages, kv_heads, page_size, head_dim] that somebody else holds."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor):
        self.k, self.v, self.page_size = k, v, k.shape[2]


@torch.library.custom_op(
    "cai::rope_paged_attention",
    mutates_args=("k_cache", "v_cache"),
    schema=(
        "(Tensor qkv, Tensor positions, Tensor slots, Tensor query_start, Tensor context_len, Tensor page_table, "
        "Tensor cos_sin, float scale, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? sinks, int query_heads, "
        "int kv_heads, int page_size, int? window, str backend, Tensor? head_norms=None, float norm_eps=0.0) -> Tensor"
    ),
)
def rope_paged_attention(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    page_table: torch.Tensor,
    cos_sin: torch.Tensor,
    scale: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    sinks: torch.Tensor | None,
    query_heads: int,
    kv_heads: int,
    page_size: int,
    window: int | None,
    backend: str,
    head_norms: torch.Tensor | None = None,
    norm_eps: float = 0.0,
) -> torch.Tensor:
    """qkv [T, (Hq + 2 Hkv) D] -> [T, Hq D]: normalize heads (where `head_norms` [2, D] are), rotate, write keys and values
    to their slots, attend. qkv stays as it is.

    positions to page_table: of an `AttentionBatch`. cos_sin fp32 [positions, rotary_dim]. sinks: fp32 [Hq]. k_cache,
    v_cache: in the backend's layout, changed in place; "cuda" is "triton" here. In a graph, a compiler that doesn't reuse
    buffers copies them whole. Raises KernelError as the backend does, and for a cache of int8: no argument has its scales.
    """
    if torch.int8 in (k_cache.dtype, v_cache.dtype):
        raise KernelError("a KV cache is fp32, bf16 or fp16 here, not int8")
    head_dim = qkv.shape[1] // (query_heads + 2 * kv_heads)
    heads = HeadLayout(query_heads, kv_heads, head_dim, cos_sin.shape[1], window)
    batch = AttentionBatch.of(positions, slots, query_start, context_len, page_table)
    norms = None if head_norms is None else HeadNorms(head_norms, norm_eps)
    qkv = qkv.clone(memory_format=torch.contiguous_format)
    match resolve_backend(backend, qkv.device):
        case "cpu":
            cache = BorrowedCpuCache(k_cache, v_cache, page_size, heads)
            return CpuAttention(heads, cache, sinks, norms=norms)(qkv, batch, cos_sin, scale)
        case "reference":
            attention = ReferenceAttention(heads, BorrowedCache(k_cache, v_cache), sinks, norms=norms)
            return attention(qkv, batch, cos_sin, scale)
    from cai_runtime.kernels import triton

    triton.rope_kv_write(qkv, positions, cos_sin, k_cache, v_cache, slots, query_heads, kv_heads, head_dim, norms)
    q = qkv[:, : heads.query_width].view(-1, query_heads, head_dim)
    return triton.paged_attention(
        q, k_cache, v_cache, query_start, context_len, page_table, scale, window=window, sinks=sinks
    )


@rope_paged_attention.register_fake
def _(
    qkv, positions, slots, query_start, context_len, page_table, cos_sin, scale, k_cache, v_cache, sinks, query_heads,
    kv_heads, page_size, window, backend, head_norms=None, norm_eps=0.0,
):  # fmt: skip
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // (query_heads + 2 * kv_heads) * query_heads)
