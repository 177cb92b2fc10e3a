"""Plans an elastic checkpoint: the forms of each module, and the order in which they grow with keep.

All modules start at small ranks. A greedy allocation then takes the step with the steepest fall of error per parameter,
until the largest keep is reached (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988).
A prefix of this order is the allocation for a smaller budget. The checkpoint's table holds the order (`slim/elastic.py`).

A lowrank module has r (in + out) parameters, a dense one in * out. At some rank of most modules the step to dense becomes
steeper than a higher rank. Such a module is stored in both forms: dense, and lowrank at its last rank. This makes the file
larger, but an opened model holds one form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from cai_runtime.compressor.factor.allocate import Curve, Option, cost, hull, last_within, options, slope
from cai_runtime.compressor.factor.cores import StoredModule, dense_module
from cai_runtime.compressor.factor.decompose import Factors
from cai_runtime.compressor.factor.elastic_rounding import nested_module
from cai_runtime.compressor.options import SMALLEST_KEEP
from cai_runtime.errors import CompressionError
from cai_runtime.slim.elastic import ElasticModule, ElasticTable
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import ModuleSpec
from cai_runtime.slim.writer import CheckpointWriter

_Step = tuple[int, int, int]  # module, index in its menu before the step, and after it

_SLACK = 1e-6  # parameters: tolerance for rounding in keep * dense


@dataclass(frozen=True)
class PlannedModule:
    """The stored forms of one module: dense, lowrank of `rank`, or both.

    least: rank of the lowrank form at the smallest keep. rank: its stored rank. Both None for a module that is dense at
    every keep. dense: whether the dense form is stored.
    """

    name: str
    out_features: int
    in_features: int
    least: int | None
    rank: int | None
    dense: bool

    def ranks(self, step: int) -> list[int]:
        """The ranks at which the lowrank form opens, rising. step: of the plan."""
        return [] if self.least is None or self.rank is None else [*range(self.least, self.rank, step), self.rank]

    @property
    def parameters(self) -> int:
        """Parameters of all stored forms."""
        lowrank = 0 if self.rank is None else cost("lowrank", self.out_features, self.in_features, self.rank)
        return lowrank + self.dense * self.out_features * self.in_features


@dataclass(frozen=True)
class ElasticPlan:
    """The result of `plan_elastic`. keep, step, order: see `ElasticTable`. parameters: of all stored forms in the file."""

    keep: tuple[float, float]
    modules: tuple[PlannedModule, ...]
    step: int
    order: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return sum(module.parameters for module in self.modules)

    def table(self, stores: Mapping[str, Sequence[str]], quality: Sequence[Mapping[str, float]] = ()) -> ElasticTable:
        """The table to write. stores: (core_0, core_1) of every module with both forms, by name; other entries are ignored.
        quality: see `ElasticTable`."""
        modules = []
        for m in self.modules:
            both = m.dense and m.rank is not None
            second = (
                ModuleSpec("lowrank", m.out_features, m.in_features, m.rank, tuple(stores[m.name])) if both else None
            )
            modules.append(ElasticModule(m.name, m.least, second))
        return ElasticTable(self.keep, tuple(modules), self.step, self.order, tuple(dict(entry) for entry in quality))


def plan_elastic(
    curves: Sequence[Curve],
    keep: float = 1.0,
    *,
    smallest: float = SMALLEST_KEEP,
    multiple: int = 16,
    floor: float = 0.25,
) -> ElasticPlan:
    """Ranks and forms of an elastic checkpoint.

    Args:
        curves: one per module: error of the lowrank form by rank; the dense form has error 0.
        keep: the largest keep at which the checkpoint opens; at 1 every module is dense there.
        smallest: the smallest keep at which it opens.
        multiple: ranks are multiples of it, and grow by it.
        floor: growth starts in every module at the largest rank within floor * smallest of its dense parameters, or at the
            smallest rank if none is that small.

    Raises CompressionError when the keeps are out of order, the smallest ranks exceed `smallest`, or nothing can grow.
    """
    if not 0 < smallest < keep <= 1:
        raise CompressionError(f"an elastic checkpoint needs 0 < smallest keep < keep <= 1, not {smallest} and {keep}")
    dense = sum(curve.dense_cost for curve in curves)
    menus, start = _beginning(curves, smallest, multiple, floor)
    steps = _steepest_first(menus, start)
    least, taken = _spend(menus, start, steps, smallest * dense + _SLACK)
    # Modules that stopped at the smallest keep, because their next step exceeded the budget, continue from there.
    done = set(taken)
    steps = [step for step in steps if step not in done]
    most, taken = _spend(menus, least, steps, keep * dense + _SLACK)
    if not taken:
        raise CompressionError(f"between keep {smallest} and {keep} no module has another rank: nothing is elastic")
    before_dense = {m: menus[m][a].rank for m, a, b in taken if menus[m][b].rank is None}
    modules = []
    for m, (curve, menu) in enumerate(zip(curves, menus, strict=True)):
        top = menu[most[m]].rank
        rank = before_dense.get(m) if top is None else top
        modules.append(
            PlannedModule(curve.name, curve.out_features, curve.in_features, menu[least[m]].rank, rank, top is None)
        )
    return ElasticPlan((smallest, keep), tuple(modules), multiple, tuple(m for m, _, _ in taken))


def check_smallest(curves: Sequence[Curve], smallest: float, *, multiple: int = 16, floor: float = 0.25) -> None:
    """Raises CompressionError when the smallest ranks exceed `smallest`. Needs no errors in the curves. Arguments as in
    `plan_elastic`."""
    _beginning(curves, smallest, multiple, floor)


def elastic_forms(
    planned: PlannedModule,
    step: int,
    weight: torch.Tensor,
    factors: Factors | None,
    input_gram: torch.Tensor,
    store: str,
) -> list[StoredModule]:
    """The planned forms of a module, rounded: first the one that `quantization_config` lists, then the second form, if any.
    Arguments as in `add_elastic_module`. Raises CompressionError when a lowrank form is planned without factors."""
    forms = [dense_module(weight, store, input_gram)] if planned.dense else []
    if planned.rank is not None:
        if factors is None:
            raise CompressionError(f"{planned.name} is planned at rank {planned.rank}, but there are no factors of it")
        forms.append(nested_module(weight, factors, store, input_gram, planned.ranks(step)))
    return forms


def add_forms(
    writer: CheckpointWriter, name: str, forms: Sequence[StoredModule], bias: torch.Tensor | None = None
) -> None:
    """Write a module's forms. The first is the one that `quantization_config` lists. bias: [out]; None: none."""
    writer.add_module(name, forms[0].spec, forms[0].cores, bias=bias)
    for second in forms[1:]:
        writer.add_second_form(name, second.spec, second.cores)


def add_elastic_module(
    writer: CheckpointWriter,
    planned: PlannedModule,
    step: int,
    weight: torch.Tensor,
    factors: Factors | None,
    input_gram: torch.Tensor,
    store: str,
    bias: torch.Tensor | None = None,
) -> list[StoredModule]:
    """Round a module to its planned forms and write them. Returns the forms, see `elastic_forms`.

    step: of the plan. weight: [out, in], any float dtype. factors: of `weight` under `input_gram`; None: only for a module
    that is dense at every keep. input_gram: [in, in], the damped mean of x x^T. store: of the dense form and of both cores.
    bias: [out]; None: none.
    """
    forms = elastic_forms(planned, step, weight, factors, input_gram, store)
    add_forms(writer, planned.name, forms, bias)
    return forms


def cut(src: str | Path, dst: str | Path, keep: float, *, overwrite: bool = False) -> Path:
    """Write what an elastic checkpoint opens at `keep` as an ordinary checkpoint, bitwise the same. Returns `dst`.

    Raises KeepError, CheckpointError, CheckpointWriteError.
    """
    with (
        Checkpoint.open(src, keep=keep) as checkpoint,
        CheckpointWriter(dst, config=checkpoint.config, source_dir=src, overwrite=overwrite) as writer,
    ):
        owned: set[str] = set()
        for name, spec in checkpoint.modules.items():
            module = checkpoint.module(name)
            writer.add_module(name, spec, module.cores, pivot=module.pivot, bias=module.bias)
            owned.update(checkpoint.module_tensors(name))
            checkpoint.release(checkpoint.module_tensors(name))
        for name in checkpoint.tensors():
            if name not in owned:
                writer.add_tensor(name, checkpoint.tensor(name))
                checkpoint.release(name)
        return writer.finish(checkpoint.report())


def _beginning(
    curves: Sequence[Curve], smallest: float, multiple: int, floor: float
) -> tuple[list[list[Option]], list[int]]:
    """Every module's menu, and the index in it from which the allocation starts."""
    menus = [options(curve, "lowrank", multiple) for curve in curves]
    share = floor * smallest
    start = [last_within(menu, share * curve.dense_cost) for menu, curve in zip(menus, curves, strict=True)]
    spent = sum(menu[k].cost for menu, k in zip(menus, start, strict=True))
    dense = sum(curve.dense_cost for curve in curves)
    if spent > smallest * dense + _SLACK:
        raise CompressionError(
            f"smallest keep {smallest} is too small: with ranks in multiples of {multiple} the modules need at least "
            f"{spent / dense:.3f} of their parameters; raise it or lower the multiple"
        )
    return menus, start


def _steepest_first(menus: Sequence[Sequence[Option]], start: Sequence[int]) -> list[_Step]:
    """All steps on the lower convex hulls of error over parameters, steepest first."""
    found = []
    for m, menu in enumerate(menus):
        for a, b in pairwise(hull(menu, start[m])):
            fall = slope(menu, a, b)
            # Between two hull vertices, ranks grow one by one. A step to dense skips the ranks in between.
            way = [a, b] if menu[b].rank is None else range(a, b + 1)
            found += [(-fall, m, c, d) for c, d in pairwise(way)]
    return [(m, a, b) for _, m, a, b in sorted(found)]


def _spend(
    menus: Sequence[Sequence[Option]], start: Sequence[int], steps: Sequence[_Step], budget: float
) -> tuple[list[int], list[_Step]]:
    """Take steps in order within `budget`. A module whose step does not fit takes no further steps, as in `ElasticTable.at`.
    Returns the menu indices reached and the steps taken."""
    at, full, taken = list(start), set[int](), []
    left = budget - sum(menu[k].cost for menu, k in zip(menus, at, strict=True))
    for m, a, b in steps:
        price = menus[m][b].cost - menus[m][a].cost
        if m not in full and price <= left:
            left, at[m] = left - price, b
            taken.append((m, a, b))
        else:
            full.add(m)
    return at, taken
