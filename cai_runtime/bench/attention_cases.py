"""Random queries, keys and values of a decode or prefill step: in pages for our backends, contiguous for torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cai_runtime.bench.timing import Call

if TYPE_CHECKING:
    import torch

    from cai_runtime.kernels.attention import HeadLayout
    from cai_runtime.models.shapes import AttentionHeads

PAGE_SIZE = 16  # the engine's
CHUNK = 1024  # tokens drawn per call
FILL_ROWS = 8192  # tokens written to the cache per call
CHECKED_ROWS = 8
THETA = 10000.0


@dataclass(frozen=True)
class Case:
    """A step of one layer over `batch` sequences of `context` positions. mode: "decode", where each sequence's last position
    is new, or "prefill", where all are."""

    mode: str
    heads: AttentionHeads
    context: int
    batch: int
    window: int | None

    @property
    def label(self) -> str:
        many = f"{self.batch} x " if self.batch > 1 else ""
        return f"{self.mode}, {many}{self.context} positions"

    @property
    def new(self) -> int:
        """New tokens of each sequence."""
        return 1 if self.mode == "decode" else self.context

    @property
    def layout(self) -> HeadLayout:
        from cai_runtime.kernels.attention import HeadLayout

        h = self.heads
        return HeadLayout(h.query, h.kv, h.dim, h.dim, self.window)

    @property
    def scale(self) -> float:
        return self.heads.dim**-0.5

    def seen(self, position: int) -> int:
        """The number of positions visible to the query at `position`."""
        return min(position + 1, self.window or position + 1)

    @property
    def flops(self) -> int:
        pairs = sum(self.seen(p) for p in range(self.context - self.new, self.context))
        return 4 * self.heads.query * self.heads.dim * self.batch * pairs

    def held_bytes(self, dtype: str) -> int:
        """Bytes of the keys and values of all positions, with the scales of an int8 cache."""
        import torch

        from cai_runtime.kernels.attention import place_bytes

        return 2 * self.batch * self.heads.kv * self.context * place_bytes(self.heads.dim, getattr(torch, dtype))

    def seen_bytes(self, dtype: str) -> int:
        """Bytes of the keys and values that any query sees."""
        oldest = self.context - self.new
        positions = self.context if self.mode == "prefill" else self.seen(oldest)
        return self.held_bytes(dtype) // self.context * positions

    def tokens(self, sequence: int, device: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first position, qkv fp32 [up to CHUNK, (Hq + 2 Hkv) D]) of a sequence, in order; values exact in bf16."""
        import torch

        draw = torch.Generator(device).manual_seed(sequence)
        width = self.layout.qkv_width
        for start in range(0, self.context, CHUNK):
            rows = min(CHUNK, self.context - start)
            yield start, torch.randn(rows, width, device=device, generator=draw).bfloat16().float()

    def new_tokens(self, sequence: int, device: str) -> torch.Tensor:
        """qkv fp32 [new, (Hq + 2 Hkv) D]."""
        import torch

        return torch.cat([qkv for _, qkv in self.tokens(sequence, device)])[-self.new :]

    def gathered(self, device: str, dtype: str, queries: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [batch, new, Hq, D] in the dtype `queries`, k and v [batch, Hkv, context, D] in `dtype`; q and k rotated. What
        an int8 cache holds comes in fp32: codes times the scale of the key or value."""
        import torch

        from cai_runtime.kernels.attention import rotate_reference
        from cai_runtime.kernels.quantized_rows import rounded_rows

        held = torch.float32 if dtype == "int8" else getattr(torch, dtype)
        h, table = self.heads, rotation_table(self.context, self.heads.dim, device)
        shape = (self.batch, h.kv, self.context, h.dim)
        k, v = (torch.empty(shape, dtype=held, device=device) for _ in range(2))
        q = torch.empty(self.batch, self.context, h.query, h.dim, dtype=getattr(torch, queries), device=device)
        for s in range(self.batch):
            for start, qkv in self.tokens(s, device):
                at = torch.arange(start, start + len(qkv), device=device)
                parts = qkv.view(len(qkv), -1, h.dim).split([h.query, h.kv, h.kv], dim=1)
                q[s, at] = rotate_reference(parts[0], at, table).to(q.dtype)
                k[s, :, at] = rotate_reference(parts[1], at, table).transpose(0, 1).to(k.dtype)
                v[s, :, at] = parts[2].transpose(0, 1).to(v.dtype)
        if dtype == "int8":
            k, v = (rounded_rows(x.flatten(0, 2)).view(shape) for x in (k, v))
        return q[:, -self.new :].contiguous(), k, v

    def expected(self, device: str, dtype: str, queries: str) -> tuple[list[int], torch.Tensor]:
        """(rows of the flattened output, what they are in float64): up to eight, the first and last among them."""
        import torch

        q, k, v = self.gathered(device, dtype, queries)
        total = self.batch * self.new
        rows = sorted({round(i * (total - 1) / (CHECKED_ROWS - 1)) for i in range(CHECKED_ROWS)})
        group = self.heads.query // self.heads.kv
        out = []
        for row in rows:
            s, t = divmod(row, self.new)
            end = self.context - self.new + t + 1
            keys, values = (x[s, :, end - self.seen(end - 1) : end].double() for x in (k, v))
            query = q[s, t].double().view(self.heads.kv, group, -1)
            weights = (query @ keys.transpose(1, 2) * self.scale).softmax(-1)
            out.append((weights @ values).flatten())
        return rows, torch.stack(out)


def rotation_table(positions: int, dim: int, device: str) -> torch.Tensor:
    """cos and sin fp32 [positions, dim] of RoPE (Su et al. 2021), cosines first."""
    import torch

    inverse = THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * inverse
    return torch.cat([angles.cos(), angles.sin()], dim=1).float().to(device)


def paged_calls(case: Case, sets: int, device: str, dtype: str, activations: str, backend: str) -> list[Call]:
    """`sets` calls of a backend's attention, each over its own sequences, all in one paged cache.

    Only the operation knows the cache's layout. So it fills the cache itself, with each token as a sequence of length one.
    Raises KernelError if the backend does not support the case.
    """
    import torch

    from cai_runtime.kernels.backend import resolve_backend
    from cai_runtime.kernels.batch import AttentionBatch
    from cai_runtime.layers.ops import make_ops

    pages = -(-case.context // PAGE_SIZE)
    ops = make_ops(resolve_backend(backend, device), torch.device(device))
    cache = ops.kv_cache(case.layout, sets * case.batch * pages, PAGE_SIZE, getattr(torch, dtype))
    attend = ops.attention(case.layout, cache)
    table = rotation_table(case.context, case.heads.dim, device)
    order = torch.randperm(sets * case.batch * pages, generator=torch.Generator().manual_seed(0))
    page_tables = order.to(torch.int32).view(sets, case.batch, pages).to(device)

    def counting(n: int) -> torch.Tensor:
        return torch.arange(n, dtype=torch.int32, device=device)

    def slots_of(page_table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return page_table[positions.long() // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE

    if case.mode == "decode":
        for s in range(case.batch):
            for start, qkv in case.tokens(s, device):
                positions = counting(len(qkv)) + start
                for own in page_tables[:, s].split(max(1, FILL_ROWS // len(qkv))):
                    slots = torch.cat([slots_of(page_table, positions) for page_table in own])
                    rows = len(slots)
                    alone = torch.ones(rows, dtype=torch.int32, device=device)
                    page_of = (slots // PAGE_SIZE)[:, None].contiguous()
                    step = AttentionBatch.of(positions.repeat(len(own)), slots, counting(rows + 1), alone, page_of)
                    attend(qkv.to(getattr(torch, activations)).repeat(len(own), 1), step, table, case.scale)
    new = torch.cat([case.new_tokens(s, device) for s in range(case.batch)]).to(getattr(torch, activations))
    positions = (counting(case.new) + case.context - case.new).repeat(case.batch)
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
    starts = counting(case.batch + 1) * case.new
    calls: list[Call] = []
    for page_table in page_tables:
        slots = torch.cat([slots_of(own, positions[: case.new]) for own in page_table])
        step = AttentionBatch.of(positions, slots, starts, lengths, page_table.contiguous())
        # RoPE overwrites its input, so a later call rotates it again. A rotation does not change magnitudes.
        calls.append(partial(attend, new.clone(), step, table, case.scale))
    return calls


def gathered_calls(case: Case, sets: int, device: str, dtype: str) -> list[Call]:
    """`sets` calls of torch's scaled_dot_product_attention, each on its own copy of contiguous, rotated inputs."""
    import torch

    h = case.heads
    q, k, v = case.gathered(device, dtype, dtype)
    oldest = case.context - case.seen(case.context - case.new) if case.mode == "decode" else 0
    k, v = k[:, :, oldest:], v[:, :, oldest:]
    if case.mode == "decode":
        q, mask, causal = q.view(case.batch, h.kv, h.query // h.kv, h.dim), None, False
    else:
        q, mask, causal = q.transpose(1, 2).contiguous(), None, case.window is None
        k, v = (x.repeat_interleave(h.query // h.kv, 1) for x in (k, v))
        if case.window is not None:
            at = torch.arange(case.context, device=device)
            distance = at[:, None] - at[None]
            mask = (distance >= 0) & (distance < case.window)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=case.scale
        )
        if case.mode == "prefill":
            out = out.transpose(1, 2)
        return out.reshape(case.batch * case.new, h.query * h.dim)

    return [partial(run, q.clone(), k.clone(), v.clone()) for _ in range(sets)]
