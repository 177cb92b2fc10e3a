"""Full attention over windows of an encoder: every position sees all positions of its window, and no others (Vaswani et al.
2017). There is no cache, no mask and no rotation."""

from __future__ import annotations

from typing import Any

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.attention import HeadLayout, check_whole
from cai_runtime.kernels.cpu_library import check_rows
from cai_runtime.kernels.program import Value


class LayerEncoderAttention:
    """What every backend's encoder attention is made of. rows: positions of a window.

    Raises KernelError for heads with a sliding window, for query heads in no whole groups, and for rows below 1.
    """

    def __init__(self, heads: HeadLayout, rows: int) -> None:
        check_whole(heads, rows, "encoder attention", "an encoder's window")
        self.heads, self.rows = heads, rows

    def windows(self, qkv: torch.Tensor) -> int:
        """Raises KernelError for rows that are no whole windows."""
        if qkv.dim() != 2 or qkv.shape[1] != self.heads.qkv_width or qkv.shape[0] % self.rows:
            expected = f"[windows * {self.rows}, {self.heads.qkv_width}]"
            raise KernelError(f"encoder attention takes queries, keys and values {expected}, not {list(qkv.shape)}")
        return qkv.shape[0] // self.rows

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each [windows, heads, rows, head_dim], of as many heads as there are of queries."""
        heads, windows = self.heads, self.windows(qkv)
        parts = qkv.view(windows, self.rows, heads.qkv_width // heads.head_dim, heads.head_dim).transpose(1, 2)
        q, k, v = parts.split([heads.query_heads, heads.kv_heads, heads.kv_heads], dim=1)
        shared = heads.query_heads // heads.kv_heads
        return (q, k, v) if shared == 1 else (q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1))


class ReferenceEncoderAttention(LayerEncoderAttention):
    """By the definition, one window at a time, softmax in at least fp32."""

    def __call__(self, qkv: torch.Tensor, scale: float) -> torch.Tensor:
        """qkv [windows * rows, (Hq + 2 Hkv) D] -> [windows * rows, Hq D] in qkv's dtype."""
        wide = torch.promote_types(qkv.dtype, torch.float32)
        parts = self.split(qkv)
        outs = [(q @ k.mT * scale).softmax(-1) @ v for q, k, v in zip(*(p.to(wide) for p in parts), strict=True)]
        if not outs:
            return qkv.new_empty(0, self.heads.query_width)
        return torch.cat([o.transpose(0, 1).reshape(self.rows, -1) for o in outs]).to(qkv.dtype)


class TorchEncoderAttention(LayerEncoderAttention):
    """On a GPU: torch's fused attention, until there is a kernel of our own."""

    def __call__(self, qkv: torch.Tensor, scale: float) -> torch.Tensor:
        """qkv [windows * rows, (Hq + 2 Hkv) D] -> [windows * rows, Hq D] in qkv's dtype."""
        q, k, v = self.split(qkv)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2).reshape(len(qkv), self.heads.query_width)


class CpuEncoderAttention(LayerEncoderAttention):
    """For one layer's heads, fp32."""

    def __call__(self, qkv: Any, scale: float) -> Any:
        """qkv fp32 [windows * rows, (Hq + 2 Hkv) D] -> fp32 [windows * rows, Hq D]. Or a Value.

        Raises KernelError for rows that are no whole windows.
        """
        heads = self.heads
        if isinstance(qkv, Value):
            attributes: dict[str, int | float | str] = {
                "query_heads": heads.query_heads,
                "kv_heads": heads.kv_heads,
                "head_dim": heads.head_dim,
                "rows": self.rows,
                "scale": scale,
            }
            return qkv.recorder.note("encoder_attention", [qkv], heads.query_width, attributes=attributes)
        self.windows(qkv)
        qkv = check_rows(qkv, heads.qkv_width, "encoder attention").contiguous()
        out = cpu_library.empty(qkv.shape[0], heads.query_width)
        cpu_library.operation("encoder_attention")(
            qkv, heads.query_heads, heads.kv_heads, heads.head_dim, self.rows, scale, out
        )
        return out
