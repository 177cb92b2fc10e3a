"""How many parameters each module gets: ranks for all modules under one budget.

`uniform` gives every module the same share. `pooled` lets the modules compete: it minimises the sum of their weighted
errors under the one budget. Each module offers a curve of error against parameters; on the lower convex hulls of the
curves, taking the steepest step first is optimal at every budget it reaches (Shoham and Gersho, "Efficient bit
allocation for an arbitrary set of quantizers", 1988).
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
    """What one module offers. `errors[r]`: its error at rank r, r = 0 .. min(out, in), never rising. reshape: of an mpo,
    whose rank is its widest bond dimension, up to `reshape.widest`."""

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
        """Those below this may cost less than the dense module."""
        return min(self.out_features, self.in_features) if self.reshape is None else self.reshape.widest

    def cost(self, kind: str, rank: int) -> int:
        """Parameters of the module at this rank."""
        if self.reshape is not None:
            return self.reshape.parameters(rank)
        return cost(kind, self.out_features, self.in_features, rank)


@dataclass(frozen=True)
class Option:
    """A rank (None: the module stays dense), what it costs (in parameters or bytes) and its weighted error."""

    rank: int | None
    cost: int
    error: float


def options(curve: Curve, kind: str, multiple: int = 1) -> list[Option]:
    """The ranks worth having, by rising cost: multiples of `multiple` that cost less than dense, then dense itself.

    A module too small for one such rank offers dense alone.
    """
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
    """Ranks, one per curve in order; None: dense. Their parameters sum to at most `keep` of the dense ones.

    multiple: ranks are multiples of it. floor (pooled): every module gets at least this share of what `keep` is of it.

    Raises CompressionError when even the smallest ranks exceed the budget.
    """
    if keep >= 1:
        return [None] * len(curves)
    menus = [options(curve, kind, multiple) for curve in curves]
    budget = int(keep * sum(curve.dense_cost for curve in curves) + 1e-6)
    share = keep if allocation == "uniform" else floor * keep
    at = [_last_within(menu, share * curve.dense_cost) for menu, curve in zip(menus, curves, strict=True)]

    def shortfall(m: int) -> float:
        return share - menus[m][at[m]].cost / curves[m].dense_cost

    def steepness(m: int) -> float:
        return _slope(menus[m], at[m], at[m] + 1)

    left = budget - sum(menu[k].cost for menu, k in zip(menus, at, strict=True))
    # A module too small to have a rank within its share takes from the others'.
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
    """An index into every menu, so that the costs sum to at most `budget` and the errors to as little as can be. Menus
    are by rising cost and falling error. None when the first entries exceed the budget."""
    at = [0] * len(menus)
    left = budget - sum(menu[0].cost for menu in menus)
    if left < 0:
        return None
    left = _descend_hulls(menus, at, left)
    _fill(menus, at, left, lambda m: _slope(menus[m], at[m], at[m] + 1))
    return at


def _last_within(menu: Sequence[Option], parameters: float) -> int:
    """Index of the dearest option that costs no more; 0 when none does, since a module needs some rank."""
    return max((k for k, option in enumerate(menu) if option.cost <= parameters), default=0)


def _hull(menu: Sequence[Option], start: int) -> list[int]:
    """Indices of the lower convex hull of error over parameters, from `start` to the last option."""
    hull: list[int] = []
    for k in range(start, len(menu)):
        while len(hull) >= 2 and _slope(menu, hull[-2], hull[-1]) <= _slope(menu, hull[-1], k):
            hull.pop()
        hull.append(k)
    return hull


def _slope(menu: Sequence[Option], a: int, b: int) -> float:
    """Error removed per parameter between two options."""
    return (menu[a].error - menu[b].error) / (menu[b].cost - menu[a].cost)


def _descend_hulls(menus: Sequence[Sequence[Option]], at: list[int], left: int) -> int:
    """Take hull steps, steepest first, while they fit. Moves `at`; returns the parameters left over."""
    steps = []
    for m, menu in enumerate(menus):
        hull = _hull(menu, at[m])
        # Ties go to the module named first, so that the result does not depend on the order of a sort.
        steps += [(-_slope(menu, a, b), m, b) for a, b in pairwise(hull)]
    for _, m, b in sorted(steps):
        price = menus[m][b].cost - menus[m][at[m]].cost
        if price > left:  # what follows removes less per parameter than parts of this step do: `_fill` takes parts
            break
        at[m], left = b, left - price
    return left


def _retreat(menus: Sequence[Sequence[Option]], at: list[int], left: int, gain: Callable[[int], float]) -> int:
    """Give back single steps while the budget is overdrawn, from the module that is furthest ahead (least `gain`)."""
    while left < 0 and (able := [m for m, k in enumerate(at) if k > 0]):
        worst = min(able, key=gain)
        left += menus[worst][at[worst]].cost - menus[worst][at[worst] - 1].cost
        at[worst] -= 1
    return left


def _fill(menus: Sequence[Sequence[Option]], at: list[int], left: int, gain: Callable[[int], float]) -> None:
    """Spend what is left on single steps, the best `gain` first, until no module's next option fits."""
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
