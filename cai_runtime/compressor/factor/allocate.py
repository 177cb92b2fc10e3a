"""Allocates ranks to all modules under one budget.

`uniform` gives every module the same share. `pooled` minimizes the sum of the weighted errors under the budget. Each module
has a curve of error against parameters. Taking the steepest step on the lower convex hulls first is optimal at every budget
that it reaches exactly (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from cai_runtime.errors import CompressionError

if TYPE_CHECKING:
    from cai_runtime.compressor.factor.mpo import Reshape

Allocation = Literal["pooled", "uniform"]


def cost(kind: str, out_features: int, in_features: int, rank: int) -> int:
    """Parameters of an interpolative or lowrank module of this rank."""
    return rank * (in_features + out_features - (rank if kind == "interpolative" else 0))


@dataclass(frozen=True)
class Curve:
    """Error by rank of one module.

    errors[r]: the error at rank r = 0 .. min(out, in), never rising. weight: factor of the errors in the pooled sum.
    reshape: of an mpo, whose rank is its largest bond dimension, 0 .. `reshape.widest`; else None.
    """

    name: str
    out_features: int
    in_features: int
    errors: Sequence[float]
    weight: float = 1.0
    reshape: Reshape | None = None

    @property
    def dense_cost(self) -> int:
        return self.out_features * self.in_features

    @property
    def ranks(self) -> int:
        """Upper bound, exclusive, of the ranks that can cost less than dense."""
        return min(self.out_features, self.in_features) if self.reshape is None else self.reshape.widest

    def cost(self, kind: str, rank: int) -> int:
        """Parameters of the module at this rank."""
        if self.reshape is not None:
            return self.reshape.parameters(rank)
        return cost(kind, self.out_features, self.in_features, rank)


@dataclass(frozen=True)
class Option:
    """One option of a module: rank (None: dense), cost in parameters or bytes, and weighted error."""

    rank: int | None
    cost: int
    error: float


def options(curve: Curve, kind: str, multiple: int = 1) -> list[Option]:
    """The options of a module by rising cost: ranks in multiples of `multiple` that cost less than dense, then dense."""
    found = [
        Option(rank, parameters, curve.weight * curve.errors[rank])
        for rank in range(multiple, curve.ranks, multiple)
        if (parameters := curve.cost(kind, rank)) < curve.dense_cost
    ]
    return [*found, Option(None, curve.dense_cost, 0.0)]


def allocate(
    curves: Sequence[Curve],
    keep: float,
    *,
    kind: str = "interpolative",
    allocation: Allocation = "pooled",
    multiple: int = 1,
    floor: float = 0.0,
) -> list[int | None]:
    """Ranks, one per curve in order; None: dense. Their parameters sum to at most `keep` of the dense count.

    multiple: ranks are multiples of it. floor: pooled only; every module gets at least floor * keep of its parameters, as
    far as the budget allows.

    Raises CompressionError when the smallest ranks exceed the budget.
    """
    if keep >= 1:
        return [None] * len(curves)
    menus = [options(curve, kind, multiple) for curve in curves]
    budget = int(keep * sum(curve.dense_cost for curve in curves) + 1e-6)
    share = keep if allocation == "uniform" else floor * keep
    at = [last_within(menu, share * curve.dense_cost) for menu, curve in zip(menus, curves, strict=True)]

    def shortfall(m: int) -> float:
        return share - menus[m][at[m]].cost / curves[m].dense_cost

    def steepness(m: int) -> float:
        return slope(menus[m], at[m], at[m] + 1)

    left = budget - sum(menu[k].cost for menu, k in zip(menus, at, strict=True))
    # A module whose smallest rank exceeds its share takes from the others.
    left = _retreat(menus, at, left, shortfall)
    if left < 0:
        raise CompressionError(
            f"keep {keep} is too small: with ranks in multiples of {multiple} the modules need {budget - left} "
            f"parameters, the budget is {budget}; raise keep or lower the multiple"
        )
    if allocation == "pooled":
        left = _descend_hulls(menus, at, left)
        _fill(menus, at, left, steepness)
    else:
        _fill(menus, at, left, shortfall)
    return [menu[k].rank for menu, k in zip(menus, at, strict=True)]


def allocate_menus(menus: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """An index into every menu. The costs sum to at most `budget`; the sum of the errors is minimized.

    menus: options by rising cost and falling error. None when the first options exceed the budget.
    """
    at = [0] * len(menus)
    left = budget - sum(menu[0].cost for menu in menus)
    if left < 0:
        return None
    left = _descend_hulls(menus, at, left)
    _fill(menus, at, left, lambda m: slope(menus[m], at[m], at[m] + 1))
    return at


def last_within(menu: Sequence[Option], parameters: float) -> int:
    """Index of the largest option within `parameters`; 0 if there is none, since a module needs some rank."""
    return max((k for k, option in enumerate(menu) if option.cost <= parameters), default=0)


def hull(menu: Sequence[Option], start: int) -> list[int]:
    """Indices of the lower convex hull of error over parameters, from `start` to the last option."""
    found: list[int] = []
    for k in range(start, len(menu)):
        while len(found) >= 2 and slope(menu, found[-2], found[-1]) <= slope(menu, found[-1], k):
            found.pop()
        found.append(k)
    return found


def slope(menu: Sequence[Option], a: int, b: int) -> float:
    """Error removed per parameter between two options."""
    return (menu[a].error - menu[b].error) / (menu[b].cost - menu[a].cost)


def _descend_hulls(menus: Sequence[Sequence[Option]], at: list[int], left: int) -> int:
    """Take hull steps, steepest first, while they fit. Updates `at` in place; returns the rest of the budget."""
    steps = []
    for m, menu in enumerate(menus):
        # The index breaks ties, so that the result does not depend on the sort.
        steps += [(-slope(menu, a, b), m, b) for a, b in pairwise(hull(menu, at[m]))]
    for _, m, b in sorted(steps):
        price = menus[m][b].cost - menus[m][at[m]].cost
        if price > left:  # parts of this step, taken by `_fill`, are steeper than all later steps
            break
        at[m], left = b, left - price
    return left


def _retreat(menus: Sequence[Sequence[Option]], at: list[int], left: int, gain: Callable[[int], float]) -> int:
    """Undo single steps while the budget is exceeded, each time in the module of least `gain`."""
    while left < 0 and (able := [m for m, k in enumerate(at) if k > 0]):
        worst = min(able, key=gain)
        left += menus[worst][at[worst]].cost - menus[worst][at[worst] - 1].cost
        at[worst] -= 1
    return left


def _fill(menus: Sequence[Sequence[Option]], at: list[int], left: int, gain: Callable[[int], float]) -> None:
    """Spend the rest of the budget on single steps, best `gain` first, until no module's next option fits."""
    while True:
        fits = [
            m
            for m, menu in enumerate(menus)
            if at[m] + 1 < len(menu) and menu[at[m] + 1].cost - menu[at[m]].cost <= left
        ]
        if not fits:
            return
        best = max(fits, key=gain)
        left -= menus[best][at[best] + 1].cost - menus[best][at[best]].cost
        at[best] += 1
