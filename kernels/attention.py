"""Norms of heads, rotary embedding, the KV cache write, and causal attention over a paged KV cache (Kwon et al. 2023).

A cache belongs to a backend: the reference and the GPU kernels keep keys as [pages, kv_heads, page_size, head_dim]; the CPU
kernels keep them as [pages, kv_heads, head_dim, page_size], so that one vector holds one dimension of many keys.

An int8 cache holds codes -127 to 127 and an fp32 scale for each key and each value of a head, max|x| / 127 (symmetric, per
token and head; as `quantized_rows.quantize_rows` rounds). No kernel widens the codes' products by scales one by one: a key's
scale multiplies its score, a value's its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.batch import FULL, AttentionBatch
from cai_runtime.kernels.cpu_library import check_rows
from cai_runtime.kernels.norm import rms_norm_reference
from cai_runtime.kernels.program import Value
from cai_runtime.kernels.quantized_rows import quantize_rows

Cache = TypeVar("Cache")


@dataclass(frozen=True)
class HeadLayout:
    """Heads of an attention layer. rotary_dim: how many leading dimensions of a head are rotated. window: a query sees its
    own position and the window - 1 before it (sliding window attention, Beltagy et al. 2020); None: all before it."""

    query_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise KernelError(f"a sliding window is at least 1 position, not {self.window}")

    @property
    def qkv_width(self) -> int:
        return (self.query_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def query_width(self) -> int:
        return self.query_heads * self.head_dim


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm of each head of queries and keys before the rotation (Henry et al. 2020, query-key normalization).

    weight: [2, head_dim] in the activations' dtype, on the model's device: of query heads, of key heads.
    """

    weight: torch.Tensor
    eps: float

    def check(self, heads: HeadLayout) -> None:
        """Raises KernelError where the weight does not fit the heads."""
        if tuple(self.weight.shape) != (2, heads.head_dim):
            raise KernelError(f"the norms of heads have weights [2, {heads.head_dim}], not {list(self.weight.shape)}")


def check_whole(heads: HeadLayout, rows: int, name: str, what: str) -> None:
    """Raises KernelError for heads of an attention `name` over all `rows` of `what` that can't be computed: with a sliding
    window, in no whole groups, or over less than a row."""
    if heads.window is not None:
        raise KernelError(f"{name} sees the whole of {what}: its heads take no sliding window")
    if heads.query_heads % heads.kv_heads:
        raise KernelError(f"{name} takes whole groups of query heads, not {heads}")
    if rows < 1:
        raise KernelError(f"{what} has 1 position or more, not {rows}")


# ------------------------------------------------------------------------------------------------------ reference


CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""What kernels hold keys and values in; the reference takes float64 too."""


def place_bytes(width: int, dtype: torch.dtype) -> int:
    """Bytes of one key or value of `width` numbers, with its scale in an int8 cache."""
    return width * dtype.itemsize + (torch.float32.itemsize if dtype == torch.int8 else 0)


class ReferenceKVCache:
    """Pages of one layer: k, v [pages, kv_heads, page_size, head_dim]; of an int8 cache, scales fp32 [pages, kv_heads,
    page_size] of keys and of values, else None."""

    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def __init__(self, pages: int, page_size: int, heads: HeadLayout, dtype: torch.dtype, device: torch.device):
        shape = (pages, heads.kv_heads, page_size, heads.head_dim)
        self.page_size = page_size
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        if dtype == torch.int8:
            self.k_scale = torch.zeros(shape[:3], dtype=torch.float32, device=device)
            self.v_scale = torch.zeros(shape[:3], dtype=torch.float32, device=device)

    @staticmethod
    def page_bytes(page_size: int, heads: HeadLayout, dtype: torch.dtype) -> int:
        """Bytes of one page of one layer."""
        return 2 * heads.kv_heads * page_size * place_bytes(heads.head_dim, dtype)

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy pages, by number, int64 [N] on the cache's device. No target is a source too."""
        for pages in (self.k, self.v, self.k_scale, self.v_scale):
            if pages is not None:
                pages.index_copy_(0, targets, pages.index_select(0, sources))

    def write(self, page: torch.Tensor, offset: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keys and values [T, kv_heads, head_dim] to places int64 [T] of pages int64 [T]."""
        for x, pages, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            if scales is None:
                pages[page, :, offset] = x.to(pages.dtype)
                continue
            codes, scale = quantize_rows(x.flatten(0, 1))
            pages[page, :, offset] = codes.view(x.shape)
            scales[page, :, offset] = scale.view(x.shape[:2])

    def read(self, pages: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [kv_heads, positions, head_dim] of pages int64 [N], in a float dtype."""
        found = []
        for codes, scales in ((self.k, self.k_scale), (self.v, self.v_scale)):
            x = codes[pages].to(dtype)
            if scales is not None:
                x *= scales[pages].to(dtype)[..., None]
            found.append(x.transpose(0, 1).flatten(1, 2))
        return found[0], found[1]


def rotate_reference(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] with the rotate-half convention; cos_sin [max_position, rotary_dim], cosines first."""
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin[positions.long()].to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
    return torch.cat([rotated, x[..., rotary_dim:]], dim=-1)


def rope_kv_write_reference(
    qkv: torch.Tensor,
    batch: AttentionBatch,
    cos_sin: torch.Tensor,
    heads: HeadLayout,
    cache: ReferenceKVCache,
    group: str = FULL,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """qkv [T, (Hq + 2 Hkv) D] -> the rotated queries [T, Hq, D]; rotated keys and values go to their slots of `group`.
    norms: of queries and keys, before the rotation."""
    q, k, v = qkv.view(len(qkv), -1, heads.head_dim).split([heads.query_heads, heads.kv_heads, heads.kv_heads], dim=1)
    if norms is not None:
        q, k = (rms_norm_reference(x, w, norms.eps) for x, w in zip((q, k), norms.weight, strict=True))
    slots = batch.tables[group].slots.long()
    page, offset = slots // cache.page_size, slots % cache.page_size
    cache.write(page, offset, rotate_reference(k, batch.positions, cos_sin), v)
    return rotate_reference(q, batch.positions, cos_sin)


def paged_attention_reference(
    q: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    heads: HeadLayout,
    cache: ReferenceKVCache,
    sinks: torch.Tensor | None = None,
    group: str = FULL,
) -> torch.Tensor:
    """q [T, Hq, D] -> [T, Hq * D], one sequence at a time, softmax in at least fp32. group: the cache's, of `batch.tables`.
    Keys before the first row's window are not read: their pages may be another sequence's.

    sinks: fp32 [Hq], a logit of each head that takes part in the softmax and brings no value (Agarwal et al. 2025, gpt-oss).
    """
    out = torch.empty(len(q), heads.query_width, dtype=q.dtype, device=q.device)
    starts, lengths = batch.query_start.tolist(), batch.context_len.tolist()
    table, shared = batch.tables[group].pages, heads.query_heads // heads.kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    for i, length in enumerate(lengths):
        rows = slice(starts[i], starts[i + 1])
        count = starts[i + 1] - starts[i]
        if count == 0:
            continue
        seen = 0 if heads.window is None else max(0, length - count + 1 - heads.window)  # by the first row
        first = seen // cache.page_size
        pages = table[i, first : -(-length // cache.page_size)].long()
        keys = slice(seen - first * cache.page_size, length - first * cache.page_size)
        k, v = (part[:, keys].repeat_interleave(shared, 0) for part in cache.read(pages, wide))
        scores = q[rows].transpose(0, 1).to(wide) @ k.transpose(1, 2) * scale
        query_position = torch.arange(length - count, length, dtype=torch.int64, device=q.device)
        distance = query_position[:, None] - torch.arange(seen, length, dtype=torch.int64, device=q.device)[None]
        unseen = distance < 0 if heads.window is None else (distance < 0) | (distance >= heads.window)
        scores = scores.masked_fill(unseen, float("-inf"))
        if sinks is not None:
            sink = sinks.to(wide)[:, None, None].expand(-1, count, 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = scores.softmax(-1)[..., : length - seen]
        out[rows] = (weights @ v).transpose(0, 1).reshape(count, -1).to(q.dtype)
    return out


# ------------------------------------------------------------------------------------------------------------ cpu


class CpuKVCache:
    """Pages of one layer in the layout of csrc/cpu/kernels.inl, in memory that the system commits as pages are used.

    dtype: fp32, bf16, fp16 or int8, whose scales follow the codes of each head in a page. page_size: a multiple of 16 up to
    64. head_dim: up to 512.
    """

    def __init__(self, pages: int, page_size: int, heads: HeadLayout, dtype: torch.dtype):
        if page_size % 16 or not 16 <= page_size <= 64:
            raise KernelError(f"the CPU kernels take a page_size of 16, 32, 48 or 64, not {page_size}")
        if heads.head_dim > 512 or heads.query_heads % heads.kv_heads:
            raise KernelError(f"the CPU kernels take head_dim up to 512 and whole groups of query heads, not {heads}")
        if dtype not in CACHE_DTYPES:
            raise KernelError(f"a KV cache is fp32, bf16, fp16 or int8, not {dtype}")
        self.page_size = page_size
        k, v = self._page_sizes(page_size, heads, dtype)
        self._k = cpu_library.system_memory(pages * k)
        self._v = cpu_library.system_memory(pages * v)
        # The system gives whole pages of its own: there may be more than was asked for.
        self.k = torch.frombuffer(self._k, dtype=dtype)[: pages * k // dtype.itemsize]
        self.v = torch.frombuffer(self._v, dtype=dtype)[: pages * v // dtype.itemsize]
        self.pages = pages

    @staticmethod
    def _page_sizes(page_size: int, heads: HeadLayout, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of the keys and of the values of a page: rows of values are padded to a multiple of 16."""
        padded = -(-heads.head_dim // 16) * 16
        places = heads.kv_heads * page_size
        return places * place_bytes(heads.head_dim, dtype), places * place_bytes(padded, dtype)

    @classmethod
    def page_bytes(cls, page_size: int, heads: HeadLayout, dtype: torch.dtype) -> int:
        """Bytes of one page of one layer."""
        return sum(cls._page_sizes(page_size, heads, dtype))

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy pages, by number, int64 [N]. No target is a source too."""
        for flat in (self.k, self.v):
            pages = flat.view(self.pages, -1)
            pages.index_copy_(0, targets, pages.index_select(0, sources))


class LayerAttention(Generic[Cache]):
    """What every backend's attention of one layer is made of.

    sinks: see `paged_attention_reference`. group: of the cache. norms: of queries and keys, if any. Raises KernelError for
    norms that don't fit the heads.
    """

    def __init__(
        self,
        heads: HeadLayout,
        cache: Cache,
        sinks: torch.Tensor | None = None,
        group: str = FULL,
        norms: HeadNorms | None = None,
    ) -> None:
        if norms is not None:
            norms.check(heads)
        self.heads, self.cache, self.sinks, self.group, self.norms = heads, cache, sinks, group, norms


class CpuAttention(LayerAttention[CpuKVCache]):
    """Both operations for one layer's heads, in one call. Keeps fp32 copies of sinks and norms."""

    def __init__(
        self,
        heads: HeadLayout,
        cache: CpuKVCache,
        sinks: torch.Tensor | None = None,
        group: str = FULL,
        norms: HeadNorms | None = None,
    ) -> None:
        super().__init__(heads, cache, sinks, group, norms)
        if norms is not None:
            self.norms = HeadNorms(norms.weight.to("cpu", torch.float32).contiguous().clone(), norms.eps)
        if sinks is not None:
            if tuple(sinks.shape) != (heads.query_heads,):
                raise KernelError(f"sinks are one number per query head [{heads.query_heads}], not {list(sinks.shape)}")
            self.sinks = sinks.to("cpu", torch.float32).contiguous().clone()
        fields = [heads.query_heads, heads.kv_heads, heads.head_dim, cache.page_size, heads.window or 0]
        self._heads = cpu_library.integers(fields)
        self._run = cpu_library.operation("attention")

    def __call__(self, qkv: Any, batch: Any, cos_sin: torch.Tensor, scale: float) -> Any:
        """qkv fp32 [T, (Hq + 2 Hkv) D], which may be overwritten -> [T, Hq D]. Or a Value, and no batch yet.

        cos_sin: fp32 [positions, rotary_dim]. Raises KernelError for a batch that does not fit cache or table.
        """
        heads, cache = self.heads, self.cache
        if isinstance(qkv, Value):
            bindings = {"heads": self._heads, "k_cache": cache.k, "v_cache": cache.v, "cos_sin": cos_sin}
            if self.sinks is not None:
                bindings["sinks"] = self.sinks
            if self.norms is not None:
                bindings["head_norms"] = self.norms.weight
            group = qkv.recorder.group(self.group)
            attributes: dict[str, int | float | str] = {"scale": scale, "pages": cache.pages, "group": group}
            attributes["norm_eps"] = 0.0 if self.norms is None else self.norms.eps
            return qkv.recorder.note(
                "attention", [qkv], heads.query_width, attributes=attributes, bindings=bindings, keep=self
            )
        qkv = check_rows(qkv, heads.qkv_width, "attention").contiguous()
        out = cpu_library.empty(qkv.shape[0], heads.query_width)
        table, norms = batch.tables[self.group], self.norms
        self._run(
            qkv, batch.positions, table.slots, batch.query_start, batch.context_len, table.pages, cos_sin, self._heads,
            scale, cache.k, cache.v, cache.pages, self.sinks,
            None if norms is None else norms.weight, 0.0 if norms is None else norms.eps, out,
        )  # fmt: skip
        return out


class ReferenceAttention(LayerAttention[ReferenceKVCache]):
    """Both operations by the reference."""

    def __call__(self, qkv: torch.Tensor, batch: AttentionBatch, cos_sin: torch.Tensor, scale: float) -> torch.Tensor:
        q = rope_kv_write_reference(qkv, batch, cos_sin, self.heads, self.cache, self.group, self.norms)
        return paged_attention_reference(q, batch, scale, self.heads, self.cache, self.sinks, self.group)
