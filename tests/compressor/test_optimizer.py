"""Steps in whitened coordinates."""

import pytest
import torch
from torch import nn

from cai_runtime.compressor.factor.cores import dense_module, factorized_module
from cai_runtime.compressor.factor.decompose import damped, factorize
from cai_runtime.compressor.train.optimizer import WhitenedMuon, core_metrics, orthogonalized, whitening
from cai_runtime.compressor.train.student import TrainableLinear


def inputs(columns, seed=0):
    """Rows of which a few directions carry most, as in a language model."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=g) * torch.logspace(1, -1.5, columns)[:, None]
    return torch.randn(600, columns, generator=g) @ mixing


def gram_of(x):
    return x.double().mT @ x.double() / len(x)


def trained(metrics, rate, steps=40):
    """The share of the error that is left after some steps of mending a weight whose error is as decomposition leaves it:
    each direction's share of the outputs' error is the same."""
    x = inputs(24)
    metric = whitening(gram_of(x))
    weight, error = (torch.randn(16, 24, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    wanted = x @ weight.mT
    p = nn.Parameter(weight + 0.1 * error @ metric.root.mT)
    optimizer = WhitenedMuon([p], rate, {p: metric} if metrics else None)
    first = None
    for step in range(steps):
        optimizer.set_rate(1 - step / steps)
        loss = (x @ p.mT - wanted).square().mean()
        first = first or float(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float((x @ p.detach().mT - wanted).square().mean()) / first


def test_vectors_have_the_steps_of_adam():
    a, b = (nn.Parameter(torch.linspace(-1, 2, 12)) for _ in range(2))
    size = float(a.detach().square().mean().sqrt())
    ours, theirs = WhitenedMuon([a], 0.01), torch.optim.Adam([b], lr=0.01 * size, betas=(0.9, 0.99), eps=1e-12)
    for step in range(5):
        for p, optimizer in ((a, ours), (b, theirs)):
            (p**2 * (step + 1)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (16, 16)])
def test_a_step_goes_along_the_orthogonal_matrix_next_to_the_gradient(shape, white):
    """In whitened coordinates, where there is a metric, and back out of them."""
    g = torch.Generator().manual_seed(0)
    n = min(shape)
    u, v = (torch.linalg.qr(torch.randn(side, n, generator=g))[0] for side in shape)
    metric = whitening(gram_of(inputs(shape[1]))) if white else None
    root = torch.eye(shape[1]) if metric is None else metric.root
    p = nn.Parameter(torch.ones(shape))
    optimizer = WhitenedMuon([p], 0.01, None if metric is None else {p: metric})
    (group,) = optimizer.param_groups
    p.grad = (u @ torch.diag(torch.logspace(0, -1, n)) @ v.mT) @ root.inverse()
    optimizer.step()
    moved = ((1 - p.detach()) / group["lr"]) @ root.mT.inverse()
    along = torch.linalg.svdvals(moved) / max(shape) ** 0.5
    assert bool(((along > 0.85) & (along < 1.15)).all())
    assert float((moved * (u @ v.mT)).sum() / (moved.norm() * (u @ v.mT).norm())) > 0.99
    assert float(moved.square().mean().sqrt()) == pytest.approx(1, rel=0.1)


def test_directions_that_are_next_to_nothing_are_not_made_large():
    """Nor is anything of rounding's: singular values over eight orders of magnitude, some of them none."""
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(64, 24, generator=g))[0] for _ in range(2))
    for values in (torch.logspace(0, -8, 24), (torch.arange(24) < 3).float()):
        along = torch.linalg.svdvals(orthogonalized(u @ torch.diag(values) @ v.mT))
        assert float(along.max()) < 1.15
        assert float(along[:3].min()) > 0.85


def test_a_gradient_of_zeros_moves_nothing():
    assert torch.equal(orthogonalized(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_a_metric_gets_further_than_any_rate_without():
    best = {on: min(trained(on, 10**-power) for power in (1, 1.5, 2, 2.5, 3, 3.5)) for on in (False, True)}
    assert best[True] < 0.3 * best[False]


def test_the_rate_is_a_share_of_the_root_mean_square_in_whitened_coordinates():
    gram = gram_of(inputs(24))
    core = (
        torch.randn(8, 24, generator=torch.Generator().manual_seed(3)) @ torch.linalg.cholesky(gram).inverse().float()
    )
    p = nn.Parameter(core)
    (group,) = WhitenedMuon([p], 0.01, {p: whitening(gram)}).param_groups
    known = damped(gram)
    size = ((core.double() @ known @ core.double().mT).trace() / core.numel() / known.diagonal().mean()).sqrt()
    assert group["lr"] == pytest.approx(0.01 * float(size), rel=1e-3)


def test_whitened_inputs_have_the_unit_as_their_mean():
    gram = damped(gram_of(inputs(20)))
    inverse, root = whitening(gram_of(inputs(20)))
    torch.testing.assert_close(root @ root.mT, inverse)
    white = root.double().mT @ gram @ root.double()
    unit = float(white[0, 0])
    torch.testing.assert_close(white, unit * torch.eye(20, dtype=torch.float64), atol=1e-4 * unit, rtol=0)


def test_inputs_that_were_never_seen_leave_adam_as_it_is():
    for eye in whitening(torch.zeros(5, 5, dtype=torch.float64)):
        torch.testing.assert_close(eye, torch.eye(5))


@pytest.mark.parametrize("kind", ["dense", "lowrank", "interpolative"])
def test_every_core_has_the_metric_of_its_own_inputs(kind):
    x = inputs(24)
    gram = damped(gram_of(x))
    weight = torch.randn(16, 24)
    if kind == "dense":
        module = dense_module(weight, "fp32", gram)
    else:
        module = factorized_module(kind, weight, factorize(weight, gram), 8, "fp32", gram)
    layer, twin = TrainableLinear(module), TrainableLinear(module)
    metrics = core_metrics([(layer, gram), (twin, gram)])
    assert metrics[layer.parts()[0].latent] is metrics[twin.parts()[0].latent]  # one matrix for shared inputs
    assert len(metrics) == 2 * len(layer.parts())
    if kind != "dense":
        core, found = layer.parts()[0].latent.detach().double(), metrics[layer.parts()[1].latent]
        assert found.root.shape == (8, 8)
        torch.testing.assert_close(found.inverse, whitening(core @ gram @ core.mT).inverse)
