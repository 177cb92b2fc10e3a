"""RMSNorm, RMSNorm after a residual add, SwiGLU and the embedding on rows of every layout: within a derived bound of
float64 (helpers/error_bounds.py); and, on the CPU kernels, the same bits in any batch (torch promises the reference no such
thing)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from error_bounds import Bounded, check, gated, normed
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import BACKENDS, CPU, ROWS, STORES, bits_equal, bounded, random_core, sizes, tensors, using

from cai_runtime.errors import KernelError
from cai_runtime.kernels.activation import swiglu_cpu, swiglu_reference
from cai_runtime.kernels.embedding import CpuEmbedding, embedding_reference
from cai_runtime.kernels.norm import RmsNorm, add_rms_norm_cpu, add_rms_norm_reference, rms_norm_cpu, rms_norm_reference
from cai_runtime.kernels.slim_linear import CpuLinear, as_dense

OPERATIONS = {
    "cpu": (rms_norm_cpu, add_rms_norm_cpu, swiglu_cpu),
    "reference": (rms_norm_reference, add_rms_norm_reference, swiglu_reference),
}
DTYPES = {"reference": [torch.float32, torch.bfloat16, torch.float16]}  # others: fp32
WIDTHS = sizes(200) | st.sampled_from([576, 1000, 4099])


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@bounded(60)
def test_norms_and_swiglu_are_within_the_bound(backend: str, data: st.DataObject):
    dtype = data.draw(st.sampled_from(DTYPES.get(backend, [torch.float32])))
    rows, width = data.draw(st.sampled_from(ROWS)), data.draw(WIDTHS)
    norm = RmsNorm(data.draw(tensors(1, width, dtype))[0], data.draw(st.sampled_from([1e-6, 1e-5, 0.1])))
    x, residual = data.draw(tensors(rows, width, dtype)), data.draw(tensors(rows, width, dtype))
    gate_up = data.draw(tensors(rows, 2 * width, dtype)) * data.draw(st.sampled_from([0.1, 1.0, 50.0]))
    with using(backend) as name:
        rms_norm, add_rms_norm, swiglu = OPERATIONS[name]
        check(rms_norm(x, norm.weight, norm.eps), lambda growth: normed(x, norm, dtype, growth))
        y, total = add_rms_norm(x, residual, norm.weight, norm.eps)
        assert bits_equal(total, x + residual)
        check(y, lambda growth: normed(total, norm, dtype, growth))
        check(swiglu(gate_up), lambda growth: gated(gate_up, dtype))


@pytest.mark.parametrize("backend", CPU)
@given(data=st.data())
@bounded(40)
def test_a_row_has_the_same_bits_in_any_batch(backend: str, data: st.DataObject):
    rows, width = data.draw(st.sampled_from([2, 9, 33, 300])), data.draw(WIDTHS)
    weight = data.draw(tensors(1, width, layouts=["contiguous"]))[0]
    x, residual = data.draw(tensors(rows, width)), data.draw(tensors(rows, width))
    gate_up = data.draw(tensors(rows, 2 * width))
    row = data.draw(st.integers(0, rows - 1))
    order = torch.tensor(data.draw(st.permutations(range(rows)))) if rows < 40 else torch.arange(rows).flip(0)
    with using(backend) as name:
        rms_norm, add_rms_norm, swiglu = OPERATIONS[name]
        calls: list[Callable[[torch.Tensor | slice], torch.Tensor]] = [
            lambda i: rms_norm(x[i], weight, 1e-5),
            lambda i: torch.cat(add_rms_norm(x[i], residual[i], weight, 1e-5), dim=1),
            lambda i: swiglu(gate_up[i]),
        ]
        for call in calls:
            together = call(slice(None))
            assert bits_equal(call(slice(row, row + 1)), together[row : row + 1])
            assert bits_equal(call(order), together[order])
            assert bits_equal(torch.cat([call(slice(0, row)), call(slice(row, rows))]), together)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 100])
def test_4097_rows(width: int, backend: str):
    g = torch.Generator().manual_seed(width)
    x, gate_up = torch.randn(4097, width, generator=g), torch.randn(4097, 2 * width, generator=g)
    norm = RmsNorm(torch.randn(width, generator=g), 1e-5)
    with using(backend) as name:
        rms_norm, _, swiglu = OPERATIONS[name]
        check(rms_norm(x, norm.weight, norm.eps), lambda growth: normed(x, norm, x.dtype, growth))
        check(swiglu(gate_up), lambda growth: gated(gate_up, x.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_in_their_row(backend: str):
    g = torch.Generator().manual_seed(8)
    x, weight = torch.randn(9, 66, generator=g), torch.randn(33, generator=g)
    bad = x.clone()
    bad[2, 32], bad[5, 0], bad[7, 40] = float("nan"), float("inf"), -float("inf")
    clean = [0, 1, 3, 4, 6, 8]
    with using(backend) as name:
        rms_norm, add_rms_norm, swiglu = OPERATIONS[name]
        y = rms_norm(bad[:, :33], weight, 1e-5)
        assert bits_equal(y[clean], rms_norm(x[:, :33], weight, 1e-5)[clean])
        assert y[2].isnan().all() and y[5, 0].isnan() and not y[5, 1:].any()
        y, total = add_rms_norm(bad[:, :33], x[:, 33:], weight, 1e-5)
        assert bits_equal(y[clean], add_rms_norm(x[:, :33], x[:, 33:], weight, 1e-5)[0][clean])
        assert y[2].isnan().all() and bits_equal(total, bad[:, :33] + x[:, 33:])
        y = swiglu(bad)
        assert bits_equal(y[clean], swiglu(x)[clean])
        assert y[2, 32].isnan() and y[2, :32].isfinite().all()
        assert y[5, 0].isinf() and y[5, 1:].isfinite().all()
        assert y[7, 7].isinf() and y[7, :7].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_denormal_and_huge_rows(backend: str):
    g = torch.Generator().manual_seed(4)
    norm = RmsNorm(torch.randn(77, generator=g), 1e-6)
    with using(backend) as name:
        rms_norm, _, swiglu = OPERATIONS[name]
        for size in (0.0, 1e-40, 1e-20, 1e17):  # the square of 1e20 is no fp32 number
            x = torch.randn(5, 77, generator=g) * size
            check(rms_norm(x, norm.weight, norm.eps), lambda growth, x=x: normed(x, norm, x.dtype, growth))
        assert not rms_norm(torch.full((2, 77), 1e30), norm.weight, norm.eps).any()  # 1 / infinity
        for size in (0.0, 1e-40, 1e-30, 1e3, 1e15):
            x = torch.cat([torch.randn(5, 77, generator=g).abs() * size, torch.randn(5, 77, generator=g)], dim=1)
            check(swiglu(x), lambda growth, x=x: gated(x, x.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_very_negative_gate_is_closed(backend: str):
    gates = torch.tensor([[-90.0], [-104.0], [-1000.0], [-1e10], [-1e30], [-3.4e38]])
    with using(backend) as name:
        y = OPERATIONS[name][2](torch.cat([gates, torch.full_like(gates, 3.0)], dim=1))
    assert (y.abs() < 1e-33).all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@bounded(40)
def test_an_embedding_looks_up_the_stored_rows(backend: str, data: st.DataObject):
    tokens, hidden = data.draw(st.integers(1, 70)), data.draw(sizes(200))
    store = data.draw(st.sampled_from(STORES))
    table = random_core(tokens, hidden, store, torch.Generator().manual_seed(data.draw(st.integers(0, 2**31))))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, tokens - 1), max_size=20)), dtype=torch.int32)
    with using(backend) as name:
        if name == "cpu":
            lookup = CpuEmbedding(CpuLinear([as_dense(table)]))
            y = lookup(ids)
            for bad in (-1, tokens):
                with pytest.raises(KernelError, match=str(bad)):
                    lookup(torch.tensor([0, bad], dtype=torch.int32))
        else:
            y = embedding_reference(table, ids, torch.float32)
    # One product of two numbers: rounded once, and exact without a scale.
    values = table.values(torch.float64)[ids.long()]
    check(y, lambda growth: Bounded.exact(values) if table.scale is None else Bounded.exact(values).rounded(y.dtype))


def test_what_the_cpu_kernels_would_misread_is_refused():
    x, weight = torch.randn(3, 20), torch.randn(20)
    for bad in (weight.double(), weight.bfloat16(), weight[:19], weight[None]):
        with pytest.raises(KernelError):
            rms_norm_cpu(x, bad, 1e-5)
        with pytest.raises(KernelError):
            add_rms_norm_cpu(x, x, bad, 1e-5)
        with pytest.raises(KernelError):
            CpuLinear([as_dense(random_core(4, 20, "fp32", torch.Generator()))])(x, norm=RmsNorm(bad, 1e-5))
    for residual in (x[:2], x[:, :19], x.double()):
        with pytest.raises(KernelError, match="residual"):
            add_rms_norm_cpu(x, residual, weight, 1e-5)
    for gate_up in (torch.randn(3, 7), torch.randn(3, 8).half()):
        with pytest.raises(KernelError, match="swiglu"):
            swiglu_cpu(gate_up)
