"""4-bit codes: where each lies, how a group's scale is chosen, and what the kernels are given."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_runtime.kernels.slim_linear import reference
from cai_runtime.layers.linear import WeightLoader, kernel_weights
from cai_runtime.slim.int4 import dequantize_int4, fit_groups, pack, quantize_int4, unpack
from cai_runtime.slim.module import ModuleWeights
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import INT4_GROUPS, STORES, ModuleSpec
from cai_runtime.slim.stores import quantize
from cai_runtime.slim.writer import CheckpointWriter

INT4 = [name for name, store in STORES.items() if store.bits == 4]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_even_column_is_the_low_half() -> None:
    codes = torch.tensor([[1, 2, 3], [15, 0, 9]], dtype=torch.uint8)
    data = pack(codes)
    assert data.tolist() == [[0x21, 0x03], [0x0F, 0x09]]
    assert torch.equal(unpack(data, 3), codes)


@settings(deadline=None)
@given(rows=st.integers(0, 5), columns=st.integers(0, 9), seed=st.integers(0, 1000))
def test_packing_there_and_back(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    data = pack(codes)
    assert data.shape == (rows, -(-columns // 2)) and torch.equal(unpack(data, columns), codes)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", INT4_GROUPS)
@pytest.mark.parametrize("columns", [1, 31, 64, 129])
def test_values_by_hand(columns: int, group: int, zeros: bool) -> None:
    data, scale, zero = quantize_int4(random(4, columns) + 0.3, group, zeros)
    values = dequantize_int4(data, scale, zero, columns, group, torch.float64)
    assert (zero is not None) == zeros and scale.dtype == torch.bfloat16
    for row in range(4):
        for column in range(columns):
            code = int(data[row, column // 2]) >> (4 * (column % 2)) & 15
            at = row, column // group
            offset = 8 if zero is None else int(zero[at])
            assert float(values[row, column]) == (code - offset) * float(scale[at])


@pytest.mark.parametrize("store", INT4)
def test_numbers_of_the_grid_come_back_exactly(store: str) -> None:
    """Codes 0 to 15 of a scale that bf16 holds: there is an answer without an error, and it must be found."""
    generator, kind = torch.Generator().manual_seed(1), STORES[store]
    codes = torch.randint(0, 16, (6, 3 * kind.group), generator=generator).double()
    codes.view(6, 3, -1)[..., :2] = torch.tensor([0.0, 15.0])  # every group takes its whole range
    zero = torch.randint(0, 16, (6, 3), generator=generator).double() if kind.zeros else torch.full((6, 3), 8.0)
    scale = torch.tensor([2.0**-3, 3.0, 0.625], dtype=torch.float64).expand(6, 3)
    values = ((codes.view(6, 3, -1) - zero[..., None]) * scale[..., None]).flatten(1)
    assert torch.equal(quantize(values, store).values(torch.float64), values)


@pytest.mark.parametrize("zeros", [False, True])
def test_the_scale_is_the_best_of_a_fine_search(zeros: bool) -> None:
    """Against every scale of a dense range and every zero point: within 3 % of the least squared error."""
    values = random(20, 32, seed=2) + (0.5 if zeros else 0.0)
    scale, zero = fit_groups(values, zeros)

    def errors(scale: torch.Tensor, zero: torch.Tensor | float) -> torch.Tensor:
        zero = torch.as_tensor(zero)
        codes = ((values / scale[:, None]).round() + zero[..., None]).clamp(0, 15)
        return ((codes - zero[..., None]) * scale[:, None] - values).square().sum(1)

    peak = values.abs().amax(1)
    shares = torch.linspace(0.03, 0.2, 300)
    least = torch.stack(
        [errors((peak * share).bfloat16().float(), float(z)) for share in shares for z in (range(16) if zeros else [8])]
    ).amin(0)
    found = errors(scale.float(), zero)
    assert float((found / least).mean()) < 1.03


def test_clipping_beats_the_whole_range_and_weights_say_whose_error_counts() -> None:
    values = random(50, 64, seed=3)
    whole = torch.maximum(-values.amin(1) / 8, values.amax(1) / 7).bfloat16().float()[:, None]
    plain = ((values / whole).round().clamp(-8, 7) * whole - values).square().sum()
    data, scale, _ = quantize_int4(values, 64, False)
    assert float((dequantize_int4(data, scale, None, 64, 64) - values).square().sum()) < 0.95 * float(plain)
    weights = torch.full((64,), 1e-3)
    weights[:8] = 1.0
    errors = []
    for given_weights in (None, weights):
        scale, zero = fit_groups(values, True, given_weights)
        wide = scale.float()[:, None]
        kept = ((values / wide).round() + zero[:, None]).clamp(0, 15) - zero[:, None]
        errors.append(float((kept * wide - values)[:, :8].square().sum()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("store", INT4)
def test_extreme_groups(store: str) -> None:
    """Zeros, denormals, fp32's largest numbers, one sign alone: scales stay positive and finite, values near."""
    largest = torch.finfo(torch.float32).max
    rows = torch.stack(
        [torch.zeros(40), torch.full((40,), -3e-42), torch.linspace(-1, 1, 40) * largest, torch.linspace(5, 6, 40)]
    )
    core = quantize(rows, store)
    assert core.scale is not None and bool((core.scale > 0).all()) and bool(core.scale.isfinite().all())
    error = (core.values(torch.float64) - rows.double()).abs()
    assert bool((error[0] == 0).all()) and bool((error[1] < 1e-38).all())
    assert bool((error[2] <= largest / 6).all()) and bool((error[3] <= 6 / 7).all())


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    """Rounded in chunks of rows: each by itself."""
    matrix = random(700, 520, seed=4)
    data, scale, zero = quantize_int4(matrix, 64, True)
    assert zero is not None
    for row in (0, 350, 454, 455, 699):
        alone = quantize_int4(matrix[row : row + 1], 64, True)
        assert all(
            torch.equal(a[row : row + 1], b) for a, b in zip((data, scale, zero), alone, strict=True) if b is not None
        )


SPECS = {
    "dense": ModuleSpec("dense", 9, 71, None, ("int4-g32",)),
    "low": ModuleSpec("lowrank", 70, 66, 35, ("int4-g64-zp", "int4-g32")),
    "inter": ModuleSpec("interpolative", 66, 130, 33, ("int4-g128", "int4-g32-zp")),
    "mpo": ModuleSpec("mpo", 30, 42, (11, 5), ("int4-g32-zp", "int4-g32", "int8"), (2, 3, 5), (7, 3, 2)),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    with CheckpointWriter(tmp_path / "c", config={"model_type": "llama"}) as writer:
        for k, (name, spec) in enumerate(SPECS.items()):
            cores = [random(*shape, seed=10 * k + i) for i, shape in enumerate(spec.core_shapes)]
            writer.add_module(name, spec, cores, pivot=torch.randperm(66) if spec.has_pivot else None)
        writer.finish()
    return Checkpoint.open(tmp_path / "c")


@pytest.mark.parametrize("name", SPECS)
def test_what_the_kernels_get_is_what_is_stored(checkpoint: Checkpoint, name: str) -> None:
    module: ModuleWeights = checkpoint.module(name)
    weights = kernel_weights(module, dtype=torch.bfloat16, device=torch.device("cpu"))
    for core, stored in zip(weights.cores, module.cores, strict=True):
        assert core.is_int4 == stored.store.startswith("int4") and core.group == STORES[stored.store].group
        if core.is_int4:  # a view of the file, not a copy
            assert core.data.data_ptr() == stored.data.data_ptr() and core.scale is stored.scale
            assert core.zero is stored.zero
    x = random(5, module.spec.in_features, seed=9).double()
    torch.testing.assert_close(reference(x, weights), x @ module.dense(torch.float64).mT, rtol=1e-10, atol=1e-10)
    assert weights.nbytes == module.spec.nbytes
    assert weights.parameters == module.spec.parameters == sum(math.prod(s) for s in module.spec.core_shapes)


@pytest.mark.parametrize("name", SPECS)
def test_the_cpu_kernels_run_a_stored_module(checkpoint: Checkpoint, name: str) -> None:
    loader = WeightLoader(checkpoint, torch.device("cpu"), None, "cpu")
    spec = SPECS[name]
    x = random(7, spec.in_features)
    expected = x.double() @ checkpoint.module(name).dense(torch.float64).mT
    y = loader.linear([name], [(spec.out_features, spec.in_features)])(x)
    # Codes are summed before their zero points are taken off: what is lost is a share of the largest outputs.
    assert float((y.double() - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", SPECS)
def test_the_loader_owns_what_it_hands_out(checkpoint: Checkpoint, name: str) -> None:
    loader = WeightLoader(checkpoint, torch.device("cpu"), None, "reference")
    spec = SPECS[name]
    weights = loader.weights(name, (spec.out_features, spec.in_features))
    stored = checkpoint.module(name)
    for core, original in zip(weights.cores, stored.cores, strict=True):
        assert core.data.data_ptr() != original.data.data_ptr()
        assert (core.zero is None) == (original.zero is None)
    x = random(3, spec.in_features)
    expected = x.double() @ stored.dense(torch.float64).mT
    torch.testing.assert_close(
        loader.linear([name], [(spec.out_features, spec.in_features)])(x).double(), expected, rtol=1e-3, atol=1e-3
    )
