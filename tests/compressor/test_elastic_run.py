"""Elastic compressions of a tiny random model: the whole way, opened at several keeps, stopped and gone on with."""

import json

import pytest
import torch

from cai_runtime.cli import main
from cai_runtime.compressor import compress, dry_run
from cai_runtime.compressor.elastic.growth import cut, elastic_forms, plan_elastic
from cai_runtime.compressor.elastic.heal import LEAST_DIVERGENCE, ElasticHealer, healing_keeps, put_forms
from cai_runtime.compressor.elastic.run import judged_keeps
from cai_runtime.compressor.factor.allocate import Curve
from cai_runtime.compressor.factor.decompose import factorize
from cai_runtime.compressor.train.heal import HealSettings
from cai_runtime.compressor.work import Work
from cai_runtime.errors import CompressionError, KeepError
from cai_runtime.judge.comparison import compare, compare_keeps
from cai_runtime.judge.eval_text import read_text
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.stock.load import dense_reference, slim_as_transformers

IDS = torch.randint(2, 62, (2, 40), generator=torch.Generator().manual_seed(3))
SETTINGS = {
    "elastic": True,
    "samples": 8,
    "sequence_length": 64,
    "rank_multiple": 2,
    "evaluate": False,
    "progress": False,
}
KEEPS = (0.3, 0.55, 0.8, 1.0)


def logits(path, keep=None):
    with torch.inference_mode():
        return slim_as_transformers(path, keep=keep)(input_ids=IDS, use_cache=False).logits


def distance(a, b):
    return float((a - b).norm() / a.norm())


@pytest.fixture(scope="module")
def made(tiny, text_file, tmp_path_factory):
    """An elastic checkpoint of the tiny model in int8, and its report."""
    path = tmp_path_factory.mktemp("elastic") / "slim"
    return path, compress(tiny, path, calibration=text_file, **SETTINGS)


def test_it_opens_at_every_keep_as_the_checkpoint_cut_there(tiny, made, tmp_path):
    path, report = made
    with torch.inference_mode():
        reference = dense_reference(tiny)(input_ids=IDS, use_cache=False).logits
    errors = []
    for keep in KEEPS:
        plain = cut(path, tmp_path / f"{keep}", keep)
        with Checkpoint.open(path, keep=keep) as opened, Checkpoint.open(plain) as alone:
            assert opened.modules == alone.modules and set(opened.tensors()) == set(alone.tensors())
            assert all(torch.equal(opened.tensor(name), alone.tensor(name)) for name in alone.tensors())
            assert keep - 0.06 < opened.keep <= keep
        found = logits(path, keep)
        assert torch.equal(found, logits(plain))
        errors.append(distance(reference, found))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 < errors[-2]
    assert torch.equal(logits(path), found)
    with pytest.raises(KeepError, match=r"0\.3 to 1"):
        Checkpoint.open(path, keep=0.2)
    assert report.keep_parameters == 1


def test_the_report_counts_both_forms(tiny, made, text_file, tmp_path):
    path, report = made
    second = report.elastic["second_forms"]
    assert report.elastic["keep"] == [0.3, 1.0] and second["modules"] > 0
    with Checkpoint.open(path) as checkpoint:
        assert report.total_bytes == checkpoint.nbytes
        on_disk = sum(info.nbytes for info in checkpoint._on_disk.values())
        assert report.total_bytes + second["bytes"] == on_disk
        forms = [module.second for module in checkpoint.elastic.modules if module.second]
        assert (len(forms), sum(form.parameters for form in forms)) == (second["modules"], second["parameters"])
    assert json.loads((path / "slim_report.json").read_text())["elastic"] == report.elastic
    assert f"{on_disk:,} bytes" in report.summary()
    plan, _ = dry_run(tiny, tmp_path / "slim", elastic=True, rank_multiple=2)
    plain, _ = dry_run(tiny, tmp_path / "slim", keep=1.0)
    assert plain.output_bytes < on_disk <= plan.output_bytes and plan.flops.keys() == {
        "calibrate",
        "decompose",
        "blocks",
    }


def test_a_bias_and_a_head_of_its_own_stay(make_tiny, text_file, tmp_path):
    src = make_tiny(bias=True, tied=False)
    compress(src, tmp_path / "slim", calibration=text_file, store="fp32", **SETTINGS)
    with torch.inference_mode():
        reference = dense_reference(src)(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(logits(tmp_path / "slim"), reference)
    assert distance(reference, logits(tmp_path / "slim", 0.9)) < distance(reference, logits(tmp_path / "slim", 0.4))


def test_int4(tiny, text_file, tmp_path):
    settings = {**SETTINGS, "keep": 0.9, "smallest_keep": 0.4}
    compress(tiny, tmp_path / "slim", calibration=text_file, store="int4-g32", **settings)
    with Checkpoint.open(tmp_path / "slim", keep=0.6) as checkpoint:
        checkpoint.verify(progress=False)
        stores = {store for name, spec in checkpoint.modules.items() if "layers" in name for store in spec.store}
        assert stores == {"int4-g32"} and checkpoint.modules["model.embed_tokens"].store == ("int8",)
    plain = cut(tmp_path / "slim", tmp_path / "plain", 0.6)
    assert torch.equal(logits(tmp_path / "slim", 0.6), logits(plain))


def test_the_command_line_and_the_quality_at_each_keep(tiny, made, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "cai_runtime.judge.comparison.read_text", lambda _text, progress: read_text(text_file, progress=progress)
    )
    dst = tmp_path / "slim"
    options = ["--samples", "8", "--sequence-length", "64", "--rank-multiple", "2", "--calibration", str(text_file)]
    assert main(["compress", str(tiny), str(dst), "--elastic", "--smallest-keep", "0.55", *options]) == 0
    printed = capsys.readouterr().out
    config, report = (json.loads((dst / f).read_text()) for f in ("config.json", "slim_report.json"))
    told = config["quantization_config"]["elastic"]["quality"]
    assert [entry["keep"] for entry in told] == [0.55, 0.6, 0.7, 0.8, 0.9, 1.0]
    in_report = report["elastic"]["quality"]
    assert [{k: v for k, v in e.items() if k != "samples"} for e in reversed(in_report)] == told
    assert all(len(entry["samples"]) == 3 for entry in in_report)
    perplexities, kls = ([entry[name] for entry in told] for name in ("perplexity", "kl"))
    assert kls == sorted(kls, reverse=True) and report["quality"]["divergence"]["kl"] == kls[-1]
    alone = compare(tiny, dst, keep=0.8, prompts=(), progress=False)
    assert alone.candidate.perplexity == perplexities[3] and alone.divergence.kl == pytest.approx(kls[3], rel=2e-3)
    assert (told[3]["parameters"], told[3]["bytes"]) == (alone.candidate.parameters, alone.candidate.nbytes)
    assert main(["inspect", str(dst)]) == 0
    inspected = capsys.readouterr().out
    for text in (printed, inspected):
        [line] = [line.split() for line in text.splitlines() if line.split()[:1] == ["0.8"]]
        assert line[3] == f"{perplexities[3]:.4g}" and line[5] == f"{kls[3]:.4g}"
    assert "opens at keep 0.55 to 1" in printed and "second forms: modules = " in inspected


def test_the_reference_is_read_once(tiny, made, text_file, monkeypatch):
    from cai_runtime.judge import comparison

    path, _ = made
    opened, judge = [], comparison.open_judge
    monkeypatch.setattr(
        comparison, "open_judge", lambda p, *a, keep, **k: (opened.append((p, keep)), judge(p, *a, keep=keep, **k))[1]
    )
    settings = {"text": text_file, "tokens": 160, "window": 32, "prompts": ["w1 w2 w3"], "max_tokens": 6}
    found = compare_keeps(tiny, path, [0.8, 0.4], **settings, progress=False)
    assert opened == [(tiny, None), (path, 0.8), (path, 0.4)]
    for keep, one in zip((0.8, 0.4), found, strict=True):
        alone = compare(tiny, path, keep=keep, together=False, **settings, progress=False)
        assert one.divergence == alone.divergence and one.windows == alone.windows and one.samples == alone.samples
        assert one.candidate.keep == keep and one.candidate.parameters == alone.candidate.parameters


def test_judged_keeps():
    assert judged_keeps(0.3, 1.0) == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    assert judged_keeps(0.25, 0.45) == [0.45, 0.4, 0.3, 0.25]


HEALED = {**SETTINGS, "heal_tokens": 2 * 64 * 40}
RATE = 1e-2  # so few weights on so few tokens take larger steps


@pytest.fixture(scope="module")
def healed(tiny, text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("healed") / "slim"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cai_runtime.compressor.options.HEAL_RATE", RATE)
        return path, compress(tiny, path, calibration=text_file, **HEALED)


def test_healing_helps_every_keep_but_the_largest_which_it_leaves_alone(tiny, made, healed, text_file):
    settings = {"text": text_file, "tokens": 1024, "window": 64, "prompts": (), "progress": False}
    keeps = [0.3, 0.5, 0.7, 0.9, 1.0]
    before, after = (
        [one.divergence.kl for one in compare_keeps(tiny, path, keeps, **settings)] for path in (made[0], healed[0])
    )
    assert all(b < 0.95 * a for a, b in zip(before[:3], after[:3], strict=True)) and after[3] < before[3]
    assert torch.equal(logits(made[0]), logits(healed[0])) and after[4] == before[4]
    assert len(healed[1].healing) == 40 and "heal" in healed[1].seconds and not made[1].healing


def test_keeps_of_healing_cover_the_range(made):
    with Checkpoint.open(made[0]) as checkpoint:
        table, specs = checkpoint.elastic, checkpoint.modules
    keeps = healing_keeps(table, specs, 16)
    assert keeps == healing_keeps(table, specs, 64)[:16]
    tenths = sorted(min(int((keep - 0.3) / 0.7 * 4), 3) for keep in keeps)
    assert [tenths.count(k) for k in range(4)] == [4, 4, 4, 4]


def test_a_step_of_several_batches_weighs_each_of_them_once(tiny, tmp_path):
    """The gradient of log(mean divergence), whatever the order of the batches."""
    teacher = dense_reference(tiny)
    linears = {n: m for n, m in teacher.named_modules() if "layers" in n and isinstance(m, torch.nn.Linear)}
    grams = {name: torch.eye(m.in_features, dtype=torch.float64) for name, m in linears.items()}
    factors = {name: factorize(m.weight.detach(), grams[name]) for name, m in linears.items()}
    curves = [Curve(n, m.out_features, m.in_features, factors[n].errors()) for n, m in linears.items()]
    plan = plan_elastic(curves, 0.9, smallest=0.3, multiple=2)
    layers = {
        m.name: elastic_forms(m, plan.step, linears[m.name].weight.detach(), factors[m.name], grams[m.name], "int8")
        for m in plan.modules
    }
    table = plan.table({name: forms[-1].spec.store for name, forms in layers.items()})
    specs = {name: forms[0].spec for name, forms in layers.items()}

    def gradients(*batches):
        """One step over all the batches: what its parameters' gradients are, and its divergence."""
        student = dense_reference(tiny).requires_grad_(False)
        put_forms(student, layers, torch.float32, "cpu")
        work, settings = Work(tmp_path / "work", {}, restart=True), HealSettings(1, 1e-4, len(batches))
        healer = ElasticHealer(student, teacher, batches, work, settings, table, specs)
        found = {}
        healer._optimizer.register_step_pre_hook(
            lambda *_: found.update({n: p.grad.clone() for n, p in student.named_parameters() if p.requires_grad})
        )
        healer.run()
        work.remove()
        return found, healer.losses[0]

    batches = [{"input_ids": ids[None]} for ids in (IDS[0], IDS[1, :7])]
    alone = [gradients(batch) for batch in batches]
    both, divergence = gradients(*batches)
    turned, _ = gradients(*reversed(batches))
    losses = [loss for _, loss in alone]
    assert divergence == pytest.approx(sum(losses) / 2) and min(losses) > LEAST_DIVERGENCE
    assert abs(losses[0] - losses[1]) > 0.05 * divergence and any(bool(g.any()) for g in both.values())
    for name, gradient in both.items():
        wanted = sum(one[name] * loss for one, loss in alone) / sum(losses)
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(gradient, turned[name], rtol=1e-3, atol=1e-7)


class Killed(BaseException):
    """What no handler expects."""


def test_it_goes_on_from_every_step(tiny, healed, text_file, tmp_path, monkeypatch):
    path, _ = healed
    monkeypatch.setattr("cai_runtime.compressor.options.HEAL_RATE", RATE)
    save, done, taken = Work.save, [], []

    def save_one(self, step, *rest, **options):
        if not self.has(step) or options.get("again"):
            if done:
                raise Killed
            done.append(step)
        save(self, step, *rest, **options)

    monkeypatch.setattr(Work, "save", save_one)
    for _ in range(40):
        try:
            compress(tiny, tmp_path / "slim", calibration=text_file, **HEALED)
            break
        except Killed:
            assert not (tmp_path / "slim").exists()
            taken += done
            done.clear()
    else:
        pytest.fail("it never came to the end")
    taken += done
    assert {"elastic-0-0000", "elastic-0-0001"} < set(taken)
    assert taken.count("heal") == 5 and len(set(taken)) == len(taken) - 4  # the training's state is replaced, no other
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "slim" / file).read_bytes() == (path / file).read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["slim"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "interpolative"}, "kind is lowrank, not interpolative"),
        ({"target_bytes": "45%"}, "target_bytes is one size"),
        ({"allocation": "uniform"}, "pooled"),
        ({"shift": True}, "shift"),
        ({"refine_epochs": 1}, "refine_epochs must be 0, is 1"),
        ({"keep": 0.3}, r"smallest_keep must be in \(0, keep\), is 0.3 with keep 0.3"),
        ({"smallest_keep": 0.0}, "smallest_keep"),
        ({"smallest_keep": 0.1, "rank_multiple": 16}, "smallest keep 0.1 is too small"),
        ({"store": "int4", "rank_multiple": 1}, "rank_multiple must be even with int4-g64"),
        ({"elastic": False, "smallest_keep": 0.5}, "smallest_keep.*needs elastic"),
    ],
)
def test_what_an_elastic_checkpoint_can_not_be(tiny, text_file, tmp_path, options, message):
    with pytest.raises(CompressionError, match=message):
        compress(tiny, tmp_path / "slim", calibration=text_file, **{**SETTINGS, **options})
    assert list(tmp_path.iterdir()) == []
