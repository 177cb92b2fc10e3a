"""The linears and attention heads of the catalogue's families (`shapes.json`), for benchmarks. Light to import.

One entry of `groups` is what runs as one call: projections that share their input. `in` and `out` are features, `count`
how often the model has the group and `active` through how many of them a token goes (fewer than `count` where experts are
chosen). `embedding` [vocabulary, hidden] and `tied` complete the parameters; `source` says where the numbers are from and
`unverified` which of them nothing could be held against.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cai_runtime.errors import BenchmarkError


@dataclass(frozen=True)
class LinearGroup:
    """Linears that run as one call: from `in_features` to each of `out_features`."""

    name: str
    in_features: int
    out_features: tuple[int, ...]
    count: int = 1
    active: int = 1

    @property
    def parameters(self) -> int:
        """Of one such group, stored dense."""
        return self.in_features * sum(self.out_features)

    @property
    def shape(self) -> str:
        """As `parse_shape` reads it: "4096x4096+1024+1024"."""
        return f"{self.in_features}x{'+'.join(map(str, self.out_features))}"


@dataclass(frozen=True)
class AttentionHeads:
    """Heads of a layer; `window`: of its sliding window layers, None where it has none."""

    query: int
    kv: int
    dim: int
    window: int | None = None


@dataclass(frozen=True)
class ModelShapes:
    """One model. `heads` is None where attention is not over keys and values per head (latent attention)."""

    name: str
    groups: tuple[LinearGroup, ...]
    heads: AttentionHeads | None
    embedding: tuple[int, int]
    tied: bool
    source: str
    unverified: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Of all linears and the embedding, stored dense."""
        table = 0 if self.tied else self.embedding[0] * self.embedding[1]
        return table + sum(group.parameters * group.count for group in self.groups)


@cache
def all_shapes() -> dict[str, ModelShapes]:
    """Every model of `shapes.json` by its name."""
    listing = json.loads(Path(__file__).with_name("shapes.json").read_text("utf-8"))
    return {name: _model(name, entry) for name, entry in listing.items()}


def _model(name: str, entry: dict) -> ModelShapes:
    groups = tuple(
        LinearGroup(g["name"], g["in"], tuple(g["out"]), g["count"], g.get("active", g["count"]))
        for g in entry["groups"]
    )
    heads = entry["heads"]
    return ModelShapes(
        name,
        groups,
        None if heads is None else AttentionHeads(**heads),
        (entry["embedding"][0], entry["embedding"][1]),
        entry["tied"],
        entry["source"],
        tuple(entry.get("unverified", ())),
    )


def model_shapes(name: str) -> ModelShapes:
    """The shapes of a model by name; "llama-3-1-8b", as the catalogue writes it, is "llama-3.1-8b".

    Raises BenchmarkError for a name that is not there; the message lists those that are.
    """
    known = {key.replace(".", "-"): shapes for key, shapes in all_shapes().items()}
    try:
        return known[name.replace(".", "-")]
    except KeyError:
        raise BenchmarkError(f"no shapes of {name!r}; there are: {', '.join(all_shapes())}") from None


def parse_shape(text: str) -> LinearGroup:
    """ "4096x14336" (in x out), or "4096x4096+1024+1024" for several linears that share their input.

    Raises BenchmarkError for anything else.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*(?:\+[1-9]\d*)*)", text)
    if found is None:
        raise BenchmarkError(f"{text!r} is no shape; write in x out, such as 4096x14336, or 4096x4096+1024+1024")
    return LinearGroup(text, int(found[1]), tuple(map(int, found[2].split("+"))))


def distinct(groups: tuple[LinearGroup, ...]) -> list[LinearGroup]:
    """The groups with those of one shape merged: names joined, counts added."""
    merged: dict[str, LinearGroup] = {}
    for group in groups:
        same = merged.get(group.shape)
        merged[group.shape] = group if same is None else LinearGroup(
            f"{same.name}, {group.name}", group.in_features, group.out_features, same.count + group.count,
            same.active + group.active,
        )  # fmt: skip
    return list(merged.values())
