"""The PTX interpreter itself, on a few lines of PTX: that it computes, and that it does not let wrong programs pass."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.machine import run
from ptx.memory import Global
from ptx.program import PtxError, parse

KERNEL = """
.version 8.0
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u32 kernel_param_1
)
.reqntid 32
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b32 %r1, [kernel_param_1];
    mov.u32 %r2, %tid.x;
    shl.b32 %r3, %r2, 2;
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd3, %rd1, %rd2;      // this thread's word
    BODY
    ret;
}
"""


def execute(body: str, number: int = 0, words: int = 32) -> np.ndarray:
    """Each thread has the address of its own 32-bit word in %rd3, its number in %r2 and 4 times that in %r3."""
    memory = Global(4096)
    start = memory.allocate(np.arange(words, dtype=np.uint32).view(np.uint8), 0)
    run(KERNEL.replace("BODY", body), memory, [start, number], (1, 1, 1), 1024)
    return memory.at(start, 4 * words).view(np.uint32)


def test_threads_part_and_meet():
    """A loop as long as the thread's number, which skips odd sums."""
    out = execute("""
        mov.b32 %r4, 0; mov.b32 %r5, 0;
    $again:
        setp.ge.s32 %p1, %r5, %r2;
        @%p1 bra $done;
        add.s32 %r5, %r5, 1;
        and.b32 %r6, %r5, 1;
        setp.eq.b32 %p2, %r6, 1;
        @%p2 bra $again;
        add.s32 %r4, %r4, %r5;
        bra.uni $again;
    $done:
        shfl.sync.idx.b32 %r7, %r4, 31, 31, -1;
        add.s32 %r4, %r4, %r7;
        st.global.b32 [%rd3], %r4;
    """)
    sums = np.array([sum(range(0, n + 1, 2)) for n in range(32)])
    assert np.array_equal(out, sums + sums[31])


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("mov.b32 %r9, -7; mov.b32 %r10, 2; div.s32 %r8, %r9, %r10;", -3),
        ("mov.b32 %r9, -7; mov.b32 %r10, 2; rem.s32 %r8, %r9, %r10;", -1),
        ("mov.b32 %r9, -8; shr.s32 %r8, %r9, 1;", -4),
        ("mov.b32 %r9, 1; shl.b32 %r8, %r9, 32;", 0),
        ("mov.b32 %r9, 0x12345678; prmt.b32 %r8, %r9, 0, 0x0123;", 0x78563412),
        ("mov.b32 %r9, 0x80; prmt.b32 %r8, %r9, 0, 0x8880;", -128),
        ("mov.b32 %r9, 0xF0; bfe.s32 %r8, %r9, 4, 4;", -1),
        ("mov.b32 %r9, 0xF0; bfe.u32 %r8, %r9, 4, 3;", 7),
        ("mov.b32 %r9, -1; mul.hi.s32 %r8, %r9, 5;", -1),
        ("mov.b32 %r9, 0x40200000; cvt.rni.s32.f32 %r8, %r9;", 2),  # 2.5 to even
        ("mov.b32 %r9, 0x7F800000; cvt.rzi.s32.f32 %r8, %r9;", 2**31 - 1),
        ("mov.b32 %r9, 0x3F808000; cvt.rn.bf16.f32 %rs1, %r9; cvt.u32.u16 %r8, %rs1;", 0x3F80),  # a tie, to even
        ("mov.b32 %r9, 0x3F818000; cvt.rn.bf16.f32 %rs1, %r9; cvt.u32.u16 %r8, %rs1;", 0x3F82),
        ("lop3.b32 %r8, 12, 10, 6, 0x96;", 0),
        ("mov.b32 %r9, 0x7FC00000; setp.ne.f32 %p1, %r9, %r9; selp.b32 %r8, 1, 0, %p1;", 0),
        ("mov.b32 %r9, 0x7FC00000; setp.neu.f32 %p1, %r9, %r9; selp.b32 %r8, 1, 0, %p1;", 1),
    ],
)
def test_arithmetic(code: str, wanted: int):
    assert (execute(f"{code} st.global.b32 [%rd3], %r8;").view(np.int32) == wanted).all()


COPY = "cp.async.ca.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x4, 4; cp.async.commit_group;"


def test_copies_land_when_they_are_waited_for():
    read = "ld.shared.b32 %r8, [%r3]; not.b32 %r8, %r8; st.global.b32 [%rd3], %r8;"
    assert np.array_equal(execute(f"{COPY} cp.async.wait_group 0; {read}"), ~np.arange(32, dtype=np.uint32))
    assert not execute(f"{COPY} cp.async.wait_group 1; {read}").any()  # what was never written is all ones


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("frobnicate.b32 %r8, %r9;", "frobnicate.b32 %r8, %r9: unknown instruction"),
        ("ld.global.ultra.b32 %r8, [%rd3];", "unknown ultra"),
        ("cvt.rn.satfinite.bf16.f32 %rs1, %r9;", "unknown"),
        ("mov.u32 %r8, %clock;", "unknown register %clock"),
        ("st.global.b32 [%rd3+128], %r2;", "outside of every argument"),
        ("ld.global.b32 %r8, [%rd3+-4];", "outside of every argument"),
        ("ld.global.b32 %r8, [%rd3+2];", "not a multiple of 4"),
        ("ld.shared.b32 %r8, [%r3+1024];", "beyond the block's 1024 bytes"),
        ("st.global.b32 [%rd1], %r2;", "two threads store different values"),
        ("setp.lt.s32 %p1, %r2, 3; @%p1 bra $end; bar.sync 0; $end:", "a part of a block is at a barrier"),
        ("setp.lt.s32 %p1, %r2, 3; @%p1 shfl.sync.bfly.b32 %r8, %r2, 1, 31, -1;", "a part of a warp"),
        ("mov.b32 %rd4, 0; st.global.b64 [%rd3], %rd4;", "not a multiple of 8"),
    ],
)
def test_wrong_programs_are_refused(code: str, problem: str):
    with pytest.raises(PtxError, match=problem):
        execute(code)


def test_texts_that_are_no_single_kernel_are_refused():
    with pytest.raises(PtxError, match="2 kernels"):
        parse(KERNEL + KERNEL)
    with pytest.raises(PtxError, match="number of threads"):
        parse(KERNEL.replace(".reqntid 32", ""))


def test_matrix_products_follow_the_layout():
    """m16n8k16: A has its row number in column 0 and 1 in column 9, B row 9 holds its column times 64."""
    out = execute("""
        shr.u32 %r4, %r2, 2; and.b32 %r5, %r2, 3;           // the lane's row, its place in it
        cvt.rn.f32.u32 %r6, %r4; add.f32 %r7, %r6, 0f41000000;
        mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0; mov.b32 %r14, 0; mov.b32 %r15, 0;
        setp.eq.b32 %p1, %r5, 0;
        @%p1 cvt.rn.bf16x2.f32 %r10, 0f00000000, %r6;       // a0: rows g, columns 2 q
        @%p1 cvt.rn.bf16x2.f32 %r11, 0f00000000, %r7;       // a1: rows g + 8
        @%p1 cvt.rn.bf16x2.f32 %r12, 0f3F800000, 0f00000000; // a2: columns 2 q + 8: 8 and 9
        @%p1 mov.b32 %r13, %r12;
        mul.f32 %r20, %r6, 0f42800000;
        @%p1 cvt.rn.bf16x2.f32 %r15, %r20, 0f00000000;      // b1: rows 2 q + 8, column g
        @%p1 cvt.rn.bf16x2.f32 %r14, 0f00000000, 0f3F800000; // b0: row 0 is ones
        mov.b32 %r30, 0; mov.b32 %r31, 0; mov.b32 %r32, 0; mov.b32 %r33, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r30, %r31, %r32, %r33}, {%r10, %r11, %r12, %r13},
            {%r14, %r15}, {%r30, %r31, %r32, %r33};
        add.s64 %rd4, %rd3, 0; mul.wide.u32 %rd5, %r2, 12; add.s64 %rd4, %rd4, %rd5;
        st.global.v4.b32 [%rd4], {%r30, %r31, %r32, %r33};
    """, words=128).view(np.float32).reshape(8, 4, 2, 2)  # fmt: skip
    row, place, below, right = np.indices((8, 4, 2, 2))
    assert np.array_equal(out, (row + 8 * below) + 64 * (2 * place + right))
