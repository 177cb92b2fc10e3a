"""Layers whose cores are trained: what they compute, and their gradients, against plain formulas."""

import pytest
import torch

from cai_runtime.compressor.factor.cores import StoredModule, factorized_module
from cai_runtime.compressor.factor.decompose import damped, factorize
from cai_runtime.compressor.train.student import TrainableLinear


@pytest.mark.parametrize("kind", ["interpolative", "lowrank"])
def test_values_and_gradients_are_those_of_the_matrix(kind):
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(23, 17, generator=g), torch.randn(2, 5, 17, generator=g)
    gram = damped(x.flatten(0, 1).double().mT @ x.flatten(0, 1).double())
    module = factorized_module(kind, weight, factorize(weight, gram, None), 9, "fp32", gram)
    layer = TrainableLinear(StoredModule(module.spec, module.cores, module.pivot)).requires_grad_(True)
    if kind == "interpolative":  # no order that is its own inverse
        assert not torch.equal(module.pivot.long(), module.pivot.long().argsort())
    first, second = (core.latent.detach().clone().requires_grad_(True) for core in layer.parts())
    rows = second @ first if kind == "lowrank" else torch.cat([first, second @ first])[layer.order]
    seen = torch.randn(2, 5, 23, generator=g)
    ours, theirs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    found, wanted = layer(ours), theirs @ rows.mT
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows.detach(), module.dense(), rtol=1e-4, atol=1e-4)
    (found * seen).sum().backward()
    (wanted * seen).sum().backward()
    for a, b in [(ours, theirs), *zip([core.latent for core in layer.parts()], [first, second], strict=True)]:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-3)
