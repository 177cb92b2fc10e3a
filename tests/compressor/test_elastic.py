"""The plan of an elastic checkpoint, cores that are good at every rank, and cutting one size out."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from cai_runtime.compressor.elastic.growth import ElasticPlan, PlannedModule, add_elastic_module, cut, plan_elastic
from cai_runtime.compressor.factor.allocate import Curve
from cai_runtime.compressor.factor.cores import factorized_module
from cai_runtime.compressor.factor.decompose import Factors, damped, factorize
from cai_runtime.compressor.factor.elastic_rounding import nested_module
from cai_runtime.errors import CompressionError
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import ModuleSpec
from cai_runtime.slim.writer import CheckpointWriter


def curve(name: str, out: int, inp: int, decay: float, weight: float = 1.0) -> Curve:
    energy = [decay**k for k in range(min(out, inp))]
    return Curve(name, out, inp, [sum(energy[r:]) for r in range(len(energy) + 1)], weight)


CURVES = [curve("a", 24, 16, 0.6), curve("b", 12, 12, 0.9, 3.0), curve("c", 16, 32, 0.8, 0.2), curve("d", 3, 40, 0.5)]
DENSE = sum(c.dense_cost for c in CURVES)


def specs(plan: ElasticPlan) -> dict[str, ModuleSpec]:
    """What `quantization_config` would list."""
    return {
        m.name: ModuleSpec("dense", m.out_features, m.in_features, None, ("int8",))
        if m.dense
        else ModuleSpec("lowrank", m.out_features, m.in_features, m.rank, ("int8", "int8"))
        for m in plan.modules
    }


def error_at(plan: ElasticPlan, keep: float) -> float:
    listed = specs(plan)
    view = plan.table({m.name: ("int8", "int8") for m in plan.modules}).at(listed, keep)
    ranks = {name: spec.rank for name, spec in view.modules.items()}
    return sum(0.0 if ranks[c.name] is None else c.weight * c.errors[ranks[c.name]] for c in CURVES)


def best_error(keep: float, multiple: int) -> float:
    """By trying every combination."""
    menus = []
    for c in CURVES:
        dear = c.out_features + c.in_features
        ranks = [r for r in range(multiple, min(c.out_features, c.in_features), multiple) if r * dear < c.dense_cost]
        menus.append([*((r * dear, c.weight * c.errors[r]) for r in ranks), (c.dense_cost, 0.0)])
    budget = keep * DENSE + 1e-6
    return min(sum(e for _, e in way) for way in itertools.product(*menus) if sum(p for p, _ in way) <= budget)


@pytest.mark.parametrize("top", [0.8, 1.0])
def test_every_keep_is_near_the_best_there_is(top: float):
    plan = plan_elastic(CURVES, top, smallest=0.35, multiple=1, floor=0.0)
    table = plan.table({m.name: ("int8", "int8") for m in plan.modules})
    table.check(specs(plan))
    low, high = table.reached(specs(plan))
    longest = max(c.out_features + c.in_features for c in CURVES) / DENSE  # of a lowrank module's steps
    assert table.keep == (0.35, top) and 0.35 - longest < low <= 0.35 and top - longest < high <= top
    assert (high == 1) == (top == 1)
    ratios = []
    for percent in range(35, round(100 * top)):
        best = best_error(percent / 100, 1)
        ratios.append(error_at(plan, percent / 100) / best)
    # What steps reach exactly is optimal. Between, a step that did not fit is missing, which is much with four modules.
    assert min(ratios) > 1 - 1e-9 and sum(ratios) / len(ratios) < 1.08
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) > len(ratios) / 2


def test_modules_have_the_forms_they_need():
    plan = plan_elastic(CURVES, 1.0, smallest=0.35, multiple=2)
    assert all(m.dense for m in plan.modules)
    two = [m for m in plan.modules if m.rank is not None]
    assert two and plan.parameters == DENSE + sum(m.rank * (m.out_features + m.in_features) for m in two)
    assert all(m.ranks(2)[0] == m.least and m.ranks(2)[-1] == m.rank for m in two)
    d = plan.modules[3]  # three outputs: rank 2 is as dear as a dense module nearly, and is left behind first
    assert d.rank is None or d.rank == 2
    part = plan_elastic(CURVES, 0.6, smallest=0.35, multiple=2)
    assert any(not m.dense for m in part.modules) and part.parameters < plan.parameters


def test_a_floor_is_kept_at_the_smallest_keep():
    flat = [curve("a", 64, 64, 0.99, 100.0), curve("b", 64, 64, 0.99, 1e-6)]
    without, with_floor = (plan_elastic(flat, 0.9, smallest=0.5, multiple=1, floor=f).modules[1] for f in (0.0, 0.5))
    assert without.least == 1 and with_floor.least == 8  # a quarter of 64 * 64 / 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.3, "smallest": 0.3}, "smallest keep < keep"),
        ({"keep": 1.2}, "keep <= 1"),
        ({"keep": 0.5, "smallest": 0.01, "multiple": 8}, "too small"),
        ({"keep": 0.9, "smallest": 0.8999, "multiple": 1}, "nothing is elastic"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, float], message: str):
    with pytest.raises(CompressionError, match=message):
        plan_elastic(CURVES, **options)


def layer(out: int, inp: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Factors]:
    """A weight whose inputs are correlated and have a few strong directions, as a model's have."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inp, inp, generator=g) * torch.logspace(1, -1, inp)
    x = torch.randn(4 * inp, inp, generator=g) @ mixing
    gram = damped((x.mT @ x).double() / x.shape[0])
    scale = torch.logspace(0, -1.5, min(out, inp))
    left, right = torch.randn(out, len(scale), generator=g), torch.randn(len(scale), inp, generator=g)
    weight = (left * scale) @ right / inp
    return weight, gram, factorize(weight, gram)


def error(weight: torch.Tensor, found: torch.Tensor, gram: torch.Tensor) -> float:
    d = (weight - found).double()
    return float(((d @ gram) * d).sum())


def cut_at(cores: list[torch.Tensor], rank: int) -> torch.Tensor:
    return cores[1][:, :rank] @ cores[0][:rank]


RANKS = range(8, 65, 8)


@pytest.mark.parametrize(("store", "slack"), [("fp32", 1e-4), ("bf16", 2e-3), ("int8", 2e-2), ("int4-g32", 0.2)])
def test_nested_cores_are_near_separate_ones_at_every_rank(store: str, slack: float):
    weight, gram, factors = layer(160, 128)
    stored = nested_module(weight, factors, store, gram, list(RANKS))
    assert stored.spec == ModuleSpec("lowrank", 160, 128, 64, (store, store))
    cores = [core.values() for core in stored.cores]
    for rank in RANKS:
        separate = factorized_module("lowrank", weight, factors, rank, store, gram).dense()
        assert error(weight, cut_at(cores, rank), gram) < (1 + slack) * error(weight, separate, gram)


def test_rounding_for_every_rank_is_better_than_cutting_what_was_rounded_for_one():
    weight, gram, factors = layer(160, 128)
    nested = [c.values() for c in nested_module(weight, factors, "int4-g32", gram, list(RANKS)).cores]
    whole = [c.values() for c in factorized_module("lowrank", weight, factors, 64, "int4-g32", gram).cores]
    errors = [[error(weight, cut_at(cores, rank), gram) for rank in list(RANKS)[:-1]] for cores in (nested, whole)]
    assert all(a < b for a, b in zip(*errors, strict=True))


def test_a_weight_of_zeros_and_a_full_rank():
    gram = torch.eye(6, dtype=torch.float64)
    zero = torch.zeros(5, 6)
    stored = nested_module(zero, factorize(zero, gram), "int8", gram, [1, 3, 5])
    assert not stored.dense().any()
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    stored = nested_module(weight, factorize(weight, gram), "fp32", gram, [1, 3, 5])
    torch.testing.assert_close(stored.dense(), weight, rtol=1e-4, atol=1e-5)


def write_elastic(path: Path) -> Path:
    layers = {f"layers.{k}": layer(48, 40, k) for k in range(3)}
    curves = [Curve(name, 48, 40, factors.errors()) for name, (_, _, factors) in layers.items()]
    plan = plan_elastic(curves, 0.95, smallest=0.3, multiple=2)
    with CheckpointWriter(path, config={"model_type": "llama"}) as writer:
        stores = {}
        for m in plan.modules:
            weight, gram, factors = layers[m.name]
            stores[m.name] = add_elastic_module(writer, m, plan.step, weight, factors, gram, "int8")[-1].spec.store
        writer.add_tensor("norm.weight", torch.ones(6))
        writer.set_elastic(plan.table(stores))
        writer.finish({"source": "tests"})
    return path


def test_a_module_without_factors_can_only_be_dense(tmp_path: Path):
    weight, gram, _ = layer(8, 6)
    with CheckpointWriter(tmp_path / "c", config={}) as writer:
        (only,) = add_elastic_module(
            writer, PlannedModule("dense", 8, 6, None, None, True), 2, weight, None, gram, "int8", torch.ones(8)
        )
        assert only.spec.kind == "dense"
        with pytest.raises(CompressionError, match="no factors"):
            add_elastic_module(writer, PlannedModule("two", 8, 6, 2, 2, True), 2, weight, None, gram, "int8")


def test_cut_writes_the_ordinary_checkpoint_of_one_keep(tmp_path: Path):
    src = write_elastic(tmp_path / "elastic")
    sizes = []
    for keep in (0.4, 0.7, 0.95):
        dst = cut(src, tmp_path / f"cut{keep}", keep)
        with Checkpoint.open(src, keep=keep) as small, Checkpoint.open(dst) as plain:
            assert plain.elastic is None and plain.modules == small.modules and plain.report() == {"source": "tests"}
            assert plain.nbytes == small.nbytes and set(plain.tensors()) == set(small.tensors())
            assert all(torch.equal(small.tensor(name), plain.tensor(name)) for name in plain.tensors())
            sizes.append(plain.nbytes)
    assert sizes == sorted(sizes) and sizes[0] < 0.6 * sizes[-1]
