"""Rounding and refitting, against brute force and against plain rounding."""

import pytest
import torch

from cai_runtime.compressor.factor.cores import StoredModule, dense_module, factorized_module, refit, refit_first
from cai_runtime.compressor.factor.decompose import damped, factorize
from cai_runtime.compressor.factor.rounding import round_with_feedback, rounding_ridge
from cai_runtime.slim.spec import STORES
from cai_runtime.slim.stores import quantize

INT4 = [name for name, store in STORES.items() if store.bits == 4]


def problem(out, inp, seed=0):
    """A weight, and the Gram matrix of strongly correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    mixing = (
        torch.randn(inp, inp, generator=g, dtype=torch.float64)
        * torch.logspace(0, -2, inp, dtype=torch.float64)[:, None]
    )
    x = torch.randn(800, inp, generator=g, dtype=torch.float64) @ mixing
    return torch.randn(out, inp, generator=g), damped(x.mT @ x / 800)


def error(weight, approximation, gram):
    d = weight.double() - approximation.double()
    return float(torch.trace(d @ gram @ d.mT))


@pytest.mark.parametrize("columns", [5, 128, 200])
def test_feedback_beats_plain_rounding_and_keeps_the_grid(columns):
    core, gram = problem(64, columns)
    found, plain = round_with_feedback(core, gram, "int8"), quantize(core, "int8")
    torch.testing.assert_close(found.scale, plain.scale)
    assert found.data.dtype == torch.int8 and int(found.data.abs().max()) <= 127
    assert error(core, found.values(), gram) < 0.7 * error(core, plain.values(), gram)


@pytest.mark.parametrize("store", INT4)
@pytest.mark.parametrize("columns", [5, 128, 201])
def test_feedback_beats_plain_rounding_to_4_bits(columns, store):
    core, gram = problem(64, columns)
    found, plain = round_with_feedback(core, gram, store), quantize(core, store)
    found.check_layout()
    assert found.shape == core.shape and bool((found.scale > 0).all())
    assert error(core, found.values(), gram) < 0.8 * error(core, plain.values(), gram)


def test_finer_groups_and_zero_points_leave_less_error():
    core, gram = problem(64, 256)
    core = core + 0.7 * torch.randn(64, 1, generator=torch.Generator().manual_seed(1))
    errors = {store: error(core, round_with_feedback(core, gram, store).values(), gram) for store in INT4}
    assert errors["int4-g32"] < errors["int4-g64"] < errors["int4-g128"]
    assert all(errors[f"int4-g{group}-zp"] < errors[f"int4-g{group}"] for group in (32, 64, 128))


def test_feedback_on_uncorrelated_inputs_is_plain_rounding():
    core, _ = problem(16, 40)
    for store in ("int8", *INT4):
        found, plain = round_with_feedback(core, 3.0 * torch.eye(40, dtype=torch.float64), store), quantize(core, store)
        assert found.tensors.keys() == plain.tensors.keys()
        assert all(torch.equal(found.tensors[suffix], plain.tensors[suffix]) for suffix in plain.tensors)


def test_a_core_of_zeros_stays_zero():
    for store in ("int8", *INT4):
        found = round_with_feedback(torch.zeros(3, 40), torch.zeros(40, 40), store)
        assert not bool(found.values().any())


def test_refit_is_least_squares():
    weight, gram = problem(30, 24)
    core_0 = torch.randn(7, 24, generator=torch.Generator().manual_seed(5))
    core_1, inner = refit(weight, core_0, gram)
    root = torch.linalg.cholesky(gram)
    solution = torch.linalg.lstsq((core_0.double() @ root).mT, (weight.double() @ root).mT).solution.mT
    torch.testing.assert_close(core_1, solution, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inner, core_0.double() @ gram @ core_0.double().mT)


@pytest.mark.parametrize("kind", ["interpolative", "lowrank"])
@pytest.mark.parametrize(("out", "inp"), [(60, 48), (48, 60)])
def test_8_bits_cost_little_of_the_best_error(kind, out, inp):
    weight, gram = problem(out, inp)
    factors, rank = factorize(weight, gram), 30
    made = {
        store: factorized_module(kind, weight, factors, rank, store, gram).dense() for store in ("fp32", "bf16", "int8")
    }
    best = factors.errors()[rank]
    assert error(weight, made["fp32"], gram) == pytest.approx(best, rel=1e-3)
    assert best <= error(weight, made["bf16"], gram) < 1.05 * best
    assert best <= error(weight, made["int8"], gram) < 1.05 * best


@pytest.mark.parametrize("pivoted", [True, False])
def test_refitting_the_first_core_is_least_squares(pivoted):
    g = torch.Generator().manual_seed(2)
    core_0, core_1 = torch.randn(9, 20, generator=g), torch.randn(15, 9, generator=g)
    rounded = quantize(core_1, "int4-g32").values()
    found = refit_first(core_0, core_1, rounded, pivoted=pivoted)
    before, after = (torch.cat([torch.eye(9), core]) if pivoted else core for core in (core_1, rounded))
    expected = torch.linalg.lstsq(after.double(), before.double() @ core_0.double()).solution
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    if pivoted:  # with the exact core_1 there is nothing to do
        torch.testing.assert_close(refit_first(core_0, core_1, core_1, pivoted=True).float(), core_0)


@pytest.mark.parametrize("columns", [12, 40])
def test_the_ridge_is_near_the_best_one(columns):
    """The error after rounding, over a range of ridges: the predicted one leaves less than none, and nearly the least."""
    weight, gram = problem(300, columns + 20, seed=4)
    core_0 = torch.randn(columns, columns + 20, generator=torch.Generator().manual_seed(5))
    plain, inner = refit(weight, core_0, gram)
    ridge = rounding_ridge(plain, inner, "int4-g32")

    def rounded(penalty):
        core_1, _ = refit(weight, core_0, gram, penalty)
        return error(weight, round_with_feedback(core_1, inner, "int4-g32").values() @ core_0, gram)

    tried = [rounded(ridge * 2.0**k) for k in range(-6, 7)]
    assert rounded(ridge) < rounded(0.0)
    assert rounded(ridge) < 1.05 * min(tried)


@pytest.mark.parametrize("kind", ["interpolative", "lowrank"])
@pytest.mark.parametrize("store", ["int4-g32", "int4-g64-zp"])
def test_feedback_in_both_cores_at_4_bits(kind, store):
    """Against the same factors rounded number by number, the error that 4 bits add is at least halved."""
    weight, gram = problem(60, 48)
    factors, rank = factorize(weight, gram), 30
    exact = factorized_module(kind, weight, factors, rank, "fp32", gram)
    made = factorized_module(kind, weight, factors, rank, store, gram)
    assert made.spec.store == (store, store)
    plain = StoredModule(made.spec, [quantize(core.values(), store) for core in exact.cores], exact.pivot)
    best = error(weight, exact.dense(), gram)
    assert best < error(weight, made.dense(), gram) < best + 0.5 * (error(weight, plain.dense(), gram) - best)


def test_refitting_is_best_under_any_weighting_of_the_outputs():
    """With curvature the factors are not plain projections of the rows, and yet refitting must not undo them."""
    weight, gram = problem(40, 30)
    outer = damped(problem(8, 40, seed=3)[1])
    factors = factorize(weight, gram, outer)
    left, right = factors.left[:, :12], factors.right[:12]
    again, _ = refit(weight, right, gram)
    torch.testing.assert_close(again.float(), left, rtol=1e-3, atol=1e-4 * float(left.abs().max()))


def test_a_dense_module_is_the_weight():
    weight, gram = problem(12, 20)
    assert torch.equal(dense_module(weight, "fp32", gram).dense(), weight)
    assert float((dense_module(weight, "int8", gram).dense() - weight).abs().max()) <= float(weight.abs().max()) / 254
    made = dense_module(weight, "int4-g32", gram)
    assert made.spec.store == ("int4-g32",)
    assert error(weight, made.dense(), gram) < error(weight, quantize(weight, "int4-g32").values(), gram)
