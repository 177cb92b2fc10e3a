"""Packing one core: error bounds per store, rows of the scale, and what can't be stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_runtime.errors import (
    InvalidConfigError,
    NonFiniteTensorError,
    TensorDtypeError,
    TensorShapeError,
    UnknownStoreError,
)
from cai_runtime.slim.spec import STORES, matrix_shape
from cai_runtime.slim.stores import CoreData, all_finite, as_matrix, from_matrix, quantize

SIDE = st.integers(1, 9)
SHAPES = st.one_of(st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE, SIDE, SIDE))


def random_core(shape: tuple[int, ...], magnitude: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Rows of very different size, as real layers have.
    row_size = 10.0 ** torch.empty(shape[0], *[1] * (len(shape) - 1)).uniform_(-3, 3, generator=generator)
    return torch.randn(shape, generator=generator) * row_size * 10.0**magnitude


@settings(deadline=None, max_examples=60)
@given(shape=SHAPES, store=st.sampled_from(sorted(STORES)), magnitude=st.integers(-4, 0), seed=st.integers(0, 2**31))
def test_error_bound_of_every_store(shape: tuple[int, ...], store: str, magnitude: int, seed: int) -> None:
    core = random_core(shape, magnitude, seed)
    found = quantize(core, store)
    data, scale = found.data, found.scale
    assert found.shape == core.shape and all(tensor.is_contiguous() for tensor in found.tensors.values())
    assert found.values().shape == core.shape
    error = (found.values(torch.float64) - core.double()).abs()
    if store == "fp32":
        assert torch.equal(data, core)
    elif store == "bf16":  # 8 bits of significand
        assert bool((error <= core.abs() * 2.0**-8).all())
    elif store == "fp16":  # 11 bits, and denormals in steps of 2^-24
        assert bool((error <= core.abs() * 2.0**-11 + 2.0**-25).all())
    elif store.startswith("int4"):  # the least squared error of several: not more than without any clipping
        rows, group = as_matrix(core.double()), STORES[store].group
        for start in range(0, rows.shape[1], group):
            part = rows[:, start : start + group]
            low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
            step = (high - low) / 15 if store.endswith("-zp") else torch.maximum(high / 7, -low / 8)
            # Half a step for every value; zero points and bf16 scales cost a little more at the ends.
            bound = part.shape[1] * (step * 0.5 * 1.2) ** 2
            assert bool((as_matrix(error)[:, start : start + group].square().sum(1) <= bound + 1e-60).all())
    else:
        assert scale is not None and scale.shape == (matrix_shape(shape)[0],)
        assert int(data.min()) >= -127
        rows = as_matrix(core.double())
        assert bool((as_matrix(error) <= scale.double()[:, None] * 0.5 * (1 + 1e-5)).all())
        # The scale is as small as it can be: the largest value of every row takes the largest code.
        assert torch.allclose(scale.double() * 127, rows.abs().amax(1), rtol=1e-6)


def test_int8_rows_of_an_mpo_core_are_output_and_right_bond() -> None:
    core = torch.zeros(2, 3, 4, 5)
    core[:, 1, :, 2] = 12.7  # one row of the matrix, all its columns
    found = quantize(core, "int8")
    data, scale = found.data, found.scale
    assert scale is not None
    assert torch.nonzero(scale > 1e-6).flatten().tolist() == [1 * 5 + 2]
    assert torch.equal(data[:, 1, :, 2], torch.full((2, 4), 127, dtype=torch.int8))
    numbers = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    matrix = as_matrix(numbers)
    assert torch.equal(from_matrix(matrix, (2, 3, 4, 5)), numbers)
    for left, out, inp, right in [(0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 3)]:
        assert matrix[out * 5 + right, left * 4 + inp] == ((left * 3 + out) * 4 + inp) * 5 + right


def test_rows_of_zeros_and_denormals_keep_the_bound() -> None:
    core = torch.tensor([[0.0, 0.0], [1e-44, -3e-42], [1.0, -2.0]])
    found = quantize(core, "int8")
    assert found.scale is not None and bool((found.scale > 0).all())
    error = (found.values(torch.float64) - core.double()).abs()
    assert bool((error <= found.scale.double()[:, None] / 2).all())
    assert bool((found.data[0] == 0).all())


@pytest.mark.parametrize("store", sorted(STORES))
@pytest.mark.parametrize("shape", [(0, 3), (0, 2, 0, 3)])
def test_empty_core(store: str, shape: tuple[int, ...]) -> None:
    found = quantize(torch.empty(shape), store)
    found.check_layout()
    assert found.shape == shape and found.values().shape == shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("store", sorted(STORES))
def test_non_finite_values_are_refused(store: str, bad: float) -> None:
    core = torch.ones(3, 3)
    core[2, 1] = bad
    with pytest.raises(NonFiniteTensorError):
        quantize(core, store)


def test_values_out_of_the_store_s_range_are_refused() -> None:
    with pytest.raises(NonFiniteTensorError, match="fp16"):
        quantize(torch.full((2, 2), 1e5), "fp16")
    with pytest.raises(NonFiniteTensorError, match="bf16"):
        quantize(torch.full((2, 2), torch.finfo(torch.float32).max), "bf16")


def test_unknown_store_and_wrong_shape() -> None:
    with pytest.raises(UnknownStoreError, match="int3"):
        quantize(torch.ones(2, 2), "int3")
    with pytest.raises(InvalidConfigError):
        quantize(torch.ones(2, 2, 2), "int8")
    with pytest.raises(TensorDtypeError):
        CoreData(torch.ones(2, 2), torch.ones(2), "int8").values()
    with pytest.raises(TensorShapeError):
        CoreData(torch.ones(2, 2, dtype=torch.int8), None, "int8").values()
    with pytest.raises(TensorShapeError, match="no scale"):
        CoreData(torch.ones(2, 2), torch.ones(2), "fp32").values()
    with pytest.raises(InvalidConfigError, match="shape"):
        CoreData(torch.ones(2, 2, dtype=torch.uint8), torch.ones(2, 1).bfloat16(), "int4-g32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("place", [0, 131_071, 131_072, 299_999])
def test_finite_check_finds_any_place(dtype: torch.dtype, place: int) -> None:
    tensor = torch.linspace(-2, 2, 300_000).to(dtype)
    assert all_finite(tensor)
    bad = [float("nan")] if dtype is torch.float8_e4m3fn else [float("nan"), float("inf"), float("-inf")]
    for value in bad:
        broken = tensor.clone()
        broken[place] = value
        assert not all_finite(broken)
