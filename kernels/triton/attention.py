"""Causal attention over a paged KV cache, grouped-query, decode and ragged prefill in one kernel.

Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) over pages (Kwon et al. 2023). A program takes one KV
head and a tile of rows, a row being one query head of one token: the query heads that share a KV head sit in one tile,
so each key is read once for all of them. Keys run in blocks of one width from position 0, and the softmax's denominator
is summed by the matrix unit next to the numerator, so a row's result depends neither on its tile, nor on its prompt's
chunking, nor on the other sequences. A key block wholly after a row's position leaves that row as it was, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cai_runtime.kernels.triton.checks import ACTIVATIONS, check_tensor, require
from cai_runtime.kernels.triton.launch import compile_options, operand_dtype

LOG2_E = math.log2(math.e)


@triton.jit(do_not_specialize=["sequences"])
def paged_attention_kernel(
    q, k_cache, v_cache, out, query_start, context_len, page_table, sequences, scale_log2,
    ldq, q_head, ldo, k_page, k_head, k_slot, v_page, v_head, v_slot, ldt,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    COMPUTE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles, KV heads times parts). Sequence s owns the tiles from query_start[s] // TOKENS + s on: enough for its
    tokens, and known without reading the lengths back to the host."""
    tile = tl.program_id(0)
    # A KV head's query heads take one program, or several of HEADS each when there are very many.
    parts = tl.cdiv(GROUP, HEADS)
    kv_head = tl.program_id(1) // parts
    first_head = tl.program_id(1) % parts * HEADS
    # The last sequence whose first tile is not after this one.
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    sequence = low
    start = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - start
    first = (tile - (start // TOKENS + sequence)) * TOKENS
    if first < queries:
        context = tl.load(context_len + sequence)
        row = tl.arange(0, BLOCK_M)
        token = first + row // HEADS
        in_group = first_head + row % HEADS
        head = kv_head * GROUP + in_group
        row_ok = (row < TOKENS * HEADS) & (token < queries) & (in_group < GROUP)
        position = context - queries + token  # of each row's token in its sequence
        dim = tl.arange(0, BLOCK_D)
        dim_ok = dim < DIM
        rows64 = (start + token).to(tl.int64)
        query = tl.load(
            q + rows64[:, None] * ldq + head[:, None] * q_head + dim[None, :],
            mask=row_ok[:, None] & dim_ok[None, :], other=0,
        ).to(COMPUTE)  # fmt: skip
        largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        # Sixteen equal columns, the matrix unit's narrowest tile: its sums run in the numerator's order.
        denominator = tl.zeros((BLOCK_M, 16), dtype=tl.float32)
        numerator = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        ones = tl.full((BLOCK_N, 16), 1.0, dtype=COMPUTE)
        last = tl.minimum(first + TOKENS, queries) + context - queries  # keys that this tile's last token may see
        for begin in range(0, last, BLOCK_N):
            key_at = begin + tl.arange(0, BLOCK_N)
            key_ok = key_at < last
            page = tl.load(page_table + sequence.to(tl.int64) * ldt + key_at // PAGE, mask=key_ok, other=0).to(tl.int64)
            in_page = key_at % PAGE
            k_at = k_cache + page * k_page + kv_head * k_head + in_page * k_slot
            key = tl.load(k_at[None, :] + dim[:, None], mask=key_ok[None, :] & dim_ok[:, None], other=0)
            scores = tl.dot(query, key.to(COMPUTE), input_precision="ieee") * scale_log2
            seen = key_ok[None, :] & (key_at[None, :] <= position[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, axis=1))
            # Key 0 is seen by every row that is stored, so only padding rows can have no maximum yet.
            shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weights = tl.exp2(scores - shift[:, None]).to(COMPUTE)
            shrink = tl.exp2(largest - shift)
            v_at = v_cache + page * v_page + kv_head * v_head + in_page * v_slot
            value = tl.load(v_at[:, None] + dim[None, :], mask=key_ok[:, None] & dim_ok[None, :], other=0)
            denominator = tl.dot(weights, ones, denominator * shrink[:, None], input_precision="ieee")
            numerator = tl.dot(weights, value.to(COMPUTE), numerator * shrink[:, None], input_precision="ieee")
            largest = new_largest
        total = tl.sum(denominator, axis=1) / 16  # equal summands: exact
        result = numerator / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out + rows64[:, None] * ldo + head[:, None] * DIM + dim[None, :],
            result.to(out.dtype.element_ty), mask=row_ok[:, None] & dim_ok[None, :],
        )  # fmt: skip


MAX_ROWS = 32  # of a tile; 64 would switch Hopper and Blackwell to wgmma and tcgen05, whose sums round differently


@dataclass(frozen=True)
class AttentionTile:
    """Shape of a program. `keys`, the keys per step, fixes the order of the sums: it hangs on head dimension and dtype
    alone."""

    rows: int  # of the tile, at least tokens * heads
    heads: int  # query heads of one token in a tile
    keys: int
    num_warps: int
    max_registers: int | None = None

    @property
    def tokens(self) -> int:
        return self.rows // self.heads


def attention_tile(group: int, dim: int, dtype: torch.dtype, *, decode: bool) -> AttentionTile:
    """The tile for `group` query heads per KV head; a larger one when sequences bring more than a token each."""
    heads = min(group, MAX_ROWS)
    rows = max(16 if decode else MAX_ROWS, triton.next_power_of_2(heads))
    if dtype == torch.float32:
        # Without a stated limit ptxas squeezes eight warps into 48 registers and spills one.
        return AttentionTile(rows, heads, 16, 8, 128)
    return AttentionTile(rows, heads, 64 if dim <= 128 else 32, 4)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    page_table: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """softmax(scale q k^T, causal) v of every new token over its sequence's cached keys.

    Args:
        q: [M, Hq, D], float32, bfloat16 or float16, contiguous in D: the new tokens of all sequences, in order.
        k_cache, v_cache: [pages, Hkv, page_size, D], any activation dtype, contiguous in D; Hkv divides Hq. The new
            tokens' keys and values are already there.
        query_start: int32 [S + 1]: sequence s's new tokens are rows query_start[s] to query_start[s + 1]. It ascends,
            from 0 to M (rows beyond the last entry are left unwritten).
        context_len: int32 [S]: positions of each sequence, the new ones included.
        page_table: int32 [S, P], contiguous in P: position p of sequence s lives in page page_table[s, p // page_size].
        scale: multiplies q k^T, usually D ** -0.5.

    Returns:
        [M, Hq D] in q's dtype, newly allocated.

    Raises:
        KernelError: a shape, dtype or device is not as above; names the argument. The values of the int32 tensors live
            on the device and are not checked.
    """
    require(isinstance(q, torch.Tensor) and q.dim() == 3, "q must be a tensor of shape [M, Hq, D]")
    device = q.device
    rows, q_heads, dim = q.shape
    check_tensor("q", q, shape=(None, None, None), device=device, dtypes=ACTIVATIONS)
    check_tensor("k_cache", k_cache, shape=(None, None, None, dim), device=device, dtypes=ACTIVATIONS)
    check_tensor("v_cache", v_cache, shape=tuple(k_cache.shape), device=device, dtypes=ACTIVATIONS)
    _, kv_heads, page_size, _ = k_cache.shape
    require(
        kv_heads > 0 and q_heads % kv_heads == 0, f"q has {q_heads} heads, not a multiple of the cache's {kv_heads}"
    )
    require(0 < dim <= 256, f"the head dimension must be 1 to 256, is {dim}")
    require(page_size > 0, "the cache's page_size must be positive")
    check_tensor("context_len", context_len, shape=(None,), device=device, dtypes=(torch.int32,))
    sequences = context_len.shape[0]
    check_tensor("query_start", query_start, shape=(sequences + 1,), device=device, dtypes=(torch.int32,))
    check_tensor("page_table", page_table, shape=(sequences, None), device=device, dtypes=(torch.int32,))
    require(sequences > 0 or rows == 0, "q has rows but context_len names no sequence")
    out = torch.empty((rows, q_heads * dim), dtype=q.dtype, device=device)
    if rows == 0:
        return out
    group = q_heads // kv_heads
    tile = attention_tile(group, dim, q.dtype, decode=rows <= sequences)
    parts = triton.cdiv(group, tile.heads)
    options = compile_options(tile.num_warps, 2, max_registers=tile.max_registers)
    with torch.cuda.device_of(q):
        paged_attention_kernel[(rows // tile.tokens + sequences, kv_heads * parts)](
            q, k_cache, v_cache, out, query_start, context_len, page_table, sequences, float(scale) * LOG2_E,
            q.stride(0), q.stride(1), out.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3], page_table.stride(0),
            group, tile.heads, dim, page_size, operand_dtype(q.dtype),
            tile.tokens, tile.rows, tile.keys, max(16, triton.next_power_of_2(dim)), **options,
        )  # fmt: skip
    return out
