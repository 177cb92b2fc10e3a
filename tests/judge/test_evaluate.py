"""Perplexity and agreement against their definitions."""

import math

import pytest
import torch

from cai_runtime.errors import CompressionError
from cai_runtime.judge.evaluate import agreement, perplexity
from cai_runtime.stock.load import dense_reference

IDS = torch.randint(0, 62, (75,), generator=torch.Generator().manual_seed(0))


def by_definition(logits_of, ids, window, stride):
    """One window and one token at a time."""
    losses, scored = [], set()
    for start in range(0, len(ids), stride):
        piece = ids[start : start + window]
        logits = logits_of(piece[None])[0].double()
        for k in range(1, len(piece)):
            if start + k not in scored:
                scored.add(start + k)
                losses.append(-float(logits[k - 1].log_softmax(-1)[piece[k]]))
        if start + window >= len(ids):
            break
    return math.exp(sum(losses) / len(losses)), scored


@pytest.mark.parametrize(("window", "stride"), [(20, 20), (20, 7), (20, 1), (75, 75), (74, 74), (100, 50), (2, 2)])
def test_perplexity_is_its_definition(tiny, window, stride):
    model = dense_reference(tiny)
    wanted, scored = by_definition(lambda ids: model(input_ids=ids).logits, IDS, window, stride)
    assert perplexity(model, IDS, window=window, stride=stride, progress=False) == pytest.approx(wanted, rel=1e-5)
    if stride < window:
        assert scored == set(range(1, len(IDS)))


def test_any_callable_will_do():
    assert perplexity(lambda ids: torch.zeros(*ids.shape, 50), IDS.clamp(max=49).tolist()) == pytest.approx(50)


def test_agreement():
    def skewed(shift):
        def logits(ids):
            out = torch.zeros(*ids.shape, 4)
            out[..., 0] = 1.0
            out[..., 1] = shift * (ids % 2)
            return out

        return logits

    ids = torch.arange(64) % 4
    same = agreement(skewed(0.0), skewed(0.0), ids)
    assert same.top1 == 1 and same.kl == 0 and same.tokens == 64
    other = agreement(skewed(0.0), skewed(3.0), ids, window=16)
    p = torch.tensor([1.0, 0, 0, 0]).softmax(0)
    q = torch.tensor([1.0, 3, 0, 0]).softmax(0)
    assert other.top1 == 0.5
    assert other.kl == pytest.approx(float((p * (p / q).log()).sum()) / 2, rel=1e-5)


@pytest.mark.parametrize(
    "arguments", [{"stride": 0}, {"stride": 30, "window": 20}, {"window": 1}], ids=["no stride", "gaps", "no window"]
)
def test_impossible_windows(arguments):
    with pytest.raises(CompressionError, match="stride"):
        perplexity(lambda ids: torch.zeros(*ids.shape, 62), IDS, **arguments)


def test_too_short_a_text():
    with pytest.raises(CompressionError, match="two token"):
        perplexity(lambda ids: torch.zeros(*ids.shape, 62), [5])


def test_what_transformers_cannot_load(tmp_path):
    with pytest.raises(CompressionError, match="can't load"):
        dense_reference(tmp_path)
