"""The factors against brute force in float64."""

import pytest
import torch

from cai_runtime.compressor.factor.decompose import damped, factorize, interpolate

SHAPES = [(24, 40), (40, 24), (32, 32)]


def random_problem(out, inp, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, generator=g, dtype=torch.float64)
    x = torch.randn(500, inp, generator=g, dtype=torch.float64) @ torch.randn(
        inp, inp, generator=g, dtype=torch.float64
    )
    grad = torch.randn(500, out, generator=g, dtype=torch.float64) * torch.linspace(0.1, 3, out, dtype=torch.float64)
    return weight.float(), x.mT @ x / 500, grad.mT @ grad / 500


def whitened_error(weight, approximation, input_gram, output_gram):
    """tr(F D G D^T) of D = W - V: the definition, without any root."""
    d = weight.double() - approximation.double()
    outer = torch.eye(weight.shape[0], dtype=torch.float64) if output_gram is None else output_gram
    return float(torch.trace(outer @ d @ input_gram @ d.mT))


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize(("out", "inp"), SHAPES)
def test_the_claimed_error_is_the_error(out, inp, two_sided):
    weight, input_gram, output_gram = random_problem(out, inp)
    outer = output_gram if two_sided else None
    factors = factorize(weight, input_gram, outer)
    for rank in (1, 5, 13, min(out, inp) - 1):
        approximation = factors.left[:, :rank] @ factors.right[:rank]
        measured = whitened_error(weight, approximation, input_gram, outer)
        assert factors.errors()[rank] == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize(("out", "inp"), SHAPES)
def test_the_factors_are_the_best_of_their_rank(out, inp):
    weight, input_gram, output_gram = random_problem(out, inp)
    factors = factorize(weight, input_gram, output_gram)
    root_in, root_out = torch.linalg.cholesky(input_gram), torch.linalg.cholesky(output_gram)
    singular = torch.linalg.svdvals(root_out.mT @ weight.double() @ root_in)
    torch.testing.assert_close(factors.energy, singular.square(), rtol=1e-8, atol=1e-8 * float(singular[0]) ** 2)
    errors = factors.relative_errors()
    assert len(errors) == min(out, inp) + 1
    assert errors[0] == pytest.approx(1) and errors[-1] == 0
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("out", "inp"), SHAPES)
def test_full_rank_gives_the_weight_back(out, inp):
    weight, input_gram, output_gram = random_problem(out, inp)
    factors = factorize(weight, input_gram, output_gram)
    torch.testing.assert_close(factors.left @ factors.right, weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 7, 23])
@pytest.mark.parametrize(("out", "inp"), SHAPES)
def test_interpolation_loses_nothing_and_bounds_its_coefficients(out, inp, rank):
    weight, input_gram, _ = random_problem(out, inp)
    factors = factorize(weight, input_gram)
    left, right = factors.left[:, :rank], factors.right[:rank]
    found = interpolate(left, right, bound=1.5)
    assert found.core_0.shape == (rank, inp) and found.core_1.shape == (out - rank, rank)
    assert sorted(found.pivot.tolist()) == list(range(out))
    assert float(found.core_1.abs().max()) <= 1.5 + 1e-5
    rebuilt = torch.empty(out, inp)
    rebuilt[found.pivot[:rank]] = found.core_0
    rebuilt[found.pivot[rank:]] = found.core_1 @ found.core_0
    torch.testing.assert_close(rebuilt, left @ right, rtol=1e-4, atol=1e-4 * float(weight.abs().max()))


def test_swaps_happen_and_tame_a_matrix_that_defeats_lu():
    """Kahan-like growth: partial pivoting leaves coefficients of about 2^(r-1)."""
    rank = 12
    left = torch.cat([torch.eye(rank) - torch.ones(rank, rank).tril(-1), torch.full((4, rank), -1.0)])
    right = torch.randn(rank, 20, generator=torch.Generator().manual_seed(0))
    assert float(interpolate(left, right, bound=1e9).core_1.abs().max()) > 100
    tamed = interpolate(left, right, bound=1.1)
    assert float(tamed.core_1.abs().max()) <= 1.1 + 1e-5
    rebuilt = torch.empty(16, 20)
    rebuilt[tamed.pivot[:rank]] = tamed.core_0
    rebuilt[tamed.pivot[rank:]] = tamed.core_1 @ tamed.core_0
    torch.testing.assert_close(rebuilt, left @ right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("left", [torch.ones(8, 3), torch.zeros(8, 3), torch.eye(8)[:, [2, 5, 5]]])
def test_dependent_columns_are_interpolated_too(left):
    right = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    found = interpolate(left, right)
    rebuilt = torch.empty(8, 5)
    rebuilt[found.pivot[:3]] = found.core_0
    rebuilt[found.pivot[3:]] = found.core_1 @ found.core_0
    torch.testing.assert_close(rebuilt, left @ right, rtol=1e-5, atol=1e-5)


def test_a_gram_of_zeros_means_plain_svd():
    weight, input_gram, _ = random_problem(24, 40)
    factors = factorize(weight, damped(torch.zeros_like(input_gram)))
    torch.testing.assert_close(factors.energy, torch.linalg.svdvals(weight.double()).square(), rtol=1e-8, atol=1e-8)


def test_damping_keeps_what_the_text_showed_and_does_not_break_on_what_it_did_not():
    weight, _, _ = random_problem(24, 40)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factors = factorize(weight, damped(x.mT @ x, 1e-8))
    approximation = factors.left[:, :3] @ factors.right[:3]
    assert float(((weight - approximation) @ x.mT.float()).norm()) < 1e-3 * float((weight @ x.mT.float()).norm())
