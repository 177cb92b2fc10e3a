"""Comparisons of two checkpoints against their definitions, by both judges."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from cai_runtime.compressor import compare, quality
from cai_runtime.engine.open import load_tokenizer
from cai_runtime.errors import CompressionError, KeepError
from cai_runtime.judge.eval_text import EvalText, cut_windows, read_text
from cai_runtime.judge.stored_logits import StoredLogits
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import ModuleSpec
from cai_runtime.slim.writer import CheckpointWriter
from cai_runtime.stock.load import dense_reference, slim_as_transformers

TOKENS, WINDOW = 160, 32
RANK = 12


def truncated(source, path, rank=RANK):
    """`source` with every projection replaced by the best factors of that rank."""
    config = json.loads((source / "config.json").read_text())
    with Checkpoint.open(source) as checkpoint, CheckpointWriter(path, config=config, source_dir=source) as writer:
        for name in checkpoint.tensors():
            tensor = checkpoint.tensor(name)
            if not name.endswith("_proj.weight"):
                writer.add_tensor(name, tensor)
                continue
            u, s, v = torch.linalg.svd(tensor.float(), full_matrices=False)
            spec = ModuleSpec("lowrank", *tensor.shape, rank, ("fp32", "fp32"))
            cores = [v[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous()]
            writer.add_module(name.removesuffix(".weight"), spec, cores)
        writer.finish()
    return path


@pytest.fixture(scope="module")
def slim(tiny, tmp_path_factory):
    return truncated(tiny, tmp_path_factory.mktemp("slim") / "slim")


@pytest.fixture
def settings(text_file):
    return {
        "text": text_file,
        "tokens": TOKENS,
        "window": WINDOW,
        "prompts": ["w1 w2 w3"],
        "max_tokens": 6,
        "progress": False,
    }


def windows_of(path, text_file):
    return cut_windows(read_text(text_file), load_tokenizer(path), tokens=TOKENS, window=WINDOW).token_ids


def test_figures_are_their_definitions(tiny, slim, text_file, settings):
    found = compare(tiny, slim, **settings)
    first, second = dense_reference(tiny), slim_as_transformers(slim)
    nats, kl, same = ([], []), [], []
    for ids in windows_of(tiny, text_file):
        said = [model(input_ids=ids[None]).logits[0].double().log_softmax(-1) for model in (first, second)]
        for k in range(2):
            nats[k].append([-float(said[k][t, ids[t + 1]]) for t in range(len(ids) - 1)])
        kl.append([float((p.exp() * (p - q)).sum()) for p, q in zip(*said, strict=True)])
        same.append([float(p.argmax() == q.argmax()) for p, q in zip(*said, strict=True)])

    def mean(windows):
        return sum(map(sum, windows)) / sum(map(len, windows))

    def error(windows):
        means = torch.tensor([sum(w) / len(w) for w in windows], dtype=torch.float64)
        return float(means.std() / len(means) ** 0.5)

    assert len(kl) == 5 and found.text["tokens"] == TOKENS
    for score, own in zip((found.reference, found.candidate), nats, strict=True):
        assert score.perplexity == pytest.approx(math.exp(mean(own)), rel=1e-5)
        assert score.perplexity_error == pytest.approx(math.exp(mean(own)) * error(own), rel=1e-4)
        assert score.tokens == 5 * (WINDOW - 1)
    d = found.divergence
    assert d.kl == pytest.approx(mean(kl), rel=1e-4) and d.kl > 0.01
    assert d.kl_error == pytest.approx(error(kl), rel=1e-3)
    assert d.top1 == mean(same) and 0 < d.top1 < 1 and d.positions == TOKENS
    assert d.ratio == pytest.approx(found.candidate.perplexity / found.reference.perplexity, rel=1e-6)
    paired = [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(*nats, strict=True)]
    assert d.ratio_error == pytest.approx(d.ratio * error(paired), rel=1e-3)
    assert found.windows["kl"] == pytest.approx([sum(w) / len(w) for w in kl], rel=1e-4)
    assert d.kl_quantiles["0.5"] == pytest.approx(float(torch.tensor(kl).flatten().quantile(0.5)), rel=1e-4)
    assert found.candidate.slim and not found.reference.slim
    assert found.candidate.parameters < found.reference.parameters


def test_bits_per_byte_are_those_of_the_text(tiny, text_file, settings):
    found = compare(tiny, **settings).reference
    tokenizer = load_tokenizer(tiny)
    text = [tokenizer.decode(ids.tolist()) for ids in windows_of(tiny, text_file)]
    per_token = sum(len(t.encode()) for t in text) / TOKENS
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / per_token, rel=1e-6)


def test_the_engine_judges_alike(tiny, slim, settings):
    exact = compare(tiny, slim, **settings)
    ours = compare(tiny, slim, backend="engine", device="cpu", **settings)
    assert ours.divergence.kl == pytest.approx(exact.divergence.kl, rel=1e-3)
    assert ours.candidate.nats == pytest.approx(exact.candidate.nats, abs=1e-4)
    assert [s.candidate for s in ours.samples] == [s.candidate for s in exact.samples]


def test_one_after_the_other_is_the_same_and_leaves_nothing(tiny, slim, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = {together: compare(tiny, slim, together=together, **settings) for together in (True, False)}
    assert not list(tmp_path.iterdir())
    assert found[True].windows["candidate_nats"] == found[False].windows["candidate_nats"]
    assert found[True].divergence.top1 == found[False].divergence.top1
    assert found[False].divergence.kl == pytest.approx(found[True].divergence.kl, rel=2e-3)
    assert found[False].divergence.kl != found[True].divergence.kl  # it did go through fp16


def test_a_model_is_no_distance_from_itself(tiny, settings):
    found = compare(tiny, tiny, **settings)
    assert (found.divergence.kl, found.divergence.top1, found.divergence.ratio) == (0, 1, 1)
    [sample] = found.samples
    assert sample.reference == sample.candidate and sample.same_tokens == len(sample.reference.split())


def test_one_model_alone(tiny, settings):
    found = compare(tiny, **settings)
    assert found.candidate is None and found.divergence is None and found.refused is None
    assert [sample.candidate for sample in found.samples] == [None]
    assert "perplexity" in found.table() and "KL" not in found.table()


def test_samples_are_greedy(tiny, settings):
    [sample] = compare(tiny, **settings).samples
    model, tokenizer = dense_reference(tiny), load_tokenizer(tiny)
    ids = tokenizer("w1 w2 w3")["input_ids"]
    for _ in range(6):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert sample.reference == tokenizer.decode(ids[3:])


def test_other_tokens_refuse_kl_and_still_compare_per_byte(tiny, make_tiny, settings):
    other = make_tiny(seed=3)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w0"], vocabulary["w1"] = vocabulary["w1"], vocabulary["w0"]
    file.write_text(json.dumps(content))
    for together in (True, False):
        found = compare(tiny, other, together=together, **settings)
        assert found.divergence is None and "tokenizers differ" in found.refused
        assert "bits per byte" in found.table()
        assert found.candidate.bits_per_byte > 0 and "kl" not in found.windows


def test_logits_of_another_width_refuse_kl(tiny, make_tiny, settings):
    found = compare(tiny, make_tiny(vocab_size=64), **settings)
    assert found.divergence is None and "62 and 64 logits" in found.refused


def test_json_and_table(tiny, slim, settings):
    found = compare(tiny, slim, **{**settings, "tokens": WINDOW})
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["divergence"]["kl"] == found.divergence.kl
    assert value["divergence"]["kl_error"] is None  # of one window there is no spread
    assert "position_kl" not in value and len(value["windows"]["kl"]) == 1
    table = found.table(60)
    assert (
        f"{found.divergence.kl:.4f}" in table and f"{found.divergence.ratio:.4f} x" in table and "> w1 w2 w3" in table
    )
    assert max(map(len, table[table.index("> w1") :].splitlines())) <= 60


def test_quality_is_for_a_report(tiny, slim, settings):
    found = quality(tiny, slim, **settings)
    assert found["divergence"]["kl"] > 0 and found["samples"][0]["prompt"] == "w1 w2 w3"
    assert str(tiny) not in json.dumps(found) and "windows" not in found


def test_what_gives_nan_is_named(tiny, tmp_path, settings):
    path, config = tmp_path / "huge", json.loads((tiny / "config.json").read_text())
    with Checkpoint.open(tiny) as checkpoint, CheckpointWriter(path, config=config, source_dir=tiny) as writer:
        for name in checkpoint.tensors():
            tensor = checkpoint.tensor(name)
            writer.add_tensor(name, tensor * 1e30 if name.endswith(("up_proj.weight", "down_proj.weight")) else tensor)
        writer.finish()
    with pytest.raises(CompressionError, match=r"huge gives NaN in window 0"):
        compare(path, **settings)


@pytest.mark.parametrize("wrong", [{"window": 1}, {"tokens": 1}, {"text": "nowhere.txt"}, {"backend": "tea leaves"}])
def test_bad_settings(tiny, settings, wrong):
    with pytest.raises(CompressionError):
        compare(tiny, **{**settings, **wrong})


def test_keep_is_for_elastic_checkpoints(slim, settings):
    with pytest.raises(KeepError):
        compare(slim, keep=0.5, **settings)


def test_windows_are_spread_evenly(tiny):
    tokenizer = load_tokenizer(tiny)
    text = EvalText(tuple(" ".join(f"w{k % 60}" for k in range(start, start + 99)) for start in range(4)), "four")
    found = cut_windows(text, tokenizer, tokens=30, window=10)
    whole = [i for t in text.texts for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
    assert [ids.tolist() for ids in found.token_ids] == [whole[s : s + 10] for s in (0, 190, 390)]
    assert found.tokens == 30 and not found.begins_with_bos
    short = cut_windows(EvalText(("w1 w2 w3",), "short"), tokenizer, tokens=30, window=10)
    assert [ids.tolist() for ids in short.token_ids] == [[*tokenizer("w1 w2 w3")["input_ids"], tokenizer.eos_token_id]]
    with pytest.raises(CompressionError, match="at least two"):
        cut_windows(EvalText((" ",), "nothing"), tokenizer, tokens=30, window=10)


def test_every_window_begins_as_the_tokenizer_begins_a_text(tiny):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tiny)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    text = EvalText((" ".join(f"w{k % 60}" for k in range(50)),), "one")
    found = cut_windows(text, tokenizer, tokens=30, window=10)
    assert found.begins_with_bos and [len(ids) for ids in found.token_ids] == [10, 10, 10]
    assert all(ids[0] == bos and bos not in ids[1:] for ids in found.token_ids)
    assert found.tokens == 27


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with StoredLogits.in_temporary_file([4, 4]) as store, pytest.raises(CompressionError, match="TMPDIR"):
        store.put(0, torch.zeros(4, 1000))
    assert not list(tmp_path.iterdir())


def test_pictures(tiny, slim, settings, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    import matplotlib.image

    from cai_runtime.judge.picture import draw_comparison

    sizes = {}
    for name, models in {"two": (tiny, slim), "one": (tiny,)}.items():
        draw_comparison(compare(*models, **settings), tmp_path / f"{name}.png")
        pixels = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert pixels[..., :3].std() > 0.05  # something is drawn
        sizes[name] = pixels.shape
    assert sizes["two"][1] > 1.5 * sizes["one"][1]
    for wrong in (tmp_path / "two.pdf", tmp_path / "nowhere" / "two.png"):
        with pytest.raises(CompressionError, match="--picture"):
            draw_comparison(compare(tiny, **settings), wrong)
