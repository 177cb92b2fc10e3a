"""Attention of a decoder to an encoder's output, whose keys and values lie in pages of a KV cache (Vaswani et al. 2017).

Each query sees all `rows` positions of its sequence's encoder output: there is no causal limit and no rotation. The pages
are of a cache group of their own; in a batch, that group's slots are empty and its page table names the pages of each
sequence's output. Sequences may share them: beams of one window do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.attention import Cache, CpuKVCache, HeadLayout, ReferenceKVCache, check_whole
from cai_runtime.kernels.batch import AttentionBatch
from cai_runtime.kernels.cpu_library import check_rows
from cai_runtime.kernels.program import Value


class LayerCrossAttention(Generic[Cache]):
    """What every backend's cross-attention of one layer is made of.

    cache: what `Ops.kv_cache` made for these heads. rows: positions of an encoder's output. group: the cache group whose
    page table names the output's pages.

    Raises KernelError for heads with a sliding window, for query heads in no whole groups, for rows below 1, and for an int8
    cache.
    """

    def __init__(self, heads: HeadLayout, cache: Cache, rows: int, group: str) -> None:
        check_whole(heads, rows, "cross-attention", "an encoder's output")
        if cache.k.dtype == torch.int8:  # type: ignore[attr-defined]
            raise KernelError("cross-attention takes a KV cache of fp32, bf16 or fp16, not int8")
        self.heads, self.cache, self.rows, self.group = heads, cache, rows, group
        self.pages = -(-rows // cache.page_size)  # type: ignore[attr-defined]
        """Pages that one output takes."""

    @property
    def kv_width(self) -> int:
        """Columns of the keys and values that `write` takes."""
        return 2 * self.heads.kv_heads * self.heads.head_dim

    def check_write(self, kv: torch.Tensor, pages: torch.Tensor) -> None:
        """Raises KernelError for keys and values of no whole outputs, or pages that don't fit them."""
        if kv.dim() != 2 or kv.shape[1] != self.kv_width or kv.shape[0] % self.rows:
            expected = f"[outputs * {self.rows}, {self.kv_width}]"
            raise KernelError(f"cross-attention takes keys and values {expected}, not {list(kv.shape)}")
        outputs = kv.shape[0] // self.rows
        if pages.dtype != torch.int32 or list(pages.shape) != [outputs, self.pages]:
            raise KernelError(
                f"the pages of {outputs} outputs are int32 [{outputs}, {self.pages}], not {pages.dtype} {list(pages.shape)}"
            )

    def check_heads(self, heads: Sequence[int]) -> None:
        """Raises KernelError for a query head that the layer does not have."""
        for head in heads:
            if not 0 <= head < self.heads.query_heads:
                raise KernelError(f"query head {head} is none of the layer's {self.heads.query_heads}")


class ReferenceCrossAttention(LayerCrossAttention[ReferenceKVCache]):
    """By the definition, one sequence at a time, softmax in at least fp32."""

    def _pages_of(self, pages: torch.Tensor, of: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Keys or values [Hq, rows, D] of the output in `pages`."""
        heads = self.heads
        flat = of[pages[: self.pages].long()].transpose(0, 1).flatten(1, 2)
        return flat[:, : self.rows].to(dtype).repeat_interleave(heads.query_heads // heads.kv_heads, 0)

    def _softmax(self, q: torch.Tensor, pages: torch.Tensor, scale: float) -> torch.Tensor:
        """Weights [Hq, T, rows] of q [T, Hq D]."""
        wide = torch.promote_types(q.dtype, torch.float32)
        k = self._pages_of(pages, self.cache.k, wide)
        return (
            q.view(len(q), self.heads.query_heads, self.heads.head_dim).transpose(0, 1).to(wide) @ k.mT * scale
        ).softmax(-1)

    def __call__(self, q: torch.Tensor, batch: AttentionBatch, scale: float) -> torch.Tensor:
        """q [T, Hq D] -> [T, Hq D] in q's dtype."""
        out = torch.empty(len(q), self.heads.query_width, dtype=q.dtype, device=q.device)
        starts = batch.query_start.tolist()
        for pages, start, end in zip(batch.tables[self.group].pages, starts, starts[1:], strict=False):
            if start == end:
                continue
            weights = self._softmax(q[start:end], pages, scale)
            found = weights @ self._pages_of(pages, self.cache.v, weights.dtype)
            out[start:end] = found.transpose(0, 1).reshape(end - start, -1).to(q.dtype)
        return out

    def write(self, kv: torch.Tensor, pages: torch.Tensor) -> None:
        """Put keys and values [outputs * rows, 2 Hkv D], keys first, into pages int32 [outputs, pages of one]."""
        self.check_write(kv, pages)
        at = torch.arange(self.rows, dtype=torch.int64, device=kv.device)
        page, offset = pages[:, at // self.cache.page_size].reshape(-1).long(), at % self.cache.page_size
        offset = offset.repeat(len(pages))
        for of, part in zip((self.cache.k, self.cache.v), kv.chunk(2, dim=1), strict=True):
            of[page, :, offset] = part.reshape(len(kv), self.heads.kv_heads, self.heads.head_dim).to(of.dtype)

    def weights(self, q: torch.Tensor, pages: torch.Tensor, heads: Sequence[int], scale: float) -> torch.Tensor:
        """q [T, Hq D], pages int32 [pages of one output or more] -> fp32 [len(heads), T, rows]: the softmax of the heads."""
        self.check_heads(heads)
        return self._softmax(q, pages, scale)[list(heads)].float()


class TorchCrossAttention(ReferenceCrossAttention):
    """On a GPU: torch's fused attention over gathered pages, until there is a kernel of our own."""

    def __call__(self, q: torch.Tensor, batch: AttentionBatch, scale: float) -> torch.Tensor:
        """q [T, Hq D] -> [T, Hq D] in q's dtype."""
        pages, heads = batch.tables[self.group].pages, self.heads
        if len(q) > len(pages):  # a prompt among them, whose rows would each gather their output
            return super().__call__(q, batch, scale)
        row = torch.arange(len(q), dtype=torch.int32, device=q.device)
        at = pages[torch.searchsorted(batch.query_start[1:], row, right=True), : self.pages].long()
        k, v = (
            of[at].transpose(1, 2).flatten(2, 3)[:, :, : self.rows].to(q.dtype) for of in (self.cache.k, self.cache.v)
        )
        q = q.view(len(q), heads.query_heads, 1, heads.head_dim)
        grouped = heads.query_heads != heads.kv_heads
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        return out.flatten(1)


class CpuCrossAttention(LayerCrossAttention[CpuKVCache]):
    """For one layer's heads, fp32 with a cache of any of its dtypes."""

    def __init__(self, heads: HeadLayout, cache: CpuKVCache, rows: int, group: str) -> None:
        super().__init__(heads, cache, rows, group)
        fields = [heads.query_heads, heads.kv_heads, heads.head_dim, cache.page_size, 0]
        self._heads = cpu_library.integers(fields)

    def _note(self, name: str, inputs: Sequence[Value], width: int, **more: Any) -> Value:
        """Note an operation on this layer's cache. more: attributes, and the axis of the result."""
        axis = more.pop("axis", None)
        bindings = {"heads": self._heads, "k_cache": self.cache.k, "v_cache": self.cache.v}
        attributes = {"pages": self.cache.pages, "rows": self.rows, **more}
        note = inputs[0].recorder.note
        return note(name, inputs, width, axis=axis, attributes=attributes, bindings=bindings, keep=self)

    def __call__(self, q: Any, batch: Any, scale: float) -> Any:
        """q fp32 [T, Hq D] -> fp32 [T, Hq D]. Or a Value, and no batch yet.

        Raises KernelError for a batch that does not fit q or the cache.
        """
        heads, cache = self.heads, self.cache
        if isinstance(q, Value):
            return self._note(
                "cross_attention", [q], heads.query_width, scale=scale, group=q.recorder.group(self.group)
            )
        q = check_rows(q, heads.query_width, "cross-attention").contiguous()
        out = cpu_library.empty(q.shape[0], heads.query_width)
        cpu_library.operation("cross_attention")(
            q, batch.query_start, batch.tables[self.group].pages, self._heads, scale, cache.k, cache.v, cache.pages,
            self.rows, out,
        )  # fmt: skip
        return out

    def write(self, kv: Any, pages: Any) -> Any:
        """Put keys and values fp32 [outputs * rows, 2 Hkv D], keys first, into pages int32 [outputs, pages of one].

        Or Values, `kv` of Axis.ENCODER and `pages` of Axis.SEQUENCES: then a Value [outputs, 1] of zeros, for a program that
        has no other result. Raises KernelError for rows of no whole outputs, and for a page outside the cache.
        """
        cache = self.cache
        if isinstance(kv, Value):
            return self._note("cross_write", [kv, pages], 1, axis=pages.axis)
        self.check_write(kv, pages)
        kv = check_rows(kv, self.kv_width, "cross-attention's keys and values").contiguous()
        write = cpu_library.operation("cross_write")
        write(kv, pages.contiguous(), self._heads, cache.k, cache.v, cache.pages, self.rows)
        return None

    def weights(self, q: torch.Tensor, pages: torch.Tensor, heads: Sequence[int], scale: float) -> torch.Tensor:
        """q fp32 [T, Hq D], pages int32 [pages of one output or more] -> fp32 [len(heads), T, rows]: the softmax of the
        heads. Raises KernelError for a head or a page that is not there."""
        self.check_heads(heads)
        cache = self.cache
        q = check_rows(q, self.heads.query_width, "cross-attention").contiguous()
        which = torch.tensor(list(heads), dtype=torch.int32, device="cpu")
        out = cpu_library.empty(len(which) * len(q), self.rows)
        cpu_library.operation("cross_weights")(
            q, pages, which, self._heads, scale, cache.k, cache.v, cache.pages, self.rows, out
        )
        return out.view(len(which), len(q), self.rows)
