"""One checkpoint that opens at any `keep` of a range: which ranks its modules have at each.

A `lowrank` module of rank r holds every smaller one: the first s rows of core_0 and columns of core_1. An elastic
checkpoint adds a table to `quantization_config`: in which order the modules grow from their smallest ranks to what the
checkpoint holds. A budget of parameters is spent along that order, steepest fall of the error first, which is optimal at
every budget when the errors are convex in the parameters (Shoham and Gersho, "Efficient bit allocation for an arbitrary
set of quantizers", 1988).

At r (in + out) parameters a lowrank module soon costs more than a dense one, so a module may have two forms: its dense
weight and, beside it, lowrank cores. It is lowrank up to some keep and dense above: a step of the order like any other.

docs/format.md has the specification. No torch here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from cai_runtime.errors import CheckpointError, InvalidConfigError, KeepError, OptionTypeError, UnknownVersionError
from cai_runtime.scalars import as_integer, as_number, shown
from cai_runtime.slim.spec import STORES, ModuleSpec

TABLE_VERSION = 1
_SLACK = 1e-6  # parameters: a budget that was computed as a share of the dense ones may lie a hair too low
_RUN = re.compile(r"([0-9]{1,9})(?:\*([1-9][0-9]{0,8}))?")
_KEYS = {"version", "keep", "step", "modules", "order", "quality"}
_FIXED, _LOWRANK, _TWO_FORMS = {"name"}, {"name", "least"}, {"name", "least", "rank", "store"}


@dataclass(frozen=True)
class ElasticModule:
    """A module that `keep` is a share of.

    least: its rank at the smallest keep; None: it is the same at every keep, whatever its kind. second: the lowrank form of
    a module that `quantization_config` lists as dense: its tensors core_0 and core_1 are there beside the weight.
    """

    name: str
    least: int | None = None
    second: ModuleSpec | None = None

    def ladder(self, top: ModuleSpec, step: int) -> list[ModuleSpec]:
        """Its forms from the smallest keep to the largest, `top`: rank least, least + step, ... and the whole lowrank
        form (a last step may be shorter); then dense, when it has both forms."""
        if self.least is None:
            return [top]
        form = self.second or top
        assert isinstance(form.rank, int)
        ranks = [*range(self.least, form.rank, step), form.rank]
        return [*(replace(form, rank=rank) for rank in ranks), *([top] if self.second else [])]


@dataclass(frozen=True)
class ElasticView:
    """A checkpoint at one keep. keep: share of the table's modules' dense parameters that is in use; modules: the spec in
    use of every module of the table."""

    keep: float
    modules: dict[str, ModuleSpec]


@dataclass(frozen=True)
class ElasticTable:
    """How a checkpoint's modules grow.

    Attributes:
        keep: the smallest and the largest keep that may be asked for.
        modules: those that `keep` counts. Others, an embedding say, are in no table and always whole.
        step: ranks of one step.
        order: for each step from the smallest keep to the largest, the index in `modules` of the one that grows.
        quality: what the compressor measured, by rising keep: {"keep": 0.8, "perplexity": 21.6, ...}. It chooses nothing.
    """

    keep: tuple[float, float]
    modules: tuple[ElasticModule, ...]
    step: int
    order: tuple[int, ...]
    quality: tuple[dict[str, float], ...] = field(default=())

    def check(self, specs: Mapping[str, ModuleSpec]) -> None:
        """Whether the table fits the modules that `quantization_config` lists. Raises InvalidConfigError."""
        self._check_modules(specs)
        self._check_keep(specs)
        self._check_order([len(ladder) - 1 for ladder in self._ladders(specs)], Counter(self.order))
        self._check_quality()

    def reached(self, specs: Mapping[str, ModuleSpec]) -> tuple[float, float]:
        """What share is in use at the ends of `keep`: at most what those say. specs: as in `check`."""
        ladders, dense = self._ladders(specs), self._dense_parameters(specs)
        low, high = (sum(ladder[end].parameters for ladder in ladders) / dense for end in (0, -1))
        return low, high

    def at(self, specs: Mapping[str, ModuleSpec], keep: float | None = None) -> ElasticView:
        """The modules at `keep`, which is a bound from above; None: the largest. specs: as in `check`.

        Starting from the smallest ranks, the order's steps are taken while they fit. A step that does not fit ends the
        growth of its module; what is left goes to smaller steps of others.

        Raises:
            KeepError: this checkpoint does not go as low or as high.
            TypeError: `keep` is no number.
        """
        ladders, dense = self._ladders(specs), self._dense_parameters(specs)
        reached = [len(ladder) - 1 for ladder in ladders] if keep is None else [0] * len(ladders)
        if keep is not None:
            low, high = self.keep
            if not low <= checked_keep(keep) <= high:
                raise KeepError(f"keep {keep:g} is out of range: this elastic checkpoint opens at {low:g} to {high:g}")
            left = keep * dense + _SLACK - sum(ladder[0].parameters for ladder in ladders)
            full = set[int]()
            prices = [[b.parameters - a.parameters for a, b in pairwise(ladder)] for ladder in ladders]
            for module in self.order:
                if module in full:
                    continue
                price = prices[module][reached[module]]
                if price <= left:
                    left -= price
                    reached[module] += 1
                else:
                    full.add(module)
        used = {m.name: ladder[k] for m, ladder, k in zip(self.modules, ladders, reached, strict=True)}
        return ElasticView(sum(spec.parameters for spec in used.values()) / dense, used)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": TABLE_VERSION,
            "keep": list(self.keep),
            "step": self.step,
            "modules": [_entry(module) for module in self.modules],
            "order": _write_runs(self.order),
            "quality": list(self.quality),
        }

    @classmethod
    def from_json(cls, raw: object, specs: Mapping[str, ModuleSpec], file: str | Path | None = None) -> ElasticTable:
        """Parse and check the table, strictly. specs: the modules that `quantization_config` lists.

        Raises:
            UnknownVersionError: `version` is not `TABLE_VERSION`.
            InvalidConfigError: anything else that is not as `to_json` writes it, or contradicts `specs`.
            UnknownStoreError: of a lowrank form.
        """
        try:
            table = _parsed(raw, specs)
            table.check(specs)
        except CheckpointError as e:
            raise type(e)(f"quantization_config: elastic: {e}", file=file) from None
        return table

    def _ladders(self, specs: Mapping[str, ModuleSpec]) -> list[list[ModuleSpec]]:
        return [module.ladder(specs[module.name], self.step) for module in self.modules]

    def _dense_parameters(self, specs: Mapping[str, ModuleSpec]) -> int:
        return sum(specs[module.name].dense_parameters for module in self.modules)

    def _check_modules(self, specs: Mapping[str, ModuleSpec]) -> None:
        if not _is_positive(self.step):
            raise InvalidConfigError(f"'step' must be a positive integer, is {self.step!r}")
        twice = [name for name, count in Counter(module.name for module in self.modules).items() if count > 1]
        if twice:
            raise InvalidConfigError(f"module {twice[0]!r} is listed twice")
        if not any(module.least is not None for module in self.modules):
            raise InvalidConfigError("no module has a 'least' rank, so nothing can change")
        for module in self.modules:
            problem = _problem(module, specs.get(module.name), self.step)
            if problem is not None:
                raise InvalidConfigError(f"module {module.name!r}: {problem}")

    def _check_keep(self, specs: Mapping[str, ModuleSpec]) -> None:
        low, high = self.keep
        if not 0 < low < high <= 1:
            raise InvalidConfigError(f"'keep' must be two rising numbers in (0, 1], is {[low, high]}")
        for end, reached in zip(self.keep, self.reached(specs), strict=True):
            if reached > end + 1e-9:
                raise InvalidConfigError(f"'keep' says {end:g} where the modules need {reached:.6f}")

    def _check_order(self, wanted: Sequence[int], found: Mapping[int, int]) -> None:
        for index, count in found.items():
            if not 0 <= index < len(wanted):
                raise InvalidConfigError(f"'order' names module {index}, there are {len(wanted)}")
            if count > wanted[index]:
                raise InvalidConfigError(
                    f"'order' has {count} steps of module {self.modules[index].name!r}, which has {wanted[index]}"
                )
        for index, count in enumerate(wanted):
            if found.get(index, 0) != count:
                raise InvalidConfigError(
                    f"'order' has {found.get(index, 0)} steps of module {self.modules[index].name!r}, which has {count}"
                )

    def _check_quality(self) -> None:
        for entry in self.quality:
            numbers = isinstance(entry, dict) and all(as_number(value) is not None for value in entry.values())
            if not numbers or not 0 < entry.get("keep", 0) <= 1:
                raise InvalidConfigError(f"'quality' must list numbers by name, 'keep' among them, has {entry!r}")


def checked_keep(keep: object) -> float:
    """`keep` as it can be asked of any checkpoint: a number in (0, 1]. Raises OptionTypeError, KeepError."""
    if not isinstance(keep, (int, float)) or isinstance(keep, bool):
        raise OptionTypeError(f"keep must be a number in (0, 1], got {shown(keep)}")
    if not 0 < keep <= 1:  # NaN fails both
        raise KeepError(f"keep must be in (0, 1], is {shown(keep)}")
    return float(keep)


def _problem(module: ElasticModule, top: ModuleSpec | None, step: int) -> str | None:
    """What is wrong with a module of the table, or None. top: its entry in `quantization_config`."""
    if top is None:
        return "is in no entry of 'modules'"
    if module.least is None:
        return None
    form = module.second or top
    if form.kind != "lowrank" or (module.second is not None and top.kind != "dense"):
        return f"only a lowrank module, or a dense one with a lowrank form, has a 'least' rank; it is {top.kind}"
    assert isinstance(form.rank, int)
    if not _is_positive(module.least) or module.least > form.rank:
        return f"'least' must be a rank from 1 to {form.rank}, is {module.least!r}"
    # Two columns share a byte: half of one can't be cut off.
    odd = [rank for rank in (module.least, module.least + step) if rank < form.rank and rank % 2]
    if STORES[form.store[1]].bits == 4 and odd:
        return f"rank {odd[0]} is odd, but its core_1 is stored as {form.store[1]}"
    sizes = [spec.parameters for spec in module.ladder(top, step)]
    if any(b <= a for a, b in pairwise(sizes)):
        return f"rank {form.rank} costs {sizes[-2]} parameters, no less than the dense form that follows it"
    return None


def _entry(module: ElasticModule) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": module.name}
    if module.least is not None:
        entry["least"] = module.least
    if module.second is not None:
        entry |= {"rank": module.second.rank, "store": list(module.second.store)}
    return entry


def _parsed(raw: object, specs: Mapping[str, ModuleSpec]) -> ElasticTable:
    if not isinstance(raw, dict):
        raise InvalidConfigError(f"must be an object, is {type(raw).__name__}")
    version = raw.get("version")
    if version != TABLE_VERSION or isinstance(version, bool):
        raise UnknownVersionError(f"version {version!r} is unknown; this version of cai_runtime reads {TABLE_VERSION}")
    if set(raw) != _KEYS:
        raise InvalidConfigError(f"must have the keys {sorted(_KEYS)}, has {sorted(raw)}")
    if not isinstance(raw["modules"], list) or not isinstance(raw["quality"], list):
        raise InvalidConfigError("'modules' and 'quality' must be lists")
    keep = raw["keep"]
    if not isinstance(keep, list) or len(keep) != 2 or None in map(as_number, keep):
        raise InvalidConfigError(f"'keep' must be two numbers, is {keep!r}")
    modules = tuple(_parsed_module(entry, specs) for entry in raw["modules"])
    if not _is_positive(raw["step"]):
        raise InvalidConfigError(f"'step' must be a positive integer, is {raw['step']!r}")
    table = ElasticTable((keep[0], keep[1]), modules, raw["step"], (), tuple(raw["quality"]))
    table._check_modules(specs)
    # Counted before they are written out: a damaged run length must not fill the memory.
    runs = list(_read_runs(raw["order"]))
    counts: Counter[int] = Counter()
    for index, count in runs:
        counts[index] += count
    table._check_order([len(ladder) - 1 for ladder in table._ladders(specs)], counts)
    return replace(table, order=tuple(index for index, count in runs for _ in range(count)))


def _parsed_module(entry: object, specs: Mapping[str, ModuleSpec]) -> ElasticModule:
    if not isinstance(entry, dict) or set(entry) not in (_FIXED, _LOWRANK, _TWO_FORMS):
        raise InvalidConfigError(
            f"a module must be an object with 'name', 'least' if it grows, 'rank' and 'store' if it has two forms; "
            f"found {entry!r}"
        )
    name = entry["name"]
    if not isinstance(name, str) or name not in specs:
        raise InvalidConfigError(f"module {name!r} is in no entry of 'modules'")
    if not _is_positive(entry.get("least", 1)):
        raise InvalidConfigError(f"module {name!r}: 'least' must be a positive integer, is {entry['least']!r}")
    second = None
    if "rank" in entry:
        top = specs[name].to_json()
        second = ModuleSpec.from_json(
            name, {"kind": "lowrank", "rank": entry["rank"], "store": entry["store"], "shape": top["shape"]}
        )
    return ElasticModule(name, entry.get("least"), second)


def _write_runs(order: Sequence[int]) -> str:
    """Indices as words, a repeated one as index*times: JSON files put each number of a list on a line of its own."""
    runs = [(index, len(list(same))) for index, same in groupby(order)]
    return " ".join(f"{index}*{count}" if count > 1 else f"{index}" for index, count in runs)


def _read_runs(text: object) -> Iterator[tuple[int, int]]:
    if not isinstance(text, str):
        raise InvalidConfigError(f"'order' must be a text, is {type(text).__name__}")
    for word in text.split(" ") if text else ():
        run = _RUN.fullmatch(word)
        if run is None:
            raise InvalidConfigError(f"'order' must hold words such as 17 or 17*3, has {word[:20]!r}")
        yield int(run[1]), int(run[2] or 1)


def _is_positive(value: object) -> bool:
    return (as_integer(value) or 0) >= 1
