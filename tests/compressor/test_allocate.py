"""Budgets are kept to the parameter, and the pooled ranks are the best ones."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_runtime.compressor.factor.allocate import Curve, allocate, cost, options
from cai_runtime.errors import CompressionError


def curve(name, out, inp, decay, weight=1.0):
    n = min(out, inp)
    return Curve(name, out, inp, [decay**r - decay**n * r / n for r in range(n + 1)], weight)


def spent(curves, ranks, kind="interpolative"):
    return sum(
        c.dense_cost if r is None else cost(kind, c.out_features, c.in_features, r)
        for c, r in zip(curves, ranks, strict=True)
    )


def error(curves, ranks):
    return sum(0.0 if r is None else c.weight * c.errors[r] for c, r in zip(curves, ranks, strict=True))


@pytest.mark.parametrize("kind", ["interpolative", "lowrank"])
@pytest.mark.parametrize("allocation", ["uniform", "pooled"])
@given(
    shapes=st.lists(st.tuples(st.integers(3, 40), st.integers(3, 40), st.floats(0.5, 0.99)), min_size=1, max_size=6),
    keep=st.floats(0.3, 1.0),
    multiple=st.sampled_from([1, 2, 8]),
)
@settings(max_examples=60, deadline=None)
def test_the_budget_is_kept_and_used(kind, allocation, shapes, keep, multiple):
    curves = [curve(str(k), out, inp, decay) for k, (out, inp, decay) in enumerate(shapes)]
    budget = int(keep * sum(c.dense_cost for c in curves) + 1e-6)
    try:
        ranks = allocate(curves, keep, kind=kind, allocation=allocation, multiple=multiple)
    except CompressionError:
        assert sum(options(c, kind, multiple)[0].cost for c in curves) > budget
        return
    left = budget - spent(curves, ranks, kind)
    assert left >= 0
    if keep == 1:
        assert ranks == [None] * len(curves)
    for c, rank in zip(curves, ranks, strict=True):
        menu = options(c, kind, multiple)
        at = next(k for k, option in enumerate(menu) if option.rank == rank)
        assert at + 1 == len(menu) or menu[at + 1].cost - menu[at].cost > left


def test_pooled_is_the_best_of_all_choices():
    """Against every combination, at a budget that the hulls reach."""
    curves = [curve("a", 6, 5, 0.3), curve("b", 6, 5, 0.8), curve("c", 4, 7, 0.6, weight=2.0)]
    for keep in (0.5, 0.6, 0.7, 0.8, 0.9):
        ranks = allocate(curves, keep)
        budget = spent(curves, ranks)
        menus = [[option.rank for option in options(c, "interpolative")] for c in curves]
        best = min(error(curves, choice) for choice in product(*menus) if spent(curves, choice) <= budget)
        # Greedy on hulls is exact at hull points; the last fill may stop one step short of them.
        assert error(curves, ranks) <= best * 1.25 + 1e-12


def test_pooled_beats_uniform_and_gives_more_to_the_harder_module():
    curves = [curve("easy", 64, 64, 0.7), curve("hard", 64, 64, 0.98)]
    pooled, uniform = allocate(curves, 0.6), allocate(curves, 0.6, allocation="uniform")
    assert error(curves, pooled) < error(curves, uniform)
    assert pooled[1] is None or (pooled[0] or 64) < pooled[1]


def test_uniform_gives_every_module_its_share():
    curves = [curve("a", 576, 576, 0.99), curve("b", 1536, 576, 0.9), curve("c", 192, 576, 0.5)]
    for c, rank in zip(curves, allocate(curves, 0.8, allocation="uniform", multiple=16), strict=True):
        assert rank is not None and rank % 16 == 0
        assert spent([c], [rank]) / c.dense_cost == pytest.approx(0.8, abs=0.04)


def test_keep_1_is_dense():
    assert allocate([curve("a", 8, 8, 0.5)], 1.0) == [None]


def test_a_module_whose_best_rank_costs_as_much_as_dense_stays_dense():
    flat = Curve("flat", 16, 16, [1 - r / 16 for r in range(17)])
    easy = curve("easy", 16, 16, 0.2)
    ranks = allocate([flat, easy], 0.75, kind="lowrank")
    assert ranks[0] is None and ranks[1] is not None


def test_the_floor_holds():
    curves = [curve("easy", 64, 64, 0.3), curve("hard", 64, 64, 0.99)]
    share = 0.9 * 0.5 * 64 * 64
    one_rank = 2 * 64
    free, held = allocate(curves, 0.5), allocate(curves, 0.5, floor=0.9)
    assert spent(curves[:1], free[:1]) < share - one_rank < spent(curves[:1], held[:1])


def test_too_small_a_keep_is_refused():
    with pytest.raises(CompressionError, match="raise keep"):
        allocate([curve("a", 64, 64, 0.9)], 0.01, multiple=16)
