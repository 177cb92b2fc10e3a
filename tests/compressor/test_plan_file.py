"""A plan file instead of a budget: mixed kinds and stores, and every way to get it wrong."""

import json

import pytest
import torch

from cai_runtime.compressor import compress
from cai_runtime.compressor.factor.plan_file import plan_entries, planned
from cai_runtime.compressor.pipeline import dry_run
from cai_runtime.errors import CompressionError
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.stock.load import slim_as_transformers

PLAN = {
    "*.down_proj": {"kind": "lowrank", "rank": 12, "store": "int8"},
    "model.layers.0.self_attn.*": {"kind": "dense", "store": "int4-g32"},
    "model.layers.0.mlp.gate_proj": {"kind": "mpo", "rank": 1, "out_dims": [56], "in_dims": [32]},
    "*.mlp.*": {"kind": "interpolative", "rank": 16, "store": "bf16"},
    "*.q_proj": {"kind": "mpo", "rank": 20, "out_dims": (4, 8), "in_dims": (8, 4), "store": "fp32"},
    "*": {"kind": "mpo", "rank": 8},
}
SHAPES = {"a.q_proj": (32, 32), "a.k_proj": (16, 32)}


def run(source, dst, text_file, **options):
    return compress(
        source, dst, calibration=text_file, samples=4, sequence_length=16, evaluate=False, progress=False, **options
    )


@pytest.fixture(scope="module")
def made(tiny, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.json").write_text(json.dumps({"modules": PLAN}))
    report = run(tiny, folder / "slim", text_file, plan=folder / "plan.json", heal_tokens=128)
    return folder / "slim", report


def test_every_layer_becomes_what_the_plan_says(made):
    slim, report = made
    with Checkpoint.open(slim) as checkpoint:
        found = {name: spec for name, spec in checkpoint.modules.items() if "layers" in name}
    for k in (0, 1):
        down, up = found[f"model.layers.{k}.mlp.down_proj"], found[f"model.layers.{k}.mlp.up_proj"]
        assert (down.kind, down.rank, down.store) == ("lowrank", 12, ("int8", "int8"))
        assert (up.kind, up.rank, up.store) == ("interpolative", 16, ("bf16", "bf16"))
    assert found["model.layers.0.self_attn.q_proj"].store == ("int4-g32",)
    query, key = found["model.layers.1.self_attn.q_proj"], found["model.layers.1.self_attn.k_proj"]
    assert (query.kind, query.rank, query.out_dims, query.in_dims) == ("mpo", (20,), (4, 8), (8, 4))
    assert (key.kind, key.rank, key.store) == ("mpo", (8,), ("int8", "int8"))
    gate = found["model.layers.0.mlp.gate_proj"]
    assert (gate.kind, gate.rank, gate.out_dims, gate.in_dims) == ("mpo", (), (56,), (32,))
    assert report.parameters == sum(spec.parameters for spec in found.values())
    assert report.options["plan"]["*"] == {"kind": "mpo", "store": "int8", "rank": 8}
    model = slim_as_transformers(slim)
    assert bool(model(input_ids=torch.tensor([[2, 3, 4]])).logits.isfinite().all())


def test_a_report_is_a_plan(made, tiny, text_file, tmp_path):
    slim, report = made
    again = run(tiny, tmp_path / "again", text_file, plan=slim / "slim_report.json", heal_tokens=128)
    assert [m.rank for m in again.modules] == [m.rank for m in report.modules]
    with Checkpoint.open(slim) as a, Checkpoint.open(tmp_path / "again") as b:
        assert a.modules == b.modules
        for name in a.tensors():
            assert torch.equal(a.tensor(name), b.tensor(name)), name


def test_the_sizes_are_known_before(made, tiny, tmp_path):
    _, report = made
    plan, _ = dry_run(tiny, tmp_path / "never", plan=PLAN)
    assert plan.output_bytes == report.total_bytes


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, 'no "modules"'),
        ({"*": 3}, "must be an object"),
        ({"*": {"kind": "sparse"}}, "kind must be one of"),
        ({"*": {"kind": "dense", "rank": 3}}, "kind dense has no 'rank'"),
        ({"*": {"kind": "lowrank"}}, "rank must be a positive integer"),
        ({"*": {"kind": "lowrank", "rank": True}}, "rank must be a positive integer"),
        ({"*": {"kind": "lowrank", "rank": 2, "store": "int3"}}, "store must be one of"),
        ({"*": {"kind": "mpo", "rank": 2, "out_dims": [4, 8]}}, "given together"),
        ({"*": {"kind": "mpo", "rank": 2, "out_dims": [4, 0], "in_dims": [4, 8]}}, "positive integers"),
        (
            {"*": {"kind": "mpo", "rank": 2, "out_dims": [4, 8], "in_dims": [32]}},
            r"the plan: '*': out_dims \[4, 8\] and in_dims \[32\] must be of the same length",
        ),
        (
            {"*": {"kind": "mpo", "rank": 2, "out_dims": [], "in_dims": []}},
            "out_dims must be a list of positive integers",
        ),
        ({"*": {"kind": "mpo", "rank": []}}, "rank must be a positive integer"),
        (
            {"*": {"kind": "mpo", "rank": [2, 2], "out_dims": [4, 8], "in_dims": [8, 4]}},
            "the 1 bond dimensions between 2",
        ),
        ({"*": {"kind": "lowrank", "rank": [2]}}, "rank must be a positive integer"),
        ({"*": {"kind": "lowrank", "rank": 17}}, "rank 17 exceeds 16"),
        ({"*": {"kind": "mpo", "rank": 2, "out_dims": [4, 8], "in_dims": [4, 8]}}, "does not fit a.k_proj"),
        ({"*.q_proj": {"kind": "dense"}}, "nothing for a.k_proj"),
        ({"*": {"kind": "dense"}, "b.*": {"kind": "dense"}}, "'b.*' fits no layer"),
    ],
)
def test_what_is_wrong_is_named(entries, message):
    with pytest.raises(CompressionError, match=message.replace("*", r"\*")):
        planned(plan_entries(entries), SHAPES)


def test_tuples_are_lists():
    entry = {"kind": "mpo", "rank": (3, 4), "out_dims": (4, 4, 2), "in_dims": (4, 2, 4)}
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in entry.items()}
    found = plan_entries({"a.q_proj": entry})
    assert found == plan_entries({"a.q_proj": lists})
    assert found == {"a.q_proj": {**lists, "rank": 4, "store": "int8"}}  # and no list equals a tuple


def test_files_that_are_none(tmp_path):
    with pytest.raises(CompressionError, match="can't be read"):
        plan_entries(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("no")
    with pytest.raises(CompressionError, match="is not JSON"):
        plan_entries(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(CompressionError, match="has no"):
        plan_entries(tmp_path / "list.json")
    (tmp_path / "report.json").write_text('{"modules": [{"kind": "dense"}]}')
    with pytest.raises(CompressionError, match="have names"):
        plan_entries(tmp_path / "report.json")


@pytest.mark.parametrize("other", [{"keep": 0.5}, {"target_bytes": "50%"}, {"store": "int8"}, {"kind": "mpo"}])
def test_a_plan_leaves_no_budget(tiny, tmp_path, other):
    with pytest.raises(CompressionError, match="leave keep, target_bytes"):
        compress(tiny, tmp_path / "slim", plan=PLAN, **other)


def test_mpo_under_a_budget(tiny, text_file, tmp_path):
    report = run(tiny, tmp_path / "slim", text_file, keep=0.7, kind="mpo", rank_multiple=2, heal_tokens=0)
    assert 0.6 < report.keep_parameters <= 0.7
    assert {m.kind for m in report.modules} <= {"mpo", "dense"} and any(m.kind == "mpo" for m in report.modules)
    assert all(0 <= m.relative_error < 1 for m in report.modules)
    with Checkpoint.open(tmp_path / "slim") as checkpoint:
        assert sum(s.parameters for n, s in checkpoint.modules.items() if "layers" in n) == report.parameters


def test_quantization_alone_under_a_budget_in_bytes(tiny, text_file, tmp_path):
    report = run(tiny, tmp_path / "slim", text_file, target_bytes="50%", kind="dense", heal_tokens=0)
    assert {m.kind for m in report.modules} == {"dense"}
    assert {store for m in report.modules for store in m.store} == {"int8", "int4-g64"}
    assert report.total_bytes <= 0.5 * report.total_dense_bytes
    with pytest.raises(CompressionError, match="no ranks to choose"):
        compress(tiny, tmp_path / "other", keep=0.5, kind="dense")
