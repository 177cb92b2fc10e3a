"""The matrix products of slim linears: one launch multiplies the rows of x by up to three cores, x transformed on its way
in, the products scaled, scattered and added to on their way out.

Sums. Each element of a result is one chain in float32 over the input features, ascending:

    fp32, bf16, fp16, int8    acc = acc + x[k] w[k]. int8 integers are exact in every compute dtype; their row's scale
                              multiplies the finished sum.
    int4                      a chain of its own for each scale group, over the exact integers code - zero, then
                              acc = fma(group's sum, group's scale, acc), group after group. Scaling the sums rather than
                              the weights rounds nothing, and is fewer operations: one per element of the result and
                              group, where a weight tile has one per code.
    int8 activations          int32: exact in any order; both scales multiply the finished sum.

Tiles along the rows, the columns of the result, and along the input features beyond a scale group, change no bit.

int4 in registers. A 32-bit word holds columns 8 j to 8 j + 7. Masking it with 0x000F000F leaves column i of each half in
the low bits of two 16-bit numbers; or-ing the exponent of 128 (bfloat16) or 1024 (float16) makes them floats, exactly, and
one packed subtraction takes off that and the zero point: about five instructions for two weights (Kim et al. 2022). The
columns of x are taken in the same order.
"""

# ruff: noqa: SIM109, SIM300  # constants in capitals stand on the left, and Triton compiles no `in`

from __future__ import annotations

import triton
import triton.language as tl

from cai_runtime.kernels.triton.dependent import wait_for_previous_kernel

# Where a product goes.
ABSENT, TO_Z, TO_Y, TO_BOTH = 0, 1, 2, 3
# What happens to x first: nothing, or RMSNorm, with the mean square formed here or read from `factor`.
PLAIN, NORM, FACTOR = (tl.constexpr(i) for i in range(3))


@triton.jit
def inverse_rms(squares, width, eps):
    """1 / sqrt(mean + eps), the one formula of the launch that forms the squares and of the launch that is given them."""
    return tl.rsqrt(squares / width + eps)


@triton.jit
def add_squares(tile, total):
    """total + tile tile^T, whose diagonal has the rows' sums of squares: exact products, summed in the products' order."""
    return tl.dot(tile, tl.trans(tile), total, input_precision="ieee")


@triton.jit
def diagonal(square, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    return tl.sum(tl.where(at[:, None] == at[None, :], square, 0.0), axis=1)  # one summand is not zero: exact


@triton.jit
def _int4_values(words, zero, COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr):
    """Of words [BLOCK_N, STEP / 8], columns 8 j + a + 4 h for a, h in 0, 1: [BLOCK_N, (j, a, h)], less the zero points."""
    pairs = tl.join(words, words >> 4).reshape(BLOCK_N, STEP // 4) & 0x000F000F
    if COMPUTE == tl.float32:
        values = tl.join(pairs & 0xFFFF, pairs >> 16).reshape(BLOCK_N, STEP // 2).to(COMPUTE)
        values = values - zero.to(COMPUTE)[:, None]
    else:
        EXPONENT: tl.constexpr = 0x43004300 if COMPUTE == tl.bfloat16 else 0x64006400
        BASE: tl.constexpr = 128.0 if COMPUTE == tl.bfloat16 else 1024.0
        pairs = pairs | EXPONENT
        halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).reshape(BLOCK_N, STEP // 2)
        values = halves.to(COMPUTE, bitcast=True) - (zero.to(tl.float32) + BASE).to(COMPUTE)[:, None]
    return values


@triton.jit
def _product_tile(
    x, x_scale, gain, factor, w, scale, zero, index, bias, residual, z, y,
    M, N, K, ldx, pitch, groups, ldr, ldz, ldy, x_col, z_col, y_col, eps, first_row, first_col,
    TO: tl.constexpr, GROUP: tl.constexpr, PROLOGUE: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of x [M, K] times w [N, K] transposed, and its epilogue."""
    rows = first_row + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    row_ok = rows < M
    col_ok = cols < N
    rows64 = rows.to(tl.int64)
    x += x_col
    squares = tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)
    if GROUP == 0:
        ks = tl.arange(0, BLOCK_K)
        # The pitch counts 16 bytes, so that the compiler knows how wide it may load.
        ldw = pitch * (128 // w.dtype.element_ty.primitive_bitwidth)
        x_at = x + rows64[:, None] * ldx + ks[None, :]
        w_at = w + cols.to(tl.int64)[None, :] * ldw + ks[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if COMPUTE == tl.int8 else tl.float32)
        for k in range(0, K, BLOCK_K):
            x_ok = row_ok[:, None] & (ks < K - k)[None, :]
            a = tl.load(x_at, mask=x_ok, other=0).to(COMPUTE)
            b = tl.load(w_at, mask=(ks < ldw - k)[:, None] & col_ok[None, :], other=0).to(COMPUTE)
            if PROLOGUE == NORM:
                if w.dtype.element_ty == tl.int8:
                    # Loaded once more, under a policy that keeps the compiler from seeing that: products with int8 take
                    # x in another layout than its squares, and a load that feeds both would not be made ahead.
                    again = tl.load(x_at, mask=x_ok, other=0, eviction_policy="evict_last")
                    squares = add_squares(again.to(COMPUTE), squares)
                else:
                    squares = add_squares(a, squares)
            if PROLOGUE == NORM or PROLOGUE == FACTOR:
                a = a * tl.load(gain + k + ks, mask=ks < K - k, other=0).to(COMPUTE)[None, :]
            acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
            x_at += BLOCK_K
            w_at += BLOCK_K
    else:
        STEP: tl.constexpr = 32 if COMPUTE == tl.float32 else GROUP  # float32 operands fill the registers
        WORDS: tl.constexpr = STEP // 8
        ks = tl.arange(0, STEP)
        word = tl.arange(0, WORDS)
        ldw = pitch * 4
        x_at = x + rows64[:, None] * ldx + ks[None, :]
        w_at = w + cols.to(tl.int64)[:, None] * ldw + word[None, :]
        scale_at = scale + cols.to(tl.int64) * groups
        if zero is not None:
            zero_at = zero + cols.to(tl.int64) * groups
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            for g in tl.static_range(BLOCK_K // GROUP):
                group_ok = col_ok & (k // GROUP + g < groups)
                group_scale = tl.load(scale_at + k // GROUP + g, mask=group_ok, other=0).to(tl.float32)
                if zero is not None:
                    offset = tl.load(zero_at + k // GROUP + g, mask=group_ok, other=0)
                else:
                    offset = tl.full((BLOCK_N,), 8, dtype=tl.int32)
                part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                for s in tl.static_range(GROUP // STEP):
                    # What is left of K and of a row from this step on; x_at and w_at are where the loop's body began.
                    left = K - k - (g * GROUP + s * STEP)
                    words_left = ldw - k // 8 - (g * GROUP + s * STEP) // 8
                    a = tl.load(x_at + (g * GROUP + s * STEP), mask=row_ok[:, None] & (ks < left)[None, :], other=0)
                    a = a.to(COMPUTE)
                    ok = (word < words_left)[None, :] & col_ok[:, None]
                    b = tl.load(w_at + (g * GROUP + s * STEP) // 8, mask=ok, other=0)
                    if PROLOGUE == NORM:
                        squares = add_squares(a, squares)
                    if PROLOGUE == NORM or PROLOGUE == FACTOR:
                        gain_at = gain + k + (g * GROUP + s * STEP) + ks
                        a = a * tl.load(gain_at, mask=ks < left, other=0).to(COMPUTE)[None, :]
                    # Columns of x as (j, h, b, a) for 8 j + 4 h + 2 b + a, split by b.
                    a0, a1 = tl.split(a.reshape(BLOCK_M, WORDS, 2, 2, 2).trans(0, 1, 4, 2, 3))
                    b0 = _int4_values(b, offset, COMPUTE, BLOCK_N, STEP)
                    b1 = _int4_values(b >> 8, offset, COMPUTE, BLOCK_N, STEP)
                    part = tl.dot(a0.reshape(BLOCK_M, STEP // 2), tl.trans(b0), part, input_precision="ieee")
                    part = tl.dot(a1.reshape(BLOCK_M, STEP // 2), tl.trans(b1), part, input_precision="ieee")
                acc = tl.fma(part, group_scale[None, :], acc)
            x_at += BLOCK_K
            w_at += BLOCK_K // 8
    if COMPUTE == tl.int8:
        scale_of_row = tl.load(x_scale + rows64 * (ldx // 16) + x_col // 16, mask=row_ok, other=0.0)
        acc = acc.to(tl.float32) * scale_of_row[:, None]
    if PROLOGUE == NORM:
        acc = acc * inverse_rms(diagonal(squares, BLOCK_M), K, eps)[:, None]
    elif PROLOGUE == FACTOR:
        acc = acc * tl.load(factor + rows, mask=row_ok, other=0.0)[:, None]
    if GROUP == 0 and scale is not None:
        acc = acc * tl.load(scale + cols, mask=col_ok, other=0.0)[None, :]
    if TO % 2 == 1:
        # Zeros up to a whole 16 columns: the next stage reads z in wide loads.
        ok = row_ok[:, None] & (cols < tl.cdiv(N, 16) * 16)[None, :]
        tl.store(z + rows64[:, None] * ldz + (z_col + cols)[None, :], acc.to(z.dtype.element_ty), mask=ok)
    if TO >= 2:
        ok = row_ok[:, None] & col_ok[None, :]
        if index is not None:
            out = tl.load(index + cols, mask=col_ok, other=0)
        else:
            out = cols
        if bias is not None:
            acc = acc + tl.load(bias + out, mask=col_ok, other=0).to(tl.float32)[None, :]
        if residual is not None:
            kept = residual + rows64[:, None] * ldr + (y_col + out)[None, :]
            acc = acc + tl.load(kept, mask=ok, other=0).to(tl.float32)
        tl.store(y + rows64[:, None] * ldy + (y_col + out)[None, :], acc.to(y.dtype.element_ty), mask=ok)


# Never specialized on M, so that a row's result can't depend on how many rows there are.
@triton.jit(do_not_specialize=["M"])
def products_kernel(
    x, x_scale, gain, factor, residual, z, y, M, ldx, ldr, ldz, ldy, eps,
    w0, scale0, zero0, index0, bias0, N0, K0, pitch0, groups0, x_col0, z_col0, y_col0,
    w1, scale1, zero1, index1, bias1, N1, K1, pitch1, groups1, x_col1, z_col1, y_col1,
    w2, scale2, zero2, index2, bias2, N2, K2, pitch2, groups2, x_col2, z_col2, y_col2,
    TO_0: tl.constexpr, TO_1: tl.constexpr, TO_2: tl.constexpr,
    GROUP_0: tl.constexpr, GROUP_1: tl.constexpr, GROUP_2: tl.constexpr,
    PROLOGUE: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One stage of up to three members. Member g reads x[:, x_col_g : x_col_g + K_g] and w_g [N_g, K_g]; its columns
    of z start at z_col_g, those of y at y_col_g. A row of w_g is pitch_g times 16 bytes, zeros beyond K_g; int4 has groups_g
    scales in a row. Of int8 x, the columns from x_col_g have row r's scale at x_scale[r, x_col_g / 16].

    Grid: (row tiles, column tiles of all members)."""
    wait_for_previous_kernel(DEPENDENT)
    first_row = tl.program_id(0) * BLOCK_M
    tile = tl.program_id(1)
    tiles0 = tl.cdiv(N0, BLOCK_N)
    if tile < tiles0:
        _product_tile(
            x, x_scale, gain, factor, w0, scale0, zero0, index0, bias0, residual, z, y,
            M, N0, K0, ldx, pitch0, groups0, ldr, ldz, ldy, x_col0, z_col0, y_col0, eps,
            first_row, tile * BLOCK_N,
            TO_0, GROUP_0, PROLOGUE, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if TO_1 != 0:
        tile -= tiles0
        tiles1 = tl.cdiv(N1, BLOCK_N)
        if (tile >= 0) & (tile < tiles1):
            _product_tile(
                x, x_scale, gain, factor, w1, scale1, zero1, index1, bias1, residual, z, y,
                M, N1, K1, ldx, pitch1, groups1, ldr, ldz, ldy, x_col1, z_col1, y_col1, eps,
                first_row, tile * BLOCK_N,
                TO_1, GROUP_1, PROLOGUE, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if TO_2 != 0:
            tile -= tiles1
            if tile >= 0:
                _product_tile(
                    x, x_scale, gain, factor, w2, scale2, zero2, index2, bias2, residual, z, y,
                    M, N2, K2, ldx, pitch2, groups2, ldr, ldz, ldy, x_col2, z_col2, y_col2, eps,
                    first_row, tile * BLOCK_N,
                    TO_2, GROUP_2, PROLOGUE, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def factor_kernel(
    x, factor, M, K, ldx, eps,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """factor [M] = 1 / rms of the rows of x, with the bits that NORM gives: for many rows, whose column tiles would each
    form it again. Grid: row tiles."""
    wait_for_previous_kernel(DEPENDENT)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < M
    ks = tl.arange(0, BLOCK_K)
    x_at = x + rows.to(tl.int64)[:, None] * ldx + ks[None, :]
    squares = tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        tile = tl.load(x_at, mask=row_ok[:, None] & (ks < K - k)[None, :], other=0).to(COMPUTE)
        squares = add_squares(tile, squares)
        x_at += BLOCK_K
    tl.store(factor + rows, inverse_rms(diagonal(squares, BLOCK_M), K, eps), mask=row_ok)
