"""Rotary position embedding (Su et al. 2021, the rotate-half layout), after the norms of heads where a model has them, and
the write of k and v to the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cai_runtime.kernels.attention import HeadNorms
from cai_runtime.kernels.triton.checks import ACTIVATIONS, check_cache, check_tensor, require
from cai_runtime.kernels.triton.dependent import dependent_options, wait_for_previous_kernel
from cai_runtime.kernels.triton.launch import on_device
from cai_runtime.kernels.triton.quantized_rows import ROUND, codes_in, peak_of


@triton.jit
def to_codes(x, peak):
    """x in units of peak / 127, rounded once, halves to even: whatever a compiler would fuse. The reference rounds the
    product too, and can differ by a code where that lies within its rounding of a half."""
    return (tl.fma(x.to(tl.float32), codes_in(peak), ROUND) - ROUND).to(tl.int8)


@triton.jit
def rope_kv_write_kernel(
    qkv, positions, cos_sin, k_cache, v_cache, k_scale, v_scale, slots, norms, eps,
    ldq, ldc, page_size, k_page, k_head, k_slot, v_page, v_head, v_slot,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_DIM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One head of one row per program: q heads are normalized, and their first ROTARY dimensions rotated, in place; k heads
    are also written to the cache, v heads only written. norms: weights [2, DIM] of q and of k heads, or None. k_scale,
    v_scale: of an int8 cache, or None. Grid: (rows, Q_HEADS + 2 KV_HEADS)."""
    wait_for_previous_kernel(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = ROTARY // 2
    source = qkv + row * ldq + head * DIM
    slot = tl.load(slots + row)
    page = (slot // page_size).to(tl.int64)
    in_page = slot % page_size
    whole = tl.arange(0, BLOCK_DIM)
    if head < Q_HEADS + KV_HEADS:
        at = tl.arange(0, BLOCK_HALF)
        ok = at < HALF
        low = tl.load(source + at, mask=ok, other=0)
        high = tl.load(source + HALF + at, mask=ok, other=0)
        angle = cos_sin + tl.load(positions + row).to(tl.int64) * ldc
        cos = tl.load(angle + at, mask=ok, other=0.0)
        sin = tl.load(angle + HALF + at, mask=ok, other=0.0)
        x = low.to(tl.float32)
        y = high.to(tl.float32)
        if ROTARY < DIM:
            rest = (whole >= ROTARY) & (whole < DIM)
            unturned = tl.load(source + whole, mask=rest, other=0)
        if norms is not None:
            gain = norms + (head >= Q_HEADS) * DIM
            v = tl.load(source + whole, mask=whole < DIM, other=0).to(tl.float32)
            factor = tl.rsqrt(tl.sum(v * v, axis=0) / DIM + eps)
            x = x * factor * tl.load(gain + at, mask=ok, other=0).to(tl.float32)
            y = y * factor * tl.load(gain + HALF + at, mask=ok, other=0).to(tl.float32)
            if ROTARY < DIM:
                scaled = v * factor * tl.load(gain + whole, mask=rest, other=0).to(tl.float32)
                unturned = scaled.to(unturned.dtype)
                tl.store(source + whole, unturned, mask=rest)
        low = (x * cos - y * sin).to(low.dtype)
        high = (y * cos + x * sin).to(high.dtype)
        tl.store(source + at, low, mask=ok)
        tl.store(source + HALF + at, high, mask=ok)
        if (head >= Q_HEADS) & (slot >= 0):
            kept = k_cache + page * k_page + (head - Q_HEADS) * k_head + in_page * k_slot
            if k_scale is not None:
                peak = tl.maximum(peak_of(low), peak_of(high), propagate_nan=tl.PropagateNan.ALL)
                if ROTARY < DIM:
                    peak = tl.maximum(peak, peak_of(unturned), propagate_nan=tl.PropagateNan.ALL)
                    tl.store(kept + whole, to_codes(unturned, peak), mask=rest)
                tl.store(kept + at, to_codes(low, peak), mask=ok)
                tl.store(kept + HALF + at, to_codes(high, peak), mask=ok)
                scale_at = (page * KV_HEADS + head - Q_HEADS) * page_size + in_page
                tl.store(k_scale + scale_at, tl.div_rn(peak, 127.0))
            else:
                tl.store(kept + at, low.to(k_cache.dtype.element_ty), mask=ok)
                tl.store(kept + HALF + at, high.to(k_cache.dtype.element_ty), mask=ok)
                if ROTARY < DIM:
                    tl.store(kept + whole, unturned.to(k_cache.dtype.element_ty), mask=rest)
    else:
        if slot >= 0:
            kept = v_cache + page * v_page + (head - Q_HEADS - KV_HEADS) * v_head + in_page * v_slot
            x = tl.load(source + whole, mask=whole < DIM, other=0)
            if v_scale is not None:
                peak = peak_of(x)
                tl.store(kept + whole, to_codes(x, peak), mask=whole < DIM)
                scale_at = (page * KV_HEADS + head - Q_HEADS - KV_HEADS) * page_size + in_page
                tl.store(v_scale + scale_at, tl.div_rn(peak, 127.0))
            else:
                tl.store(kept + whole, x.to(v_cache.dtype.element_ty), mask=whole < DIM)


def rope_kv_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    Hq: int,
    Hkv: int,
    D: int,
    norms: HeadNorms | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Normalize and rotate q and k of `qkv` in place; write that k, and v, to their slots of the cache.

    Args:
        qkv: [M, (Hq + 2 Hkv) D]: q heads, k heads, v heads; float32, bfloat16 or float16; rows may lie apart.
        positions: int32 [M], each below cos_sin's number of rows (not checked: the values live on the device).
        cos_sin: float32 [max_pos, R]: R/2 cosines, then R/2 sines, for the angles of one position. R is even, 2 to D: the
            dimensions of a head that are rotated, the first ones; the others stay.
        k_cache, v_cache: [pages, Hkv, page_size, D], any activation dtype or int8, contiguous in D.
        slots: int32 [M]: page * page_size + offset, where each row goes; negative: nowhere (padding).
        Hq, Hkv, D: query heads, key/value heads, head dimension.
        norms: of q and k heads before the rotation, or None; the weights contiguous, in any activation dtype.
        k_scale, v_scale: of an int8 cache, and only there: float32 [pages, Hkv, page_size], contiguous.

    Raises:
        KernelError: a shape, dtype or device is not as above; names the argument.
    """
    require(Hq > 0 and Hkv > 0, f"Hq and Hkv must be positive, are {Hq} and {Hkv}")
    require(D > 0, f"D must be positive, is {D}")
    require(isinstance(qkv, torch.Tensor), "qkv must be a tensor")
    device = qkv.device
    heads = Hq + 2 * Hkv
    check_tensor("qkv", qkv, shape=(None, heads * D), device=device, dtypes=ACTIVATIONS)
    rows = qkv.shape[0]
    check_tensor("positions", positions, shape=(rows,), device=device, dtypes=(torch.int32,))
    check_tensor("slots", slots, shape=(rows,), device=device, dtypes=(torch.int32,))
    check_tensor("cos_sin", cos_sin, shape=(None, None), device=device, dtypes=(torch.float32,))
    rotary = cos_sin.shape[1]
    require(rotary % 2 == 0 and 2 <= rotary <= D, f"cos_sin must have an even 2 to D = {D} columns, has {rotary}")
    check_cache(k_cache, v_cache, k_scale, v_scale, (None, Hkv, None, D), device)
    weight = None
    if norms is not None:
        weight = norms.weight
        check_tensor("norms", weight, shape=(2, D), device=device, dtypes=ACTIVATIONS)
        require(weight.is_contiguous(), "norms must be contiguous")
    if rows == 0:
        return
    with on_device(qkv):
        rope_kv_write_kernel[(rows, heads)](
            qkv, positions, cos_sin, k_cache, v_cache, k_scale, v_scale, slots, weight, 0.0 if norms is None else norms.eps,
            qkv.stride(0), cos_sin.stride(0), k_cache.shape[2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            Hq, Hkv, D, rotary, triton.next_power_of_2(rotary // 2), triton.next_power_of_2(D), num_warps=1,
            **dependent_options(device),
        )  # fmt: skip
