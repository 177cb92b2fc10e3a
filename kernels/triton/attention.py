"""Causal attention over a paged KV cache, grouped-query, for decode and ragged prefill; sliding windows, attention sinks.

Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) over pages (Kwon et al. 2023). A program takes one KV head and
a tile of rows, a row being one query head of one token: the query heads that share a KV head sit in one tile, so each key is
read once for all of them.

Order. Keys are cut into splits of 256 positions, counted from position 0. Within a split they run in blocks of one width,
in order, the softmax's denominator summed by the matrix unit next to the numerator; the splits are merged in order. With
few rows, where one program per row and head would leave the GPU idle, each split has a program of its own and a second
kernel merges what they found (flash-decoding, Dao et al. 2023); with many, one program runs through the splits and merges
as it goes. Both by the same formula, so a row's bits depend neither on which of them ran, nor on its tile, nor on its
prompt's chunking, nor on the other sequences. A block that a row does not see, after its position or before its window,
leaves that row as it was, exactly: so blocks that no row of a tile sees are not read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cai_runtime.kernels.triton.checks import ACTIVATIONS, check_cache, check_tensor, require
from cai_runtime.kernels.triton.dependent import dependent_options, wait_for_previous_kernel
from cai_runtime.kernels.triton.launch import compile_options, interpreting, is_hopper, on_device, operand_dtype

LOG2_E = tl.constexpr(math.log2(math.e))
INTERPRETED = tl.constexpr(interpreting())
SPLIT = tl.constexpr(256)  # positions; a multiple of every block of keys
MOST_SCRATCH = (
    64 << 20
)  # bytes that the splits of a step may leave for the merge; more, and one program runs through them


@triton.jit
def find_sequence(query_start, sequences, row_or_tile, TOKENS: tl.constexpr):
    """The last sequence whose first row, or first tile of TOKENS rows, is not after this one."""
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if TOKENS == 0:
            start = tl.load(query_start + middle)
        else:
            start = tl.load(query_start + middle) // TOKENS + middle
        if start <= row_or_tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def merge(largest, total, numerator, next_largest, next_total, next_numerator):
    """Softmax state of the keys so far and of those that follow: the maximum [R], the denominator [R], the numerator
    [R, D], both relative to the maximum. A state without keys is (-inf, 0, 0), and merging it changes nothing."""
    new = tl.maximum(largest, next_largest)
    shift = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp2(largest - shift)
    add = tl.exp2(next_largest - shift)
    total = tl.fma(total, keep, next_total * add)
    numerator = tl.fma(numerator, keep[:, None], next_numerator * add[:, None])
    return new, total, numerator


@triton.jit
def finish(largest, total, numerator, sinks, head, head_ok):
    """The softmax's quotient. A head's sink is one more logit in the denominator (Agarwal et al. 2025)."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=head_ok, other=0.0)
        new = tl.maximum(largest, sink * LOG2_E)
        keep = tl.exp2(largest - new)
        total = tl.fma(total, keep, tl.exp2(tl.fma(sink, LOG2_E, -new)))
        numerator = numerator * keep[:, None]
    return numerator / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _as_bf16(code):
    return code.to(tl.bfloat16)


@triton.jit
def _as_fp16(code):
    return code.to(tl.float16)


@triton.jit
def operand(x, dtype: tl.constexpr):
    """x in the type that the matrix unit takes.

    Triton lays a product's operands out by the narrowest type that it finds between them and memory, looking through plain
    conversions: codes of a byte would give a lane runs of four columns, and an instruction of `mma.sync` other columns than
    wgmma's, so that decode and a long prompt would add in different orders. It does not look through a mapped function. Its
    interpreter has none; fp32 is multiplied without the matrix unit."""
    if x.dtype != tl.int8 or dtype == tl.float32 or INTERPRETED:
        result = x.to(dtype)
    elif dtype == tl.bfloat16:
        result = tl.map_elementwise(_as_bf16, x)
    else:
        result = tl.map_elementwise(_as_fp16, x)
    return result


@triton.jit
def _attend(
    query, k_cache, v_cache, k_scale, v_scale, table, position, begin, visible, stop, scale_log2, k_page, k_slot, v_page,
    v_slot, s_page, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The softmax state of `query` [BLOCK_M, BLOCK_D] over keys begin to stop of one KV head. Those before `visible` are not
    read: their pages may be another sequence's, and a NaN there times a weight of zero would be NaN.

    Of an int8 cache the matrix unit sees the codes, exact in every COMPUTE, and the weights times the values' scales."""
    dim = tl.arange(0, BLOCK_D)
    dim_ok = dim < DIM
    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    # Sixteen equal columns, the matrix unit's narrowest tile: its sums run in the numerator's order.
    denominator = tl.zeros((BLOCK_M, 16), dtype=tl.float32)
    numerator = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    ones = tl.full((BLOCK_N, 16), 1.0, dtype=COMPUTE)
    for at in range(begin, stop, BLOCK_N):
        key_at = at + tl.arange(0, BLOCK_N)
        key_ok = key_at < stop
        if WINDOW:
            key_ok = key_ok & (key_at >= visible)
        page = tl.load(table + key_at // PAGE, mask=key_ok, other=0).to(tl.int64)
        in_page = key_at % PAGE
        k_at = k_cache + page * k_page + in_page * k_slot
        key = tl.load(k_at[None, :] + dim[:, None], mask=key_ok[None, :] & dim_ok[:, None], other=0)
        scores = tl.dot(query, operand(key, COMPUTE), input_precision="ieee")
        if k_scale is not None:
            s_at = page * s_page + in_page
            scores = scores * (tl.load(k_scale + s_at, mask=key_ok, other=0.0) * scale_log2)[None, :]
        else:
            scores = scores * scale_log2
        seen = key_ok[None, :] & (key_at[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (key_at[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(largest - shift)
        v_at = v_cache + page * v_page + in_page * v_slot
        value = tl.load(v_at[:, None] + dim[None, :], mask=key_ok[:, None] & dim_ok[None, :], other=0)
        denominator = tl.dot(weights.to(COMPUTE), ones, denominator * shrink[:, None], input_precision="ieee")
        if v_scale is not None:
            weights = weights * tl.load(v_scale + s_at, mask=key_ok, other=0.0)[None, :]
        numerator = tl.dot(
            weights.to(COMPUTE), operand(value, COMPUTE), numerator * shrink[:, None], input_precision="ieee"
        )
        largest = new_largest
    return largest, tl.sum(denominator, axis=1) / 16, numerator  # equal summands: exact


@triton.jit(do_not_specialize=["sequences", "rows"])
def paged_attention_kernel(
    q, k_cache, v_cache, k_scale, v_scale, out, states, numerators, sinks, query_start, context_len, page_table, sequences,
    rows, scale_log2, ldq, q_head, ldo, k_page, k_head, k_slot, v_page, v_head, v_slot, s_page, s_head, ldt,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    COMPUTE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles, KV heads times parts, 1 or splits). Sequence s owns the tiles from query_start[s] // TOKENS + s on:
    enough for its tokens, and known without reading the lengths back to the host. With `states` [splits, rows, heads, 2] and
    `numerators` [splits, rows, heads, DIM], a program takes the split of its third index and leaves its state there."""
    wait_for_previous_kernel(DEPENDENT)
    tile = tl.program_id(0)
    # A KV head's query heads take one program, or several of HEADS each when there are very many.
    parts = tl.cdiv(GROUP, HEADS)
    kv_head = tl.program_id(1) // parts
    first_head = tl.program_id(1) % parts * HEADS
    sequence = find_sequence(query_start, sequences, tile, TOKENS)
    start = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - start
    first = (tile - (start // TOKENS + sequence)) * TOKENS
    if first < queries:
        before = tl.load(context_len + sequence) - queries  # positions before this step
        row = tl.arange(0, BLOCK_M)
        token = first + row // HEADS
        in_group = first_head + row % HEADS
        head = kv_head * GROUP + in_group
        row_ok = (row < TOKENS * HEADS) & (token < queries) & (in_group < GROUP)
        position = before + token  # of each row's token in its sequence
        dim = tl.arange(0, BLOCK_D)
        ok = row_ok[:, None] & (dim < DIM)[None, :]
        rows64 = (start + token).to(tl.int64)
        query = tl.load(q + rows64[:, None] * ldq + head[:, None] * q_head + dim[None, :], mask=ok, other=0).to(COMPUTE)
        k_cache += kv_head * k_head
        v_cache += kv_head * v_head
        if k_scale is not None:
            k_scale += kv_head * s_head
            v_scale += kv_head * s_head
        table = page_table + sequence.to(tl.int64) * ldt
        stop = before + tl.minimum(first + TOKENS, queries)  # keys that this tile's last token sees
        visible = tl.maximum(before + first - WINDOW + 1, 0) if WINDOW else 0  # the first that its first token sees
        if states is not None:
            split = tl.program_id(2)
            begin = tl.maximum(split * SPLIT, visible // BLOCK_N * BLOCK_N)
            end = tl.minimum((split + 1) * SPLIT, stop)
            if begin < end:
                largest, total, numerator = _attend(
                    query, k_cache, v_cache, k_scale, v_scale, table, position, begin, visible, end, scale_log2, k_page,
                    k_slot, v_page, v_slot, s_page, DIM, PAGE, WINDOW, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                heads = tl.num_programs(1) // parts * GROUP
                at = (split.to(tl.int64) * rows + rows64) * heads + head
                tl.store(states + 2 * at, largest, mask=row_ok)
                tl.store(states + 2 * at + 1, total, mask=row_ok)
                tl.store(numerators + at[:, None] * DIM + dim[None, :], numerator, mask=ok)
        else:
            largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK_M,), dtype=tl.float32)
            numerator = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
            for split in range(visible // SPLIT, tl.cdiv(stop, SPLIT)):
                begin = tl.maximum(split * SPLIT, visible // BLOCK_N * BLOCK_N)
                next_largest, next_total, next_numerator = _attend(
                    query, k_cache, v_cache, k_scale, v_scale, table, position, begin, visible,
                    tl.minimum((split + 1) * SPLIT, stop), scale_log2, k_page, k_slot, v_page, v_slot, s_page,
                    DIM, PAGE, WINDOW, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                largest, total, numerator = merge(largest, total, numerator, next_largest, next_total, next_numerator)
            result = finish(largest, total, numerator, sinks, head, row_ok)
            at = out + rows64[:, None] * ldo + head[:, None] * DIM + dim[None, :]
            tl.store(at, result.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _split_state(states, numerators, split, after_last, row, head, dim, dim_ok, DIM: tl.constexpr):
    """What a split left; beyond the last, the state without keys."""
    there = split < after_last
    at = (split * tl.num_programs(0) + row) * tl.num_programs(1) + head
    largest = tl.load(states + 2 * at, mask=there, other=float("-inf"))
    total = tl.load(states + 2 * at + 1, mask=there, other=0.0)
    numerator = tl.load(numerators + at[:, None] * DIM + dim[None, :], mask=dim_ok & there, other=0.0)
    return largest, total, numerator


@triton.jit(do_not_specialize=["sequences"])
def merge_splits_kernel(
    states, numerators, out, sinks, query_start, context_len, sequences, ldo,
    DIM: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """What the splits of one head of one row left, merged in order. Grid: (rows, heads)."""
    wait_for_previous_kernel(DEPENDENT)
    row = tl.program_id(0)
    head = tl.program_id(1) + tl.zeros((1,), dtype=tl.int64)
    sequence = find_sequence(query_start, sequences, row, 0)
    after = tl.load(query_start + sequence + 1)
    if row < after:
        position = tl.load(context_len + sequence) - after + row
        visible = tl.maximum(position - WINDOW + 1, 0) if WINDOW else 0
        dim = tl.arange(0, BLOCK_D)
        dim_ok = (dim < DIM)[None, :]
        largest = tl.full((1,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((1,), dtype=tl.float32)
        numerator = tl.zeros((1, BLOCK_D), dtype=tl.float32)
        after_last = position // SPLIT + 1
        # Four at a time: their loads are under way together, where one after the other each would wait for memory.
        for split in range(visible // SPLIT, after_last, 4):
            state_0 = _split_state(states, numerators, split, after_last, row, head, dim, dim_ok, DIM)
            state_1 = _split_state(states, numerators, split + 1, after_last, row, head, dim, dim_ok, DIM)
            state_2 = _split_state(states, numerators, split + 2, after_last, row, head, dim, dim_ok, DIM)
            state_3 = _split_state(states, numerators, split + 3, after_last, row, head, dim, dim_ok, DIM)
            largest, total, numerator = merge(largest, total, numerator, state_0[0], state_0[1], state_0[2])
            largest, total, numerator = merge(largest, total, numerator, state_1[0], state_1[1], state_1[2])
            largest, total, numerator = merge(largest, total, numerator, state_2[0], state_2[1], state_2[2])
            largest, total, numerator = merge(largest, total, numerator, state_3[0], state_3[1], state_3[2])
        result = finish(largest, total, numerator, sinks, head, head >= 0)
        at = out + row.to(tl.int64) * ldo + head[:, None] * DIM + dim[None, :]
        tl.store(at, result.to(out.dtype.element_ty), mask=dim_ok)


# Of a tile. From 64 rows on Triton takes a warp group's products on Hopper, and tcgen05 on Blackwell. The former add as
# mma.sync does there (Xie et al., MMA-Sim, arXiv:2511.10909), so that a row has the same bits in either tile.
MAX_ROWS, MAX_ROWS_HOPPER = 32, 128
# Tokens of prompts in a step that are worth the larger tile: each of the step's sequences takes at least one.
MANY_TOKENS = 256


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


FULL_GRID = 256  # programs that keep a GPU busy: with fewer, and more than one split, splits get programs of their own


def attention_tile(
    group: int, dim: int, dtype: torch.dtype, *, decode: bool, many: bool = False, hopper: bool = False
) -> AttentionTile:
    """The tile for `group` query heads per KV head; a larger one when sequences bring more than a token each. many: they
    bring many more."""
    # Without a stated limit on registers, ptxas takes a lower one and spills.
    heads = min(group, MAX_ROWS)
    rows = max(16 if decode else MAX_ROWS, triton.next_power_of_2(heads))
    if dtype == torch.float32:
        return AttentionTile(rows, heads, 16, 8, 128)
    if many and hopper and dim in (64, 128):
        return AttentionTile(MAX_ROWS_HOPPER, heads, 64, 8, 255)
    return AttentionTile(rows, heads, 64 if dim <= 128 else 32, 4, 255)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    page_table: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T, causal) v of every new token over its sequence's cached keys.

    Args:
        q: [M, Hq, D], float32, bfloat16 or float16, contiguous in D: the new tokens of all sequences, in order.
        k_cache, v_cache: [pages, Hkv, page_size, D], any activation dtype or int8, contiguous in D; Hkv divides Hq. The
            new tokens' keys and values are already there.
        query_start: int32 [S + 1]: sequence s's new tokens are rows query_start[s] to query_start[s + 1]. It ascends,
            from 0 to M (rows beyond the last entry are left unwritten).
        context_len: int32 [S]: positions of each sequence, the new ones included; at most P * page_size.
        page_table: int32 [S, P], contiguous in P: position p of sequence s lives in page page_table[s, p // page_size].
            P, not the lengths, sizes the launch and its scratch memory, so that a captured graph holds for all lengths.
        scale: multiplies q k^T, usually D ** -0.5.
        window: a query sees its own position and the window - 1 before it; None: all before it.
        sinks: float32 [Hq], a logit of each head that takes part in the softmax and brings no value.
        k_scale, v_scale: of an int8 cache, and only there: float32 [pages, Hkv, page_size], contiguous.

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
    check_cache(k_cache, v_cache, k_scale, v_scale, (None, None, None, dim), device)
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
    require(window is None or window >= 1, f"a sliding window is at least 1 position, not {window}")
    if sinks is not None:
        check_tensor("sinks", sinks, shape=(q_heads,), device=device, dtypes=(torch.float32,))
    out = torch.empty((rows, q_heads * dim), dtype=q.dtype, device=device)
    if rows == 0:
        return out
    group = q_heads // kv_heads
    decode = rows <= sequences
    many = rows >= sequences + MANY_TOKENS
    tile = attention_tile(group, dim, q.dtype, decode=decode, many=many, hopper=is_hopper(device))
    tiles, head_programs = rows // tile.tokens + sequences, kv_heads * triton.cdiv(group, tile.heads)
    splits = triton.cdiv(page_table.shape[1] * page_size, SPLIT.value)
    states = numerators = None
    scratch = 4 * splits * rows * q_heads * (dim + 2)
    if decode and splits > 1 and rows * head_programs < FULL_GRID and scratch <= MOST_SCRATCH:
        states = torch.empty((splits, rows, q_heads, 2), dtype=torch.float32, device=device)
        numerators = torch.empty((splits, rows, q_heads, dim), dtype=torch.float32, device=device)
    block_d = max(16, triton.next_power_of_2(dim))
    dependent = dependent_options(device)
    options = compile_options(tile.num_warps, 2, max_registers=tile.max_registers) | dependent
    with on_device(q):
        paged_attention_kernel[(tiles, head_programs, 1 if states is None else splits)](
            q, k_cache, v_cache, k_scale, v_scale, out, states, numerators, sinks, query_start, context_len, page_table,
            sequences, rows, float(scale) * LOG2_E.value, q.stride(0), q.stride(1), out.stride(0), *k_cache.stride()[:3],
            *v_cache.stride()[:3], *((0, 0) if k_scale is None else k_scale.stride()[:2]), page_table.stride(0),
            group, tile.heads, dim, page_size, window or 0, operand_dtype(q.dtype), tile.tokens, tile.rows, tile.keys,
            block_d, **options,
        )  # fmt: skip
        if states is not None:
            merge_splits_kernel[(rows, q_heads)](
                states, numerators, out, sinks, query_start, context_len, sequences, out.stride(0), dim, window or 0,
                block_d, num_warps=1, **dependent,
            )  # fmt: skip
    return out
