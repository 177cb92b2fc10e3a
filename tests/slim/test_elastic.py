"""Elastic checkpoints: opened at any keep, the bits are those of the smaller checkpoint; the table is checked strictly."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_runtime.errors import (
    CheckpointError,
    InvalidConfigError,
    KeepError,
    NonFiniteTensorError,
    TensorMissingError,
    UnknownStoreError,
    UnknownVersionError,
)
from cai_runtime.slim.elastic import ElasticModule, ElasticTable
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import STORES, ModuleSpec
from cai_runtime.slim.stores import CoreData, quantize
from cai_runtime.slim.writer import CheckpointWriter, record_quality

STEP = 4
GROWS, BOTH, FIXED, OUTSIDE = "layers.0.grows", "layers.0.both", "layers.1.fixed", "embed"
KEEP = (0.1, 0.95)
ORDER = (0, 0, 1, 0, 1, 1, 0, *[0] * 5, 1, 1)  # GROWS has 4 .. 40, BOTH 2 .. 18 and dense


def specs_of(first: str, second: str) -> tuple[dict[str, ModuleSpec], ModuleSpec]:
    """The listed modules, and the lowrank form of BOTH."""
    listed = {
        GROWS: ModuleSpec("lowrank", 96, 80, 40, (first, second)),
        BOTH: ModuleSpec("dense", 48, 71, None, (first,)),
        FIXED: ModuleSpec("interpolative", 12, 10, 5, (first, second)),
        OUTSIDE: ModuleSpec("dense", 30, 10, None, ("int8",)),
    }
    return listed, ModuleSpec("lowrank", 48, 71, 18, (second, first))


def table_of(second: ModuleSpec) -> ElasticTable:
    modules = (ElasticModule(GROWS, 4), ElasticModule(BOTH, 2, second), ElasticModule(FIXED))
    return ElasticTable(KEEP, modules, STEP, ORDER)


def write_elastic(path: Path, first: str = "int8", second: str = "int8") -> Path:
    g = torch.Generator().manual_seed(0)
    listed, form = specs_of(first, second)

    def cores(spec: ModuleSpec) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=g) for shape in spec.core_shapes]

    with CheckpointWriter(path, config={"model_type": "llama"}) as writer:
        for name, spec in listed.items():
            pivot = torch.randperm(spec.out_features, generator=g) if spec.has_pivot else None
            bias = torch.randn(spec.out_features, generator=g) if name in (GROWS, BOTH) else None
            writer.add_module(name, spec, cores(spec), pivot=pivot, bias=bias)
        writer.add_second_form(BOTH, form, cores(form))
        writer.add_tensor("norm.weight", torch.ones(6))
        writer.set_elastic(table_of(form))
        writer.finish({"note": "an example"})
    return path


@pytest.fixture
def elastic(tmp_path: Path) -> Path:
    return write_elastic(tmp_path / "elastic")


def first_columns(core: CoreData, rank: int) -> CoreData:
    """What is left of core_1 at a rank: written here from the stores' definitions, not from the reader's."""
    store = STORES[core.store]
    rows = core.shape[0]
    if store.bits != 4:
        return CoreData(core.data[:, :rank].clone(), core.scale, core.store)
    groups = math.ceil(rank / store.group)
    zero = None if core.zero is None else core.zero[:, :groups].clone()
    data = core.data[:, : math.ceil(rank / 2)].clone()
    return CoreData(data, core.scale[:, :groups].clone(), core.store, zero, (rows, rank))


def first_rows(core: CoreData, rank: int) -> CoreData:
    scale, zero = (None if part is None else part[:rank].clone() for part in (core.scale, core.zero))
    return CoreData(core.data[:rank].clone(), scale, core.store, zero, (rank, core.shape[1]))


def read_both_forms(path: Path) -> dict[str, list[CoreData]]:
    """Every form's cores, whole."""
    found: dict[str, list[CoreData]] = {}
    with Checkpoint.open(path) as checkpoint:
        found = {name: checkpoint.module(name).cores for name in checkpoint.modules}
        high = checkpoint.keep
    # The largest keep at which BOTH is lowrank: without its last step.
    with Checkpoint.open(path, keep=high - 1e-3) as checkpoint:
        assert checkpoint.modules[BOTH].rank == 18
        found["second"] = [
            CoreData(c.data.clone(), None if c.scale is None else c.scale.clone(), c.store, c.zero, c.shape)
            for c in checkpoint.module(BOTH).cores
        ]
    return found


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("int8", "int8"), ("bf16", "fp16"), ("fp32", "int8"), ("int4-g32", "int4-g32-zp"), ("int4-g64-zp", "int4-g64"),
        ("int8", "int4-g32-zp"), ("int4-g128", "fp32"),
    ],
)  # fmt: skip
def test_a_keep_reads_as_the_checkpoint_written_with_the_cut_cores(tmp_path: Path, first: str, second: str):
    path = write_elastic(tmp_path / "elastic", first, second)
    whole = read_both_forms(path)
    seen = set()
    for percent in range(10, 96, 5):
        plain = tmp_path / f"plain{percent}"
        with Checkpoint.open(path, keep=percent / 100) as small:
            ranks = small.modules[GROWS].rank, small.modules[BOTH].rank
            if ranks in seen:
                continue
            seen.add(ranks)
            with CheckpointWriter(plain, config={"model_type": "llama"}) as writer:
                for name, spec in small.modules.items():
                    cores = whole[name]
                    if name in (GROWS, BOTH) and spec.kind == "lowrank":
                        cores = whole["second"] if name == BOTH else cores
                        cores = [first_rows(cores[0], spec.rank), first_columns(cores[1], spec.rank)]
                    module = small.module(name)
                    writer.add_module(name, spec, cores, pivot=module.pivot, bias=module.bias)
                writer.add_tensor("norm.weight", torch.ones(6))
                writer.finish()
            with Checkpoint.open(plain) as expected:
                assert small.nbytes == expected.nbytes and small.modules == expected.modules
                found, wanted = small.tensors(), expected.tensors()
                assert {n: (i.dtype, i.shape, i.nbytes) for n, i in found.items()} == {
                    n: (i.dtype, i.shape, i.nbytes) for n, i in wanted.items()
                }
                assert all(torch.equal(small.tensor(name), expected.tensor(name)) for name in wanted)
                for name in small.modules:
                    assert torch.equal(small.module(name).dense(), expected.module(name).dense())
                    assert small.module_tensors(name) == expected.module_tensors(name)
                assert small.config["quantization_config"] == expected.config["quantization_config"]
                small.verify()
    assert len(seen) > 8 and len({rank is None for _, rank in seen}) == 2


def test_without_keep_it_is_the_largest(elastic: Path):
    raw = json.loads((elastic / "config.json").read_text())["quantization_config"]
    assert raw["elastic"] == {
        "version": 1,
        "keep": [0.1, 0.95],
        "step": 4,
        "modules": [
            {"name": GROWS, "least": 4},
            {"name": BOTH, "least": 2, "rank": 18, "store": ["int8", "int8"]},
            {"name": FIXED},
        ],
        "order": "0*2 1 0 1*2 0*6 1*2",
        "quality": [],
    }
    with Checkpoint.open(elastic) as checkpoint:
        assert checkpoint.modules == specs_of("int8", "int8")[0]
        assert checkpoint.config["quantization_config"] == raw and checkpoint.elastic is not None
        assert f"{BOTH}.core_0" not in checkpoint and f"{BOTH}.weight" in checkpoint
        assert checkpoint.keep == checkpoint.elastic.reached(checkpoint.modules)[1] < 0.95
        assert checkpoint.nbytes == sum(spec.nbytes for spec in checkpoint.modules.values()) + 4 * (96 + 48 + 6)
        assert checkpoint.tensor("norm.weight").sum() == 6


def test_quality_is_recorded(elastic: Path):
    record_quality(elastic, [{"keep": 0.6, "perplexity": 30.5}, {"keep": 0.3, "perplexity": 88.0}])
    with Checkpoint.open(elastic) as checkpoint:
        assert [entry["keep"] for entry in checkpoint.elastic.quality] == [0.3, 0.6]
    with pytest.raises(InvalidConfigError, match="quality"):
        record_quality(elastic, [{"perplexity": 30.5}])
    assert not [file for file in elastic.iterdir() if file.name.startswith(".")]


def test_a_keep_that_is_not_there_is_named(elastic: Path, tmp_path: Path):
    with pytest.raises(KeepError, match=r"keep 0\.05 is out of range: .* opens at 0\.1 to 0\.95"):
        Checkpoint.open(elastic, keep=0.05)
    with pytest.raises(KeepError, match=r"opens at"):
        Checkpoint.open(elastic, keep=1)
    for keep in (0, -1, 1.5, math.nan, math.inf):
        with pytest.raises(KeepError, match=r"\(0, 1\]"):
            Checkpoint.open(elastic, keep=keep)
    for keep in ("0.5", True, [0.5]):
        with pytest.raises(TypeError, match="keep must be a number"):
            Checkpoint.open(elastic, keep=keep)
    plain = tmp_path / "plain"
    with CheckpointWriter(plain, config={}) as writer:
        writer.add_tensor("norm.weight", torch.ones(6))
        writer.finish()
    with pytest.raises(KeepError, match="not elastic"):
        Checkpoint.open(plain, keep=0.5)
    with pytest.raises(KeepError, match="not elastic"):
        record_quality(plain, [])


def test_the_ends_of_the_range(elastic: Path):
    for end, ranks in zip(KEEP, [(4, 2), (40, None)], strict=True):
        with Checkpoint.open(elastic, keep=end) as checkpoint:
            assert (checkpoint.modules[GROWS].rank, checkpoint.modules[BOTH].rank) == ranks
            assert end - 0.02 < checkpoint.keep < end


@given(st.floats(*KEEP))
@settings(max_examples=200, deadline=None)
def test_the_budget_is_kept_and_spent_in_order(keep: float):
    listed, form = specs_of("int8", "int8")
    table = table_of(form)
    view = table.at(listed, keep)
    assert table.reached(listed)[0] <= view.keep <= keep + 1e-9
    assert table.at(listed, view.keep) == view if view.keep >= KEEP[0] else True
    dense = sum(listed[m.name].dense_parameters for m in table.modules)
    # No module could have taken its next step.
    for module in table.modules:
        ladder = module.ladder(listed[module.name], STEP)
        k = ladder.index(view.modules[module.name])
        if k + 1 < len(ladder):
            assert ladder[k + 1].parameters - ladder[k].parameters > (keep - view.keep) * dense - 1
    assert sum(s.parameters for s in view.modules.values()) == round(view.keep * dense)


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])
    file.write_text(json.dumps(config))


CORRUPTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[CheckpointError]]] = {
    "not an object": (lambda q: q.update(elastic=[]), InvalidConfigError),
    "a newer version": (lambda q: q["elastic"].update(version=2), UnknownVersionError),
    "no keep": (lambda q: q["elastic"].pop("keep"), InvalidConfigError),
    "one keep": (lambda q: q["elastic"].update(keep=[0.5]), InvalidConfigError),
    "keep as text": (lambda q: q["elastic"].update(keep=["0.1", 0.9]), InvalidConfigError),
    "falling keep": (lambda q: q["elastic"].update(keep=[0.97, 0.95]), InvalidConfigError),
    "keep above 1": (lambda q: q["elastic"].update(keep=[0.1, 1.5]), InvalidConfigError),
    "keep below the smallest ranks": (lambda q: q["elastic"].update(keep=[0.05, 0.95]), InvalidConfigError),
    "keep below the largest forms": (lambda q: q["elastic"].update(keep=[0.1, 0.6]), InvalidConfigError),
    "no version": (lambda q: q["elastic"].pop("version"), UnknownVersionError),
    "an unknown key": (lambda q: q["elastic"].update(more=1), InvalidConfigError),
    "no order": (lambda q: q["elastic"].pop("order"), InvalidConfigError),
    "an order that is a list": (lambda q: q["elastic"].update(order=[0]), InvalidConfigError),
    "an order that is no numbers": (lambda q: q["elastic"].update(order="0*2 x"), InvalidConfigError),
    "a double blank": (lambda q: q["elastic"].update(order="0*2  1 0 1*2 0*6 1*2"), InvalidConfigError),
    "a step too few": (lambda q: q["elastic"].update(order="0*2 1 0 1*2 0*6 1"), InvalidConfigError),
    "a step too many": (lambda q: q["elastic"].update(order="0*2 1 0 1*2 0*6 1*3"), InvalidConfigError),
    "a huge run": (lambda q: q["elastic"].update(order="0*999999999 1"), InvalidConfigError),
    "a module that there is not": (lambda q: q["elastic"].update(order="0*2 1 0 1*2 0*6 1*2 7"), InvalidConfigError),
    "steps of a fixed module": (lambda q: q["elastic"].update(order="0*2 1 0 1*2 0*6 1*2 2"), InvalidConfigError),
    "step 0": (lambda q: q["elastic"].update(step=0), InvalidConfigError),
    "step as text": (lambda q: q["elastic"].update(step="4"), InvalidConfigError),
    "another step": (lambda q: q["elastic"].update(step=8), InvalidConfigError),
    "least 0": (lambda q: q["elastic"]["modules"][0].update(least=0), InvalidConfigError),
    "least true": (lambda q: q["elastic"]["modules"][0].update(least=True), InvalidConfigError),
    "least above the rank": (lambda q: q["elastic"]["modules"][0].update(least=41), InvalidConfigError),
    "an unlisted module": (lambda q: q["elastic"]["modules"][0].update(name="layers.9"), InvalidConfigError),
    "a module twice": (lambda q: q["elastic"]["modules"].append({"name": GROWS, "least": 4}), InvalidConfigError),
    "a name that is none": (lambda q: q["elastic"]["modules"][2].update(name=3), InvalidConfigError),
    "rank without store": (lambda q: q["elastic"]["modules"][1].pop("store"), InvalidConfigError),
    "growth of an interpolative": (lambda q: q["elastic"]["modules"][2].update(least=1), InvalidConfigError),
    "two forms of a lowrank": (
        lambda q: q["elastic"]["modules"][0].update(rank=8, store=["int8", "int8"]),
        InvalidConfigError,
    ),
    "a form dearer than dense": (lambda q: q["elastic"]["modules"][1].update(rank=30), InvalidConfigError),
    "a form of no such store": (
        lambda q: q["elastic"]["modules"][1].update(store=["int8", "int3"]),
        UnknownStoreError,
    ),
    "another rank than the tensors'": (
        lambda q: (q["elastic"]["modules"][1].update(rank=14), q["elastic"].update(order="0*2 1 0 1 0*6 1*2")),
        CheckpointError,
    ),
    "quality of keep 2": (lambda q: q["elastic"].update(quality=[{"keep": 2}]), InvalidConfigError),
    "quality as text": (lambda q: q["elastic"].update(quality=[{"keep": 0.5, "perplexity": "3"}]), InvalidConfigError),
    "quality as an object": (lambda q: q["elastic"].update(quality={"keep": 0.5}), InvalidConfigError),
    "nothing that grows": (
        lambda q: q["elastic"].update(modules=[{"name": FIXED}], order=""),
        InvalidConfigError,
    ),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_a_damaged_table_is_refused_at_open(elastic: Path, what: str):
    edit, error = CORRUPTIONS[what]
    change(elastic, edit)
    for keep in (None, 0.4):
        with pytest.raises(error) as raised:
            Checkpoint.open(elastic, keep=keep)
        assert raised.value.file is not None


def test_half_a_byte_is_not_cut_off(tmp_path: Path):
    listed = {"m": ModuleSpec("lowrank", 96, 80, 40, ("int8", "int4-g32"))}
    with pytest.raises(InvalidConfigError, match="odd"):
        ElasticTable(KEEP, (ElasticModule("m", 3),), 4, (0,) * 10).check(listed)
    with pytest.raises(InvalidConfigError, match="odd"):
        ElasticTable(KEEP, (ElasticModule("m", 4),), 3, (0,) * 12).check(listed)
    # The packed columns are core_1's alone.
    other = {"m": ModuleSpec("lowrank", 96, 80, 40, ("int4-g32", "int8"))}
    ElasticTable(KEEP, (ElasticModule("m", 3),), 4, (0,) * 10).check(other)


def test_the_second_form_must_be_there_and_sound(elastic: Path, tmp_path: Path):
    listed, form = specs_of("fp32", "fp32")
    g = torch.Generator().manual_seed(0)
    with CheckpointWriter(tmp_path / "missing", config={}) as writer:
        for name, spec in listed.items():
            pivot = torch.arange(spec.out_features) if spec.has_pivot else None
            writer.add_module(name, spec, [torch.randn(s, generator=g) for s in spec.core_shapes], pivot=pivot)
        writer.set_elastic(table_of(form))
        with pytest.raises(TensorMissingError, match="core_0"):
            writer.finish()
    path = write_elastic(tmp_path / "nan", "fp32", "fp32")
    with Checkpoint.open(path, keep=0.5) as checkpoint:
        info = checkpoint.tensors()[f"{BOTH}.core_0"]
    raw = bytearray(info.file.read_bytes())
    raw[info.start : info.start + 4] = b"\x00\x00\xc0\x7f"
    info.file.write_bytes(raw)
    with Checkpoint.open(path) as checkpoint, pytest.raises(NonFiniteTensorError):  # not in use, but checked
        checkpoint.verify()
    with Checkpoint.open(path, keep=0.5) as checkpoint, pytest.raises(NonFiniteTensorError):
        checkpoint.module(BOTH)
    change(elastic, lambda q: q["elastic"]["modules"].pop(1))
    change(elastic, lambda q: q["elastic"].update(order="0*9", keep=[0.99, 1.0]))
    with pytest.raises(InvalidConfigError, match="no use"):
        Checkpoint.open(elastic)


def test_the_writer_refuses_a_second_form_of_what_is_not_dense(tmp_path: Path):
    spec = ModuleSpec("lowrank", 8, 6, 2, ("fp32", "fp32"))
    cores = [torch.ones(shape) for shape in spec.core_shapes]
    with CheckpointWriter(tmp_path / "c", config={}) as writer:
        with pytest.raises(InvalidConfigError, match="second form"):
            writer.add_second_form("m", spec, cores)
        writer.add_module("m", spec, cores)
        with pytest.raises(InvalidConfigError, match="second form"):
            writer.add_second_form("m", spec, cores)
        with pytest.raises(InvalidConfigError, match="no entry"):
            writer.set_elastic(ElasticTable(KEEP, (ElasticModule("other", 1),), 1, (0,)))


READER = """
import sys
from pathlib import Path
import torch
from cai_runtime.slim.reader import Checkpoint

def status(key):  # bytes
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key + ":"))
    return int(line.split()[1]) * 1024

torch.ones(1 << 20).add_(1).aminmax()
resident = status("VmRSS")
with Checkpoint.open(sys.argv[1], keep=float(sys.argv[2])) as checkpoint:
    kept = [core.data.clone() for core in checkpoint.module("m").cores]
    checkpoint.release(checkpoint.module_tensors("m"))
    print(checkpoint.nbytes, max(0, status("VmHWM") - resident), sum(t.nbytes for t in kept))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_follows_keep(tmp_path: Path):
    spec = ModuleSpec("lowrank", 16384, 2048, 1600, ("bf16", "bf16"))  # core_1 takes 52 MB
    cores = [quantize(torch.randn(shape), "bf16") for shape in spec.core_shapes]
    with CheckpointWriter(tmp_path / "c", config={}) as writer:
        writer.add_module("m", spec, cores)
        writer.set_elastic(ElasticTable((0.06, 0.9), (ElasticModule("m", 100),), 100, (0,) * 15))
        writer.finish()
    found = {}
    for keep in (0.06, 0.85):
        done = subprocess.run(
            [sys.executable, "-c", READER, str(tmp_path / "c"), str(keep)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        nbytes, peak, held = map(int, done.stdout.split())
        assert held == nbytes
        found[keep] = peak
    small, large = 100 * (16384 + 2048) * 2, 1500 * (16384 + 2048) * 2
    # The copy out of the file, the loader's own, and 8 MiB of the file at a time.
    assert found[0.06] < 2 * small + (24 << 20) < large <= found[0.85] + (16 << 20)
