"""Chooses what each module becomes, under one budget in parameters or bytes."""

from __future__ import annotations

from collections.abc import Mapping

from cai_runtime.compressor.factor.allocate import Curve, Option, allocate, allocate_menus
from cai_runtime.compressor.factor.choice import Choice
from cai_runtime.compressor.options import Options
from cai_runtime.errors import CompressionError

# What rounding adds to the error of two cores, over what it adds to the dense weight's. On eight layers of SmolLM2-135M, in
# int8 and int4-g64 at keep 0.8 and 0.5, it was 1.8 to 5.9, at the median 3.
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

    curves: errors by rank. With `budget_bytes` the choices' bytes (cores, scales and pivots) sum to no more than it,
    and `noise` gives what rounding the dense weight to each store adds to the error, by module and store. ends: shapes of
    embedding and head where their stores compete, too: they stay dense, and the budget is for them and the modules.

    Raises CompressionError when even the smallest choices exceed the budget.
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
    """What a module can become, by rising bytes and falling error: its ranks and itself, in every store."""
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
    """A matrix as it is, in every store."""
    found = [Choice("dense", None, store) for store in options.stores]
    return [(Option(None, c.spec(out, inp).nbytes, noise.get(c.store, 0.0)), c) for c in found]


def _rising(found: list[tuple[Option, Choice]]) -> list[tuple[Option, Choice]]:
    """By rising bytes and falling error, without those that cost more and are no better."""
    found.sort(key=lambda item: (item[0].cost, item[0].error))
    kept: list[tuple[Option, Choice]] = []
    for option, choice in found:
        if not kept or (option.error < kept[-1][0].error and option.cost > kept[-1][0].cost):
            kept.append((option, choice))
    return kept
