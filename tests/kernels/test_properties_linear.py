"""Slim linears through the public API, whatever the kinds, stores, shapes and strides: against float64, within a bound that
follows from the number of roundings (helpers/error_bounds.py), and bit for bit against themselves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from error_bounds import Bounded, Growth, check, gated, linear, normed
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    CPU,
    INT4,
    ROWS,
    STORES,
    bits_equal,
    bounded,
    dense_matrix,
    groups,
    linears,
    random_core,
    random_linear,
    tensors,
    threads,
    using,
)

from cai_runtime.kernels.norm import RmsNorm
from cai_runtime.kernels.prepare import prepare, slim_linear
from cai_runtime.kernels.slim_linear import PreparedLinear, as_dense, reference
from cai_runtime.kernels.weights import LinearWeights

ACTIVATIONS = {"reference": [torch.float32, torch.bfloat16, torch.float16]}  # others: fp32


def expected(
    x: torch.Tensor,
    members: Sequence[LinearWeights],
    residual: torch.Tensor | None,
    prologue: RmsNorm | str | None,
    growth: Growth,
    *,
    int8_activations: bool = False,
) -> Bounded:
    """What the group's output may be, in x's dtype."""
    if isinstance(prologue, RmsNorm):
        inner = normed(x, prologue, x.dtype, growth)
    else:
        inner = gated(x, x.dtype) if prologue == "swiglu" else Bounded.exact(x)
    parts = [linear(inner, w, x.dtype, int8_activations=int8_activations, growth=growth) for w in members]
    y = Bounded(torch.cat([p.value for p in parts], dim=1), torch.cat([p.error for p in parts], dim=1))
    return y if residual is None else y.plus(residual, x.dtype)


def call(
    group: PreparedLinear, x: torch.Tensor, residual: torch.Tensor | None, prologue: RmsNorm | str | None
) -> torch.Tensor:
    if isinstance(prologue, RmsNorm):
        return group(x, residual, norm=prologue)
    return group(x, residual, swiglu=prologue == "swiglu")


@st.composite
def prologues(draw: st.DrawFn, inp: int, dtype: torch.dtype = torch.float32) -> RmsNorm | str | None:
    match draw(st.sampled_from(["none", "none", "norm", "swiglu"])):
        case "norm":
            weight = draw(tensors(1, inp, dtype, ["contiguous"]))[0]
            return RmsNorm(weight, draw(st.sampled_from([1e-6, 1e-5, 0.1])))
        case "swiglu":
            return "swiglu"
    return None


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@bounded(60)
def test_a_group_is_within_the_bound(backend: str, data: st.DataObject):
    dtype = data.draw(st.sampled_from(ACTIVATIONS.get(backend, [torch.float32])))
    members = [c.build() for c in data.draw(groups())]
    inp, out = members[0].in_features, sum(w.out_features for w in members)
    rows = data.draw(st.sampled_from(ROWS))
    prologue = data.draw(prologues(inp, dtype))
    x = data.draw(tensors(rows, 2 * inp if prologue == "swiglu" else inp, dtype))
    residual = data.draw(st.none() | tensors(rows, out, dtype))
    with using(backend) as name:
        y = call(prepare(members, backend=name), x, residual, prologue)
    assert y.dtype == dtype
    check(y, lambda growth: expected(x, members, residual, prologue, growth))


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@bounded(40)
def test_int8_activations_are_within_the_bound(backend: str, data: st.DataObject):
    dtype = data.draw(st.sampled_from(ACTIVATIONS.get(backend, [torch.float32])))
    members = [c.build() for c in data.draw(groups(["int8", "int8", *STORES]))]
    rows = data.draw(st.sampled_from(ROWS))
    inp = members[0].in_features
    prologue = data.draw(prologues(inp, dtype))
    x = data.draw(tensors(rows, 2 * inp if prologue == "swiglu" else inp, dtype))
    residual = data.draw(st.none() | tensors(rows, sum(w.out_features for w in members), dtype))
    with using(backend) as name:
        y = call(prepare(members, backend=name, int8_activations=True), x, residual, prologue)
    # Not sharp: where a code may tip to its neighbour is known only for the worst case.
    check(y, lambda growth: expected(x, members, residual, prologue, growth, int8_activations=True), sharp=False)


@given(data=st.data())
@bounded(60)
def test_the_reference_is_the_matrix_of_the_definition(data: st.DataObject):
    w = data.draw(linears(data.draw(st.integers(1, 120)))).build()
    x = data.draw(tensors(data.draw(st.sampled_from([0, 1, 9])), w.in_features)).double()
    y = x @ dense_matrix(w).T + (0 if w.bias is None else w.bias.double())
    torch.testing.assert_close(reference(x, w), y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", CPU)
@given(data=st.data())
@bounded(40)
def test_a_row_has_the_same_bits_in_any_batch(backend: str, data: st.DataObject):
    int8_activations = data.draw(st.booleans())
    members = [c.build() for c in data.draw(groups())]
    inp, out = members[0].in_features, sum(w.out_features for w in members)
    rows = data.draw(st.sampled_from([2, 9, 33, 150]))
    prologue = data.draw(prologues(inp))
    x = data.draw(tensors(rows, 2 * inp if prologue == "swiglu" else inp, layouts=["contiguous"]))
    residual = data.draw(st.none() | tensors(rows, out, layouts=["contiguous"]))

    with using(backend) as name:
        group = prepare(members, backend=name, int8_activations=int8_activations)

        def run(index: torch.Tensor | slice) -> torch.Tensor:
            return call(group, x[index], None if residual is None else residual[index], prologue)

        together = run(slice(None))
        row = data.draw(st.integers(0, rows - 1))
        assert bits_equal(run(slice(row, row + 1)), together[row : row + 1])
        order = torch.tensor(data.draw(st.permutations(range(rows)))) if rows < 40 else torch.arange(rows).flip(0)
        assert bits_equal(run(order), together[order])
        cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=4))})
        pieces = [run(slice(a, b)) for a, b in pairwise(cuts)]
        assert bits_equal(torch.cat(pieces), together)
        with threads(data.draw(st.integers(1, 4))):
            assert bits_equal(run(slice(None)), together)


@pytest.mark.parametrize("backend", CPU)
@given(data=st.data())
@bounded(25)
def test_strides_and_neighbours_do_not_change_the_bits(backend: str, data: st.DataObject):
    members = [c.build() for c in data.draw(groups())]
    inp, out = members[0].in_features, sum(w.out_features for w in members)
    rows = data.draw(st.sampled_from([1, 3, 17, 64]))
    x, residual = data.draw(tensors(rows, inp)), data.draw(tensors(rows, out))
    with using(backend) as name:
        whole = prepare(members, backend=name)(x.contiguous(), residual.contiguous())
        assert bits_equal(prepare(members, backend=name)(x, residual), whole)
        alone = [slim_linear(x, w, backend=name) for w in members]
        assert bits_equal(prepare(members, backend=name)(x), torch.cat(alone, dim=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("store", ["fp32", "bf16", "fp16", "int8", INT4[0], INT4[-1]])
@pytest.mark.parametrize("kind", ["dense", "lowrank", "interpolative", "mpo"])
def test_4097_rows(kind: str, store: str, backend: str):
    g = torch.Generator().manual_seed(4097)
    w = random_linear(kind, 45, 21, 11, [store], True, g)
    x, residual = torch.randn(4097, 45, generator=g), torch.randn(4097, 21, generator=g)
    with using(backend) as name:
        group = prepare([w], backend=name)
        y = group(x, residual)
        check(y, lambda growth: expected(x, [w], residual, None, growth))
        if name == "cpu":
            for row in (0, 1, 2047, 4095, 4096):
                assert bits_equal(group(x[row : row + 1], residual[row : row + 1]), y[row : row + 1])


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("kind", ["dense", "lowrank", "interpolative", "mpo"])
def test_nan_and_infinity_stay_in_their_row(kind: str, backend: str):
    for store in STORES:
        g = torch.Generator().manual_seed(3)
        w = random_linear(kind, 75, 38, 19, [store], True, g)
        x = torch.randn(40, 75, generator=g)
        bad = x.clone()
        bad[3, 5] = float("nan")
        bad[11, 74] = float("inf")
        bad[38, 0] = -float("inf")
        bad[39] = float("nan")
        clean = [i for i in range(40) if i not in (3, 11, 38, 39)]
        with using(backend) as name:
            group = prepare([w], backend=name)
            y = group(bad)
            assert bits_equal(y[clean], group(x)[clean])
        assert y[3].isnan().all() or kind == "mpo"  # whose zero weights need not touch every output
        assert y[39].isnan().all()
        assert not y[[11, 38]].isfinite().any() or store != "fp32"  # quantized weights may be exactly 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dense", "lowrank", "interpolative", "mpo"])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-38, 1e-30, 1e30])
def test_zeros_denormal_and_huge_values(size: float, kind: str, backend: str):
    for store in STORES:
        g = torch.Generator().manual_seed(9)
        w = random_linear(kind, 75, 38, 19, [store], False, g)
        x = torch.randn(21, 75, generator=g) * size
        x[::2] *= torch.randn(75, generator=g).sign()  # and a mix of -0
        with using(backend) as name:
            y = prepare([w], backend=name)(x)
        check(y, lambda growth, x=x, w=w: expected(x, [w], None, None, growth), sharp=False)
        if size == 0.0:
            assert not y.any()


@pytest.mark.parametrize("backend", CPU)
def test_rows_that_cancel(backend: str):
    """Terms of 1e8 that cancel to about 1: the bound follows the terms, the result is not garbage beyond it."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(5, 50, generator=g) * 1e8
    x = torch.cat([x, -x, torch.randn(5, 3, generator=g)], dim=1)
    core = random_core(20, 50, "fp32", g)
    tail = random_core(20, 3, "fp32", g)
    w = as_dense(type(core)(torch.cat([core.data, core.data, tail.data], dim=1)))
    with using(backend) as name:
        check(prepare([w], backend=name)(x), lambda growth: expected(x, [w], None, None, growth))


def test_the_bounds_notice_a_lost_column():
    """Of 200 columns the weakest one left out, or one element of the result off by a thousandth: out of bounds."""
    g = torch.Generator().manual_seed(6)
    w = as_dense(random_core(65, 200, "fp32", g))
    x = torch.randn(4, 200, generator=g)
    y = reference(x.double(), w).float()
    check(y, lambda growth: expected(x, [w], None, None, growth))
    short = x.clone()
    short[:, x.abs().amax(0).argmin()] = 0
    with pytest.raises(AssertionError, match="out of bounds"):
        check(reference(short, w), lambda growth: expected(x, [w], None, None, growth))
    y[2, 64] *= 1.001
    with pytest.raises(AssertionError, match=r"1 of 260 elements .* at \(2, 64\)"):
        check(y, lambda growth: expected(x, [w], None, None, growth))
