"""Chooses kind, rank and store of every module under one budget in parameters or bytes."""

from __future__ import annotations

from collections.abc import Mapping

from cai_runtime.compressor.factor.allocate import Curve, Option, allocate, allocate_menus
from cai_runtime.compressor.factor.choice import Choice
from cai_runtime.compressor.options import Options
from cai_runtime.errors import CompressionError

# Rounding error of two cores over that of the dense weight in the same store. Measured on eight layers of SmolLM2-135M, int8
# and int4-g64, keep 0.8 and 0.5: 1.8 to 5.9, median 3.
FACTOR_NOISE = 3.0


def choose(
    curves: Mapping[str, Curve],
    options: Options,
    *,
    noise: Mapping[str, Mapping[str, float]] | None = None,
    budget_bytes: int | None = None,
    ends: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Choice]:
    """A choice for every module, by name.

    Args:
        curves: error by rank of every module.
        options: with `budget_bytes` None, `options.keep` is the budget in parameters.
        noise: error added by rounding the dense weight, by module and store. Needed with `budget_bytes`.
        budget_bytes: upper bound on the bytes of cores, scales and pivots.
        ends: (rows, columns) of embedding and head where their stores compete. They stay dense and share the budget.

    Raises CompressionError when the smallest choices exceed the budget.
    """
    if budget_bytes is None:
        assert options.keep is not None
        ranks = allocate(
            list(curves.values()),
            options.keep,
            kind=options.kind,
            allocation=options.allocation,
            multiple=options.rank_multiple,
            floor=options.floor,
        )
        store = options.stores[0]
        return {
            name: Choice("dense", None, store) if rank is None else Choice(options.kind, rank, store, curve.reshape)
            for (name, curve), rank in zip(curves.items(), ranks, strict=True)
        }
    assert noise is not None
    offers = {name: _offers(curve, options, noise[name]) for name, curve in curves.items()}
    for name, shape in (ends or {}).items():
        offers[name] = _rising(_dense_offers(*shape, options, noise[name]))
    menus = [[option for option, _ in offer] for offer in offers.values()]
    taken = allocate_menus(menus, budget_bytes)
    if taken is None:
        least = sum(menu[0].cost for menu in menus)
        whose, rest = ("linear layers", "embedding, head and norms")
        if ends:
            whose, rest = ("linear layers, embedding and head", "norms")
        raise CompressionError(
            f"target_bytes is too small: at their smallest the {whose} need {least:,} bytes, "
            f"{max(budget_bytes, 0):,} are left for them beside {rest}"
        )
    return {name: offer[k][1] for (name, offer), k in zip(offers.items(), taken, strict=True)}


def _offers(curve: Curve, options: Options, noise: Mapping[str, float]) -> list[tuple[Option, Choice]]:
    """All choices for a module: every rank and dense, in every store, as filtered by `_rising`."""
    out, inp = curve.out_features, curve.in_features
    found = _dense_offers(out, inp, options, noise)
    for dense, choice in list(found) if options.kind != "dense" else []:
        store, dense_bytes, added = choice.store, dense.cost, dense.error
        least = max(options.rank_multiple, int(options.floor * min(out, inp) / 4))
        for rank in range(options.rank_multiple, curve.ranks, options.rank_multiple):
            choice = Choice(options.kind, rank, store, curve.reshape)
            size = choice.spec(out, inp).nbytes
            if size < dense_bytes and rank >= least:
                found.append((Option(rank, size, curve.errors[rank] + FACTOR_NOISE * added), choice))
    return _rising(found)


def _dense_offers(out: int, inp: int, options: Options, noise: Mapping[str, float]) -> list[tuple[Option, Choice]]:
    """The dense matrix in every store."""
    found = [Choice("dense", None, store) for store in options.stores]
    return [(Option(None, c.spec(out, inp).nbytes, noise.get(c.store, 0.0)), c) for c in found]


def _rising(found: list[tuple[Option, Choice]]) -> list[tuple[Option, Choice]]:
    """The Pareto front, by rising bytes and falling error."""
    found.sort(key=lambda item: (item[0].cost, item[0].error))
    kept: list[tuple[Option, Choice]] = []
    for option, choice in found:
        if not kept or (option.error < kept[-1][0].error and option.cost > kept[-1][0].cost):
            kept.append((option, choice))
    return kept
