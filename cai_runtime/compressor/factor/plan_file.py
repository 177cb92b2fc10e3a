"""A plan file: the user gives kind, rank and store of every layer, instead of a budget.

    {
      "modules": {
        "*.down_proj": {"kind": "interpolative", "rank": 320, "store": "int8"},
        "model.layers.0.*": {"kind": "dense", "store": "int4-g64"},
        "*": {"kind": "mpo", "rank": 128, "out_dims": [24, 24], "in_dims": [24, 24]}
      }
    }

Names are shell patterns; the first match applies. `store` (default int8) is the store of all cores. `rank` of an mpo is its
largest bond dimension, or, with out_dims and in_dims, the list of all. A slim_report.json is a plan file, too: it repeats
the choices of its checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cai_runtime.compressor.factor.choice import Choice
from cai_runtime.compressor.factor.mpo import Reshape, reshapes
from cai_runtime.errors import CheckpointError, CompressionError
from cai_runtime.slim.spec import KINDS, STORES, canonical_store

Entry = dict[str, Any]
PlanSource = str | Path | Mapping[str, Any]  # a file, or the object under its "modules"
_KEYS = {
    "dense": {"kind", "store"},
    "lowrank": {"kind", "store", "rank"},
    "interpolative": {"kind", "store", "rank"},
    "mpo": {"kind", "store", "rank", "out_dims", "in_dims"},
}
DEFAULT_STORE = "int8"


def plan_entries(plan: PlanSource) -> dict[str, Entry]:
    """The entries of a plan by pattern, in order. Checks all that does not need the shapes of the layers.

    Raises CompressionError, which names the file and the entry.
    """
    if isinstance(plan, Mapping):
        modules: Any = plan
        where = "the plan"
    elif not isinstance(plan, str | Path):
        raise CompressionError(f"plan must be a file or an object of patterns, is {plan!r}")
    else:
        where = f"the plan file {plan}"
        modules = _modules_in(plan, where)
    if not isinstance(modules, Mapping) or not modules:
        raise CompressionError(f'{where} has no "modules": an object of patterns and what their layers become')
    return {str(pattern): _checked(entry, f"{where}: {pattern!r}") for pattern, entry in modules.items()}


def _modules_in(path: str | Path, where: str) -> Any:
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise CompressionError(f"{where} can't be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise CompressionError(f"{where} is not JSON: {e}") from e
    modules = document.get("modules") if isinstance(document, dict) else None
    if not isinstance(modules, list):
        return modules
    # Layers that the reported compression had to leave dense stay dense.
    read = document.get("read", [])
    kept = {name: {"kind": "dense"} for name in read if isinstance(name, str)} if isinstance(read, list) else {}
    return {**kept, **_of_report(modules, where)}


def _of_report(modules: list[Any], where: str) -> dict[str, Entry]:
    """The modules of a slim_report.json as entries by exact name. Layer names contain no pattern characters."""
    found = {}
    for module in modules:
        if not isinstance(module, dict) or not isinstance(module.get("name"), str):
            raise CompressionError(f"{where}: a report's modules have names")
        stores = module.get("store")
        entry = {"kind": module.get("kind"), "rank": module.get("rank"), "store": stores}
        if isinstance(stores, list) and len(set(stores)) == 1:
            entry["store"] = stores[0]
        if entry["rank"] is None:
            del entry["rank"]
        if entry["kind"] == "mpo":
            entry |= {key: module.get(key) for key in ("out_dims", "in_dims")}
        found[module["name"]] = entry
    return found


def _checked(entry: Any, where: str) -> Entry:
    def need(ok: bool, message: str) -> None:
        if not ok:
            raise CompressionError(f"{where}: {message}")

    need(isinstance(entry, Mapping), f"must be an object, is {entry!r}")
    kind = entry.get("kind")
    need(isinstance(kind, str) and kind in KINDS, f"kind must be one of {', '.join(KINDS)}, is {kind!r}")
    unknown = sorted(set(entry) - _KEYS[kind])
    need(
        not unknown,
        f"kind {kind} has no {', '.join(map(repr, unknown))}; it has {', '.join(sorted(_KEYS[kind]))}",
    )
    store = entry.get("store", DEFAULT_STORE)
    need(
        isinstance(store, str) and canonical_store(store) in STORES,
        f"store must be one of {', '.join(STORES)}, is {store!r}",
    )
    found: Entry = {"kind": kind, "store": canonical_store(store)}
    if kind == "dense":
        return found
    for key in ("out_dims", "in_dims"):
        if (dims := entry.get(key)) is not None:
            need(_are_sizes(dims) and len(dims) > 0, f"{key} must be a list of positive integers, is {dims!r}")
            found[key] = list(dims)
    need(("out_dims" in found) == ("in_dims" in found), "out_dims and in_dims are given together")
    sites = len(found.get("out_dims", ()))
    need(
        sites == len(found.get("in_dims", ())),
        f"out_dims {found.get('out_dims')} and in_dims {found.get('in_dims')} must be of the same length, a site each",
    )
    rank = entry.get("rank")
    if kind == "mpo" and _are_sizes(rank) and (rank or sites):
        # A report lists all inner bond dimensions. The largest determines the others; a single site has none.
        need(
            not sites or len(rank) == sites - 1,
            f"rank {list(rank)} must list the {sites - 1} bond dimensions between {sites} sites, or be the widest of them",
        )
        rank = max(rank, default=1)
    need(_is_size(rank), f"rank must be a positive integer, is {rank!r}")
    found["rank"] = rank
    return found


def _are_sizes(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_size, value))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def planned(entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Choice]:
    """The choice for every layer, by name.

    entries: from `plan_entries`. shapes: (out_features, in_features) of every layer that can be compressed.

    Raises CompressionError when a layer matches no pattern, a pattern matches no layer, or a rank does not fit its layer.
    """
    found: dict[str, Choice] = {}
    used = set()
    for name, (out, inp) in shapes.items():
        pattern = next((pattern for pattern in entries if fnmatchcase(name, pattern)), None)
        if pattern is None:
            raise CompressionError(f'the plan has nothing for {name}: give it an entry, or add "*" for all others')
        used.add(pattern)
        found[name] = _choice(entries[pattern], out, inp, f"the plan's {pattern!r} does not fit {name}")
    unused = [pattern for pattern in entries if pattern not in used]
    if unused:
        raise CompressionError(
            f"the plan's {', '.join(map(repr, unused))} fits no layer; the layers are {', '.join(list(shapes)[:8])} .."
        )
    return found


def _choice(entry: Entry, out: int, inp: int, where: str) -> Choice:
    kind, store = entry["kind"], entry["store"]
    if kind == "dense":
        return Choice("dense", None, store)
    rank, reshape = entry["rank"], None
    if kind == "mpo":
        reshape = (
            Reshape(tuple(entry["out_dims"]), tuple(entry["in_dims"])) if "out_dims" in entry else reshapes(out, inp)[0]
        )
        most = reshape.widest
    else:
        most = min(out, inp)
    choice = Choice(kind, rank, store, reshape)
    if rank > most:
        raise CompressionError(f"{where}: rank {rank} exceeds {most}, the largest of [{out}, {inp}]")
    try:
        spec = choice.spec(out, inp)
    except CheckpointError as e:
        raise CompressionError(f"{where}: {e}") from None
    if (spec.out_features, spec.in_features) != (out, inp):
        raise CompressionError(
            f"{where}: out_dims and in_dims multiply to {[spec.out_features, spec.in_features]}, not to {[out, inp]}"
        )
    return choice
