"""The first three blocks of SmolLM2, with its own weights, compressed on real text and judged on text that was not seen."""

import json

import pytest

from cai_runtime.compressor import compress
from cai_runtime.compressor.data.calibration import tokenize
from cai_runtime.convert.sources import pull
from cai_runtime.convert.texts import split_articles, wikipedia_articles
from cai_runtime.judge.evaluate import agreement, perplexity
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.writer import CheckpointWriter
from cai_runtime.stock.load import dense_reference, slim_as_transformers

BLOCKS = 3
SETTINGS = {
    "keep": 0.8,
    "samples": 4,
    "calibration": "wikipedia",
    "refine_epochs": 0,
    "heal_tokens": 0,
    "evaluate": False,
    "progress": False,
}


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """SmolLM2 without its later blocks: no fluent model, but real weights, real activations and a real perplexity."""
    source = pull("smollm2-135m-instruct", progress=False)
    path = tmp_path_factory.mktemp("shallow") / "model"
    with Checkpoint.open(source) as checkpoint:
        config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": BLOCKS}
        with CheckpointWriter(path, config=config, source_dir=source) as writer:
            for name in checkpoint.tensors():
                block = name.split(".")[2] if name.startswith("model.layers.") else "0"
                if int(block) < BLOCKS:
                    writer.add_tensor(name, checkpoint.tensor(name))
            writer.finish()
    return path


@pytest.fixture(scope="module")
def unseen(shallow):
    """Token ids of the test articles' beginning, [1024]."""
    from transformers import AutoTokenizer

    articles = split_articles(wikipedia_articles(progress=False)).test
    return tokenize(AutoTokenizer.from_pretrained(shallow), articles[:2])[:1024]


@pytest.mark.slow
def test_keep_08_in_int8_stays_close_to_the_original_and_curvature_is_why(shallow, unseen, tmp_path):
    dense = dense_reference(shallow)
    found, slims = {}, {}
    for name, options in {"best": {}, "plain": {"allocation": "uniform", "curvature": False}}.items():
        report = compress(shallow, tmp_path / name, **SETTINGS, **options)
        assert 0.78 < report.keep_parameters <= 0.8
        slims[name] = slim_as_transformers(tmp_path / name)
        found[name] = agreement(dense, slims[name], unseen)
    ratio = perplexity(slims["best"], unseen) / perplexity(dense, unseen)
    assert found["best"].kl < 0.5 * found["plain"].kl
    assert found["best"].top1 > found["plain"].top1
    assert ratio < 1.35
