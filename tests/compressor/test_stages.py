"""Each stage on tiny random models: the block-wise model is the model, and what is trained gets better."""

import re

import pytest
import torch
import torch.nn.functional as F

from cai_runtime.compressor import compress, dry_run
from cai_runtime.compressor.factor.cores import dense_module, factorized_module
from cai_runtime.compressor.factor.decompose import damped, factorize, spectrum, whitened_error
from cai_runtime.compressor.factor.embedding_head import Ends, find_ends, rounding_noise
from cai_runtime.compressor.pipeline import options_of
from cai_runtime.compressor.stats.block_stack import open_model
from cai_runtime.compressor.stats.calibrate import BlockId, CalibrationPass, next_token_loss
from cai_runtime.compressor.stats.moments import STRIP, GramSum
from cai_runtime.compressor.stats.targets import find_targets
from cai_runtime.compressor.stats.weights import DenseWeights
from cai_runtime.compressor.train.student import TrainableLinear
from cai_runtime.compressor.work import Work
from cai_runtime.errors import CompressionError
from cai_runtime.judge.evaluate import agreement
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.stores import quantize
from cai_runtime.stock.load import dense_reference, slim_as_transformers

IDS = torch.randint(2, 62, (4, 24), generator=torch.Generator().manual_seed(3))
FAST = {"samples": 8, "sequence_length": 64, "rank_multiple": 1, "evaluate": False, "progress": False}


@pytest.fixture
def calibration(tiny, tmp_path):
    """A pass over IDS in two batches, and stock transformers' model."""
    with Checkpoint.open(tiny) as checkpoint:
        model = open_model(DenseWeights(checkpoint), dtype=torch.float32, device="cpu")
        targets = find_targets(model.model, [stack.name for stack in model.stacks], checkpoint)
        batches = [{"input_ids": ids} for ids in IDS.split(2)]
        yield CalibrationPass(model, targets, batches, Work(tmp_path / "work", {})), dense_reference(tiny)


def test_block_by_block_it_is_the_model(calibration):
    calibration, reference = calibration
    calibration.forward()
    found = [
        calibration.model.finish(batch, [state]).logits
        for batch, state in zip(calibration.batches, calibration.hidden(BlockId(0, 2)), strict=True)
    ]
    with torch.no_grad():
        assert torch.equal(torch.cat(found), reference(input_ids=IDS, use_cache=False).logits)
    # Only what stands around the blocks stays in memory.
    resident = {name for name, p in calibration.model.model.named_parameters() if not p.is_meta}
    assert resident == {"model.embed_tokens.weight", "model.norm.weight"}


def test_moments_are_those_of_one_backward_pass(calibration):
    calibration, reference = calibration
    calibration.forward()
    moments = {}
    calibration.backward(lambda at: moments.update({at: calibration.moments(at, gradients=True)[1]}))
    seen = {}
    for name, module in reference.named_modules():
        if name in moments[BlockId(0, 0)].inputs or name in moments[BlockId(0, 1)].inputs:

            def hook(_m, args, out, name=name):
                out.retain_grad()
                seen[name] = (args[0], out)

            module.register_forward_hook(hook)
    embedded = reference.get_input_embeddings()(IDS).requires_grad_()
    next_token_loss(reference(inputs_embeds=embedded, use_cache=False), {"input_ids": IDS}).backward()
    assert len(seen) == 14
    for at, found in moments.items():
        for name, gram in found.inputs.items():
            assert name.startswith(f"model.layers.{at.index}.")
            x, y = (t.detach().flatten(0, 1).double() for t in (seen[name][0], seen[name][1].grad))
            torch.testing.assert_close(gram, x.mT @ x / len(x), rtol=1e-4, atol=1e-6, check_dtype=False)
            torch.testing.assert_close(found.outputs[name], y.mT @ y / len(y), rtol=1e-4, atol=1e-7, check_dtype=False)


def test_spectrum_and_whitened_error_are_the_factors(tiny):
    g = torch.Generator().manual_seed(0)
    w, x, y = torch.randn(20, 12, generator=g), torch.randn(50, 12, generator=g), torch.randn(50, 20, generator=g)
    inner, outer = damped(x.mT.double() @ x.double()), damped(y.mT.double() @ y.double())
    factors = factorize(w, inner, outer)
    torch.testing.assert_close(spectrum(w, inner, outer), factors.energy)
    for rank in (0, 5, 11):
        error = w - factors.left[:, :rank] @ factors.right[:rank]
        assert whitened_error(error, inner, outer) == pytest.approx(factors.errors()[rank], rel=1e-4)


@pytest.mark.parametrize("store", ["fp32", "bf16", "int8", "int4-g32", "int4-g32-zp"])
@pytest.mark.parametrize("kind", ["interpolative", "lowrank", "dense"])
def test_a_trainable_layer_is_what_is_stored(store, kind):
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(48, 40, generator=g), torch.randn(200, 40, generator=g)
    gram = damped(x.mT.double() @ x.double() / 200)
    factors = factorize(w, gram)
    stored = dense_module(w, store, gram) if kind == "dense" else factorized_module(kind, w, factors, 30, store, gram)
    layer = TrainableLinear(stored, torch.randn(48, generator=g))
    again = TrainableLinear.restore(layer.spec, {k: v.clone() for k, v in layer.tensors().items()})
    for candidate in (layer, again):
        kept = candidate.stored()
        for a, b in zip(kept.cores, stored.cores, strict=True):
            assert a.tensors.keys() == b.tensors.keys()
            assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
        torch.testing.assert_close(candidate(x), x @ stored.dense().mT + layer.bias, rtol=1e-4, atol=1e-4)
    before = layer.cores[0].latent.detach().clone()
    torch.optim.SGD(layer.parameters(), lr=0.05).zero_grad()
    (layer(x) - x @ w.mT).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in layer.parameters())
    assert torch.equal(before, layer.cores[0].latent.detach())


def test_refinement_and_healing_help(tiny, text_file, tmp_path):
    reference = dense_reference(tiny)
    stages = {
        "plain": {"refine_epochs": 0, "heal_tokens": 0},
        "refined": {"refine_epochs": 8, "heal_tokens": 0},
        "healed": {"refine_epochs": 8, "heal_tokens": 64 * 128},
    }
    divergence = {}
    for name, options in stages.items():
        report = compress(tiny, tmp_path / name, calibration=text_file, keep=0.6, **FAST, **options)
        slim = slim_as_transformers(tmp_path / name)
        divergence[name] = agreement(reference, slim, IDS.flatten(), window=24, progress=False).kl
        assert all(block["after"] <= block["before"] for block in report.blocks)
        assert len(report.blocks) == 2 * (options["refine_epochs"] > 0)
        assert len(report.healing) == options["heal_tokens"] // 128
    assert divergence["healed"] < divergence["refined"] < divergence["plain"]


def test_healing_in_mixed_precision_comes_as_far(tiny, text_file, tmp_path, monkeypatch):
    reference = dense_reference(tiny)
    settings = {"calibration": text_file, "keep": 0.6, "refine_epochs": 0, "heal_tokens": 64 * 128, **FAST}
    divergence, losses = {}, {}
    for name, dtype in (("mixed", None), ("fp32", "fp32")):
        monkeypatch.setattr("cai_runtime.compressor.options.multiplies_bf16", lambda: True)
        report = compress(tiny, tmp_path / name, dtype=dtype, **settings)
        assert report.options["mixed"] == (name == "mixed") and report.options["dtype"] == "fp32"
        slim = slim_as_transformers(tmp_path / name)
        divergence[name] = agreement(reference, slim, IDS.flatten(), window=24, progress=False).kl
        losses[name] = report.healing
    assert losses["mixed"] != losses["fp32"]
    assert divergence["mixed"] == pytest.approx(divergence["fp32"], rel=0.05)


def test_shifted_inputs_of_an_exact_compression_are_the_models_own(tiny, text_file, tmp_path):
    compress(
        tiny, tmp_path / "slim", calibration=text_file, keep=1.0, store="fp32", shift=True, refine_epochs=0,
        heal_tokens=0, **FAST,
    )  # fmt: skip
    with torch.no_grad():
        a, b = (m(input_ids=IDS).logits for m in (dense_reference(tiny), slim_as_transformers(tmp_path / "slim")))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("share", [60, 40])
def test_a_budget_in_bytes_holds_and_mixes(tiny, text_file, tmp_path, share):
    report = compress(
        tiny, tmp_path / "slim", calibration=text_file, target_bytes=f"{share}%", refine_epochs=0, heal_tokens=0,
        floor=0.0, **{**FAST, "rank_multiple": 8},
    )  # fmt: skip
    assert report.total_bytes <= share / 100 * report.total_dense_bytes
    with Checkpoint.open(tmp_path / "slim") as slim:
        assert report.total_bytes == slim.nbytes
    used = {store for module in report.modules for store in module.store}
    assert used == ({"int8"} if share == 60 else used) and used <= {"int8", "int4-g64"}
    assert report.ends == {"model.embed_tokens": "int8" if share == 60 else report.ends["model.embed_tokens"]}
    slim_as_transformers(tmp_path / "slim")


@pytest.mark.parametrize("tied", [True, False])
def test_stores_of_embedding_and_head_compete_for_bytes(make_tiny, text_file, tmp_path, tied):
    """The smallest budget there is takes every matrix to 4 bits, an ample one embedding and head to 8."""
    source = make_tiny(tied=tied)
    asked = {"calibration": text_file, "kind": "dense", "refine_epochs": 0, "heal_tokens": 1024, **FAST}
    with pytest.raises(CompressionError, match="linear layers, embedding and head need ([0-9,]+) bytes") as e:
        compress(source, tmp_path / "slim", target_bytes="20%", **asked)
    need, left = (int(n.replace(",", "")) for n in re.findall(r"([0-9,]+[0-9]) (?:bytes|are left)", str(e.value)))
    total = sum(p.numel() for p in dense_reference(source).parameters()) * 2
    least = int(0.2 * total) - left + need
    report = compress(source, tmp_path / "slim", target_bytes=least, restart=True, **asked)
    names = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert report.ends == dict.fromkeys(names, "int4-g64") and report.total_bytes == least
    with Checkpoint.open(tmp_path / "slim") as slim:
        assert {name: slim.modules[name].store for name in names} == dict.fromkeys(names, ("int4-g64",))
    report = compress(source, tmp_path / "ample", target_bytes="90%", **asked)
    assert set(report.ends.values()) == {"int8"}


def test_what_rounding_the_ends_adds_is_an_estimate_of_the_loss(calibration):
    """Against the model as it is, with both ends rounded, position by position."""
    calibration, reference = calibration
    calibration.forward()
    calibration.backward(lambda at: calibration.moments(at, gradients=True) and None)
    ends = Ends.of(calibration.model.model, calibration.model.weights)
    noise = rounding_noise(calibration, ends, ["int8", "int4-g64"])
    assert list(noise) == ["model.embed_tokens"]
    weight = reference.get_input_embeddings().weight
    for store, found in noise["model.embed_tokens"].items():
        rounded = quantize(weight.detach(), store).values()
        embedded = weight.detach()[IDS].requires_grad_()
        states = reference.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = states @ weight.detach().mT
        logits.retain_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
        first = (embedded.grad * (rounded[IDS] - embedded.detach())).sum(-1)
        second = (logits.grad * (states @ (rounded - weight).mT)).sum(-1)
        expected = (first.square() + second.square()).mean()
        assert found == pytest.approx(float(expected.detach()), rel=1e-4)
    assert noise["model.embed_tokens"]["int4-g64"] > 20 * noise["model.embed_tokens"]["int8"]
    assert torch.equal(calibration.model.model.get_input_embeddings().weight, weight)  # as it was


def test_only_the_head_is_rounded_with_feedback(make_tiny, tmp_path):
    with Checkpoint.open(make_tiny(tied=False)) as checkpoint:
        model = open_model(DenseWeights(checkpoint), dtype=torch.float32, device="cpu")
        targets = find_targets(model.model, [stack.name for stack in model.stacks], checkpoint)
        work = Work(tmp_path / "work", {})
        calibration = CalibrationPass(model, targets, [{"input_ids": IDS}], work)
        calibration.forward()
        ends = find_ends(calibration, ["int4-g64"], work, compete=False)
        assert ends.names == ("model.embed_tokens", "lm_head") and ends.heads == ("lm_head",) and not ends.noise
        with torch.no_grad():
            states = model.model.get_output_embeddings()
            seen = []
            handle = states.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1).double()))
            calibration.finish(0)
            handle.remove()
        torch.testing.assert_close(ends.gram, seen[0].mT @ seen[0] / len(seen[0]), rtol=1e-4, atol=1e-6)
        error = {}
        for name in ends.names:
            weight = model.model.get_submodule(name).weight.detach()
            with_feedback, plain = ends.core(name, weight, "int4-g64").values(), quantize(weight, "int4-g64").values()
            error[name] = [float(((v - weight).double() @ seen[0].mT).square().sum()) for v in (with_feedback, plain)]
        assert error["lm_head"][0] < 0.9 * error["lm_head"][1]
        assert error["model.embed_tokens"][0] == error["model.embed_tokens"][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5, "target_bytes": "50%"}, "two budgets"),
        ({"target_bytes": "1KB"}, "too small"),
        ({"target_bytes": "much"}, "target_bytes"),
        ({"target_bytes": "120%"}, "target_bytes"),
        ({"refine_epochs": -1}, "refine_epochs"),
        ({"heal_tokens": -1}, "heal_tokens"),
    ],
)
def test_bad_budgets(tiny, text_file, tmp_path, options, message):
    with pytest.raises(CompressionError, match=message):
        compress(tiny, tmp_path / "slim", calibration=text_file, **FAST, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_nothing_and_bounds_the_size(tiny, text_file, tmp_path):
    plan, rate = dry_run(tiny, tmp_path / "slim", calibration=text_file, keep=0.7, rank_multiple=1)
    assert list(tmp_path.iterdir()) == [] and rate > 0
    report = compress(tiny, tmp_path / "slim", calibration=text_file, keep=0.7, refine_epochs=0, heal_tokens=0, **FAST)
    assert (plan.layers, plan.blocks, plan.layer_parameters) == (14, 2, report.dense_parameters)
    assert plan.parameters == report.total_dense_parameters
    assert "210" not in plan.summary(rate) and "14 linear layers" in plan.summary(rate)


@pytest.mark.parametrize("features", [5, STRIP, STRIP + 1, 2 * STRIP + 100])
def test_a_sum_of_strips_is_the_whole_gram_matrix(features):
    g = torch.Generator().manual_seed(features)
    x = torch.randn(3, 7, features, generator=g)
    total = GramSum(features)
    for batch in x.split(1):
        total.add(batch)
    rows = x.flatten(0, 1).double()
    found = total.mean()
    assert torch.equal(found, found.mT) and found.dtype == torch.float64
    torch.testing.assert_close(found, rows.mT @ rows / 21, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.mean(torch.float32), found.float(), rtol=1e-6, atol=0)
    assert not GramSum(features).mean().any()


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"keep": 0.8}, 0),
        ({}, 0),
        ({"keep": 0.5}, 2),
        ({"keep": 0.8, "heal_tokens": 0}, 2),
        ({"keep": 0.8, "refine_epochs": 1}, 1),
        ({"keep": 0.8, "speech": True}, 2),
        ({"target_bytes": "45%"}, 2),
        ({"elastic": True, "heal_tokens": 4096}, 0),
    ],
)
def test_blocks_are_refined_where_healing_does_not_make_up_for_it(options, epochs):
    assert options_of(**options).refine_epochs == epochs
