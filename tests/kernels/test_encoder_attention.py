"""Full attention over windows: within a derived bound of float64, and on the CPU kernels the same bits alone, in a batch,
with any number of threads and in a recorded pass."""

from __future__ import annotations

import pytest
import torch
from error_bounds import Bounded, check
from full_attention import all_heads
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import BACKENDS, CPU, bits_equal, bounded, sizes, threads, using

from cai_runtime.errors import KernelError
from cai_runtime.kernels.attention import HeadLayout
from cai_runtime.kernels.encoder_attention import TorchEncoderAttention
from cai_runtime.kernels.program import Axis, Input, record
from cai_runtime.layers.ops import make_ops

CPU_DEVICE = torch.device("cpu")


def check_windows(attention, heads: HeadLayout, rows: int, windows: int, seed: int, reach: float = 1.0) -> None:
    """reach: the standard deviation of scores."""
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(windows * rows, heads.qkv_width, generator=g)
    scale = reach * heads.head_dim**-0.5
    out = attention(qkv, scale)
    kv = heads.kv_heads

    def within(growth) -> Bounded:
        each = [w.split([heads.query_heads, kv, kv], dim=1) for w in qkv.view(windows, rows, -1, heads.head_dim)]
        parts = [all_heads(q, k, v, scale, growth) for q, k, v in each]
        return Bounded(torch.cat([p.value for p in parts]), torch.cat([p.error for p in parts]))

    check(out, within)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    st.integers(1, 3), st.integers(1, 3), sizes(200), sizes(200), st.integers(1, 3), st.sampled_from([0.1, 1, 30]),
    st.integers(0, 2**31),
)  # fmt: skip
@bounded(40)
def test_windows_are_within_the_bound(backend, kv_heads, group, dim, rows, windows, reach, seed):
    heads = HeadLayout(kv_heads * group, kv_heads, dim, 0)
    with using(backend) as name:
        attention = make_ops(name, CPU_DEVICE).encoder_attention(heads, rows)
        check_windows(attention, heads, rows, windows, seed, reach)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_whisper(backend: str):
    heads = HeadLayout(2, 2, 64, 0)
    with using(backend) as name:
        check_windows(make_ops(name, CPU_DEVICE).encoder_attention(heads, 1500), heads, 1500, 1, 0)


def test_torch_on_another_device():
    """What a GPU runs, here on the CPU."""
    for heads in (HeadLayout(2, 2, 16, 0), HeadLayout(4, 2, 8, 0)):
        check_windows(TorchEncoderAttention(heads, 30), heads, 30, 2, 0)


def test_the_reference_computes_in_float64():
    heads = HeadLayout(2, 2, 16, 0)
    attention = make_ops("reference", CPU_DEVICE).encoder_attention(heads, 9)
    qkv = torch.randn(18, heads.qkv_width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = (p.transpose(1, 2) for p in qkv.view(2, 9, 3, 2, 16).unbind(2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).reshape(18, -1)
    torch.testing.assert_close(attention(qkv, 0.3), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", CPU)
@given(st.integers(1, 2), st.integers(1, 2), sizes(130), sizes(200), st.integers(1, 4), st.integers(0, 2**31))
@bounded(20)
def test_neighbours_threads_and_recording_do_not_change_the_bits(backend, kv_heads, group, dim, rows, windows, seed):
    heads = HeadLayout(kv_heads * group, kv_heads, dim, 0)
    qkv = torch.randn(windows * rows, heads.qkv_width, generator=torch.Generator().manual_seed(seed))
    with using(backend) as name:
        attention = make_ops(name, CPU_DEVICE).encoder_attention(heads, rows)
        with threads(1):
            alone = torch.cat([attention(window, 0.3) for window in qkv.split(rows)])
        program = record(lambda qkv: attention(qkv, 0.3), {"qkv": Input(Axis.ENCODER, heads.qkv_width)})
        for n in (1, 2, 3, 7):
            with threads(n):
                assert bits_equal(attention(qkv, 0.3), alone)
                assert bits_equal(program(qkv=qkv), alone)


@pytest.mark.parametrize("backend", CPU)
def test_nan_stays_in_its_row_or_window(backend: str):
    heads = HeadLayout(2, 2, 16, 0)
    qkv = torch.randn(3 * 70, heads.qkv_width, generator=torch.Generator().manual_seed(0))
    bad = qkv.clone()
    bad[7, 0] = float("nan")  # head 0 of one query of the first window
    bad[139, 32] = float("nan")  # head 0 of the last key of the second
    bad[71, 64 + 16] = float("inf")  # head 1 of one of its values
    with using(backend) as name:
        attention = make_ops(name, CPU_DEVICE).encoder_attention(heads, 70)
        clean, out = attention(qkv, 0.25), attention(bad, 0.25)
    spoilt = torch.zeros(210, 32, dtype=torch.bool)
    spoilt[7, :16] = spoilt[70:140, :16] = spoilt[70:140, 16] = True
    assert not out[spoilt].isfinite().any()
    assert bits_equal(out[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_window_gives_no_rows(backend: str):
    heads = HeadLayout(2, 2, 16, 0)
    with using(backend) as name:
        out = make_ops(name, CPU_DEVICE).encoder_attention(heads, 9)(torch.empty(0, heads.qkv_width), 0.3)
    assert out.shape == (0, heads.query_width)


def test_rows_that_are_no_windows_are_refused():
    heads = HeadLayout(2, 2, 16, 0)
    for name in ("cpu", "reference"):
        attention = make_ops(name, CPU_DEVICE).encoder_attention(heads, 9)
        for shape in ((10, heads.qkv_width), (9, heads.qkv_width + 1)):
            with pytest.raises(KernelError, match=rf"{heads.qkv_width}"):
                attention(torch.zeros(shape), 0.3)
        if name == "cpu":
            program = record(lambda qkv, a=attention: a(qkv, 0.3), {"qkv": Input(Axis.ENCODER, heads.qkv_width)})
            with pytest.raises(KernelError, match="windows of 9 rows, and 10 rows are no multiple"):
                program(qkv=torch.zeros(10, heads.qkv_width))
        with pytest.raises(KernelError, match="no sliding window"):
            make_ops(name, CPU_DEVICE).encoder_attention(HeadLayout(2, 2, 16, 0, window=4), 9)
        with pytest.raises(KernelError, match="whole groups"):
            make_ops(name, CPU_DEVICE).encoder_attention(HeadLayout(3, 2, 16, 0), 9)
        with pytest.raises(KernelError, match="1 position or more, not 0"):
            make_ops(name, CPU_DEVICE).encoder_attention(heads, 0)
