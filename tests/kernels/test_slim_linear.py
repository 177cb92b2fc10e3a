"""Slim linear: the CPU kernels against the float64 reference, on shapes that fit nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.prepare import prepare
from cai_runtime.kernels.slim_linear import reference
from cai_runtime.kernels.weights import Core, LinearWeights

STORES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def random_core(rows: int, cols: int, dtype: torch.dtype, g: torch.Generator) -> Core:
    w = torch.randn(rows, cols, generator=g) / max(cols, 1) ** 0.5
    if dtype != torch.int8:
        return Core(w.to(dtype))
    scale = torch.full((rows,), 1e-3) if cols == 0 else w.abs().amax(1).clamp_min(1e-6) / 127
    return Core((w / scale[:, None]).round().to(torch.int8), scale)


def random_linear(kind: str, inp: int, out: int, rank: int, dtype: torch.dtype, bias: bool, g: torch.Generator):
    b = torch.randn(out, generator=g) if bias else None
    if kind == "dense":
        return LinearWeights("dense", inp, out, (random_core(out, inp, dtype, g),), bias=b)
    rank = min(rank, out)
    first = random_core(rank, inp, dtype, g)
    if kind == "lowrank":
        return LinearWeights("lowrank", inp, out, (first, random_core(out, rank, dtype, g)), rank, bias=b)
    pivot = torch.randperm(out, generator=g).to(torch.int32)
    second = random_core(out - rank, rank, dtype, g)
    return LinearWeights("interpolative", inp, out, (first, second), rank, pivot, b)


def random_mpo(dtype: torch.dtype, g: torch.Generator) -> LinearWeights:
    outs, ins, bonds = (3, 4, 2), (2, 5, 3), (1, 6, 5, 1)
    cores = tuple(
        random_core(o * r, lft * i, dtype, g) for o, i, lft, r in zip(outs, ins, bonds[:-1], bonds[1:], strict=True)
    )
    return LinearWeights("mpo", 30, 24, cores, out_dims=outs, in_dims=ins, bonds=bonds)


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("isa", cpu_library.instruction_sets())
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_group_matches_float64(isa: str, data: st.DataObject):
    best = cpu_library.instruction_set()
    cpu_library.use_instruction_set(isa)
    try:
        g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        inp = data.draw(st.integers(1, 200))
        rows = data.draw(st.sampled_from([0, 1, 2, 3, 5, 7, 33, 130]))
        members = [
            random_linear(
                data.draw(st.sampled_from(["dense", "lowrank", "interpolative"])),
                inp,
                data.draw(st.integers(1, 150)),
                data.draw(st.integers(1, 90)),
                data.draw(st.sampled_from(STORES)),
                data.draw(st.booleans()),
                g,
            )
            for _ in range(data.draw(st.integers(1, 4)))
        ]
        x = torch.randn(rows, inp * 2, generator=g)[:, :inp]
        x = x if data.draw(st.booleans()) else x.contiguous()
        outs = sum(w.out_features for w in members)
        residual = torch.randn(rows, outs, generator=g) if data.draw(st.booleans()) else None
        y = prepare(members, backend="cpu")(x, residual)
        expected = torch.cat([reference(x.double(), w) for w in members], dim=1)
        if residual is not None:
            expected = expected + residual.double()
        assert y.shape == expected.shape
        if rows:
            # fp32 accumulation of exactly converted weights. An
            # output that cancels to nothing must not count more than what went into it.
            assert float((y.double() - expected).norm()) < 2e-6 * float(expected.norm() + x.double().norm())
    finally:
        cpu_library.use_instruction_set(best)


@pytest.mark.parametrize("isa", cpu_library.instruction_sets())
@pytest.mark.parametrize("dtype", STORES)
@pytest.mark.parametrize("kind", ["dense", "lowrank", "interpolative"])
def test_a_row_is_the_same_bits_whatever_the_batch(kind: str, dtype: torch.dtype, isa: str):
    best = cpu_library.instruction_set()
    cpu_library.use_instruction_set(isa)
    try:
        g = torch.Generator().manual_seed(7)
        linear = prepare([random_linear(kind, 321, 187, 77, dtype, True, g)], backend="cpu")
        x = torch.randn(260, 321, generator=g)
        together = linear(x)
        for rows in (1, 2, 3, 4, 5, 6, 7, 13, 97):
            start = int(torch.randint(0, 260 - rows, (1,), generator=g))
            assert torch.equal(linear(x[start : start + rows]), together[start : start + rows])
    finally:
        cpu_library.use_instruction_set(best)


@pytest.mark.parametrize("isa", cpu_library.instruction_sets())
@pytest.mark.parametrize("dtype", STORES)
def test_many_rows_of_many_columns_have_the_bits_of_one(dtype: torch.dtype, isa: str):
    """Many rows take panels of weights, chunks of rows and spans of columns."""
    best = cpu_library.instruction_set()
    cpu_library.use_instruction_set(isa)
    try:
        g = torch.Generator().manual_seed(8)
        weights = random_linear("lowrank", 2100, 149, 133, dtype, True, g)
        x, residual = torch.randn(211, 2100, generator=g), torch.randn(211, 149, generator=g)
        for int8_activations in (False, True):
            linear = prepare([weights], backend="cpu", int8_activations=int8_activations)
            together = linear(x, residual)
            for row in (0, 5, 95, 96, 97, 204, 209, 210):
                assert torch.equal(linear(x[row : row + 1], residual[row : row + 1]), together[row : row + 1])
    finally:
        cpu_library.use_instruction_set(best)


def test_int8_activations_have_the_same_bits_on_every_instruction_set_with_a_fused_multiply_add():
    g = torch.Generator().manual_seed(9)
    weights = random_linear("interpolative", 300, 149, 40, torch.int8, True, g)
    linear = prepare([weights], backend="cpu", int8_activations=True)
    x = torch.randn(50, 300, generator=g) * torch.rand(50, 300, generator=g).pow(8)
    best, results = cpu_library.instruction_set(), []
    try:
        for isa in cpu_library.instruction_sets():
            if isa != "generic":
                cpu_library.use_instruction_set(isa)
                results.append(linear(x))
    finally:
        cpu_library.use_instruction_set(best)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("rows", [1, 39, 400])  # stored at their places at once, or row by row after the product
def test_interpolative_results_are_at_their_features(rows: int):
    g = torch.Generator().manual_seed(2)
    for rank in (7, 48, 149):  # 149: no second core's rows
        weights = random_linear("interpolative", 64, 149, rank, torch.int8, True, g)
        x, residual = torch.randn(rows, 64, generator=g), torch.randn(rows, 149, generator=g)
        y = prepare([weights], backend="cpu", int8_activations=True)(x, residual)
        # A code next to a half may be another one after fp32's roundings in the first core.
        assert relative_error(y, reference(x.double(), weights, residual.double(), int8_activations=True)) < 3e-3


def test_one_wide_row_with_int8_activations_has_room_for_its_codes():
    """Above 8,192 columns the codes lie in the scratch memory, which was too small where the row had no prologue."""
    g = torch.Generator().manual_seed(4)
    weights = random_linear("dense", 9000, 8, 0, torch.int8, False, g)
    linear = prepare([weights], backend="cpu", int8_activations=True)
    x = torch.randn(2, 9000, generator=g)
    assert torch.equal(linear(x[:1]), linear(x)[:1])
    assert relative_error(linear(x[:1]), reference(x[:1].double(), weights, int8_activations=True)) < 2e-6


def test_threads_do_not_change_the_bits():
    g = torch.Generator().manual_seed(3)
    linear = prepare([random_linear("interpolative", 576, 1536, 400, torch.int8, False, g)], backend="cpu")
    x = torch.randn(9, 576, generator=g)
    before = cpu_library.num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            cpu_library.set_num_threads(n)
            results.append(linear(x))
    finally:
        cpu_library.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", STORES)
def test_mpo_matches_the_explicit_matrix(dtype: torch.dtype):
    g = torch.Generator().manual_seed(11)
    w = random_mpo(dtype, g)
    a, b, c = (
        core.values(torch.float64).reshape(o, r, lft, i)
        for core, o, i, lft, r in zip(w.cores, w.out_dims, w.in_dims, w.bonds[:-1], w.bonds[1:], strict=True)
    )
    matrix = torch.einsum("oxli,pyxj,qzyk->opqijk", a, b, c).reshape(24, 30)
    x = torch.randn(5, 30, generator=g)
    expected = x.double() @ matrix.T
    assert relative_error(reference(x.double(), w), expected) < 1e-12
    assert relative_error(prepare([w], backend="cpu")(x), expected) < 2e-6


def test_bad_arguments_are_named():
    g = torch.Generator().manual_seed(1)
    w = random_linear("dense", 8, 4, 0, torch.float32, False, g)
    linear = prepare([w], backend="cpu")
    with pytest.raises(KernelError, match=r"\[rows, 8\]"):
        linear(torch.randn(3, 9))
    with pytest.raises(KernelError, match="fp32 activations"):
        linear(torch.randn(3, 8, dtype=torch.bfloat16))
    with pytest.raises(KernelError, match="residual"):
        linear(torch.randn(3, 8), torch.randn(2, 4))
    with pytest.raises(KernelError, match="share"):
        prepare([w, random_linear("dense", 9, 4, 0, torch.float32, False, g)], backend="cpu")
    with pytest.raises(KernelError, match="not one of"):
        prepare([w], backend="fast")
    pivoted = random_linear("interpolative", 8, 4, 2, torch.float32, False, g)
    with pytest.raises(KernelError, match="permutation"):
        prepare([replace(pivoted, pivot=torch.tensor([0, 1, 2, 4], dtype=torch.int32))], backend="cpu")
    with pytest.raises(KernelError, match="cores"):
        LinearWeights("lowrank", 8, 4, (w.cores[0],), 2)
