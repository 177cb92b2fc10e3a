"""The divergence by hand against autograd's."""

import math

import pytest
import torch
import torch.nn.functional as F

from cai_runtime.compressor.train.divergence import Divergence


def reference(found, wanted):
    """In float64: the sum over positions, and its gradient at `found`."""
    leaf = found.double().requires_grad_()
    total = F.kl_div(
        leaf.log_softmax(-1), wanted.double().log_softmax(-1), log_target=True, reduction="none"
    ).nansum()  # a token without any chance adds nothing
    return float(total.detach()), torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_and_its_gradient(dtype):
    divergence, g = Divergence(), torch.Generator().manual_seed(0)
    for positions in (7, 16, 3):  # the buffers grow, and are used in part
        found, wanted = (4 * torch.randn(positions, 101, generator=g).to(dtype) for _ in range(2))
        before = found.clone(), wanted.clone()
        total, gradient = divergence(found, wanted)
        expected, slope = reference(found, wanted)
        assert math.isclose(total, expected, rel_tol=1e-5)
        torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-6)
        assert torch.equal(found, before[0]) and torch.equal(wanted, before[1])


def test_tokens_that_have_no_chance_add_nothing():
    found, wanted = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(1))
    found[:, 4] = wanted[:, 4] = -math.inf
    total, gradient = Divergence()(found, wanted)
    kept = [k for k in range(9) if k != 4]
    expected, slope = reference(found[:, kept], wanted[:, kept])
    assert math.isclose(total, expected, rel_tol=1e-5)
    torch.testing.assert_close(gradient[:, kept].double(), slope, rtol=1e-4, atol=1e-6)
    assert not gradient[:, 4].any()


def test_what_is_no_number_stays_none():
    found, wanted = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(2))
    found[1, 2] = math.nan
    assert math.isnan(Divergence()(found, wanted)[0])
