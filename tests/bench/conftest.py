"""Small and quick: one set of weights, one call each, floors that nobody has to measure."""

import pytest

from cai_runtime.bench.roofs import Roofs
from cai_runtime.bench.timing import Schedule


@pytest.fixture
def roofs():
    return Roofs(read=1e10, matmul={"float32": 1e11, "bfloat16": 4e11})


@pytest.fixture
def once():
    return Schedule(rounds=1, seconds=0)


@pytest.fixture(autouse=True)
def one_set(monkeypatch):
    """Data is not rotated, and no time passes in settling."""
    monkeypatch.setattr("cai_runtime.bench.timing.CACHE_FACTOR", 0)
    monkeypatch.setattr("cai_runtime.bench.timing.SETTLE_SECONDS", 0)
