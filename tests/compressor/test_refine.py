"""Training of one block."""

import pytest
import torch
from torch import nn

from cai_runtime.compressor.train.refine import refine_block, refine_steps


def refined(batches, *, noise, epochs=2, rate=0.02):
    """A linear layer with an error in it, refined on `batches` of random rows whose targets have noise of their own. Returns
    the layer's error against the true weight before and after, what `refine_block` said, and how many steps it took."""
    g = torch.Generator().manual_seed(0)
    true, error = (torch.randn(12, 12, generator=g) for _ in range(2))
    block = nn.Linear(12, 12, bias=False)
    block.weight.data = true + 0.3 * error
    inputs = [torch.randn(1, 4, 12, generator=g) for _ in range(batches)]
    targets = [x @ true.mT + noise * torch.randn(x.shape, generator=g) for x in inputs]
    ticks = []

    def distance():
        return float((block.weight.detach() - true).square().mean())

    before = distance()
    found = refine_block(
        block,
        [block.weight],
        [lambda block, x: block(x)] * batches,
        inputs,
        targets,
        torch.eye(12, dtype=torch.float64),
        inputs_metrics={},
        epochs=epochs,
        rate=rate,
        seed=0,
        tick=lambda: ticks.append(1),
    )
    return before, distance(), found, len(ticks)


def test_a_block_comes_closer_to_its_targets():
    before, after, (begin, least), steps = refined(64, noise=0.0)
    assert least < 0.5 * begin and after < 0.5 * before
    assert steps == refine_steps(2, 64) == 2 * 56


def test_what_it_learns_by_heart_is_not_kept():
    """With few rows and a lot of noise, training makes it worse on other rows; then the block stays as it was."""
    before, after, (begin, least), _ = refined(8, noise=8.0, epochs=8, rate=0.3)
    assert after == before and least == begin


def test_of_few_batches_none_is_set_aside():
    before, after, (begin, least), steps = refined(3, noise=0.0, epochs=4)
    assert steps == refine_steps(4, 3) == 12 and least < begin
    assert after != before


@pytest.mark.parametrize("batches", [7, 8, 24, 25])
def test_steps(batches):
    assert refine_steps(3, batches) == 3 * (batches - batches // 8)
