"""Calibration text from a dataset of the hub: a local server that speaks its protocol."""

import io

import pytest
from transformers import AutoTokenizer

from cai_runtime.compressor.data.calibration import calibration_sequences
from cai_runtime.compressor.data.hub_dataset import DatasetName
from cai_runtime.convert import text_files
from cai_runtime.errors import CompressionError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def shard(words):
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [f"{word} " * 30 for word in words]}), out)
    return out.getvalue()


@pytest.fixture
def hub(serve_hub):
    server = serve_hub("datasets/org/words")
    server.revisions["main"] = {
        "README.md": b"#",
        "data/train-00000-of-00003.parquet": shard(["w1", "w2"]),
        "data/train-00001-of-00003.parquet": shard(["w3"]),
        "data/train-00002-of-00003.parquet": shard(["w4"]),
        "data/test-00000-of-00001.parquet": shard(["w5"]),
    }
    return server


@pytest.fixture
def load(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def run(source):
        found = calibration_sequences(
            source, tokenizer=tokenizer, model_path=tiny, samples=99, sequence_length=30, progress=False
        )
        return found, set(tokenizer.decode(found.sequences.flatten()).split()) - {"<eos>"}

    return run


def test_only_as_many_shards_as_are_needed_and_only_once(hub, load, monkeypatch):
    monkeypatch.setattr(text_files, "characters_for", lambda tokens: 200)
    found, words = load("hf:org/words")
    assert words == {"w1", "w2", "w3"}
    assert hub.served == ["data/train-00000-of-00003.parquet", "data/train-00001-of-00003.parquet"]
    said = found.to_json()
    assert said["dataset"] == "org/words" and said["revision"] == hub.commit("main")
    assert said["source"] == "org/words, default, train, 2 of 3 files: 3 texts"
    hub.served.clear()
    hub.revisions.clear()  # the second time touches no network for what it has
    assert load("hf:org/words")[0].to_json() == said
    assert hub.served == []


def test_split_and_configuration(hub, load):
    assert load("hf:org/words::test")[1] == {"w5"}
    assert load("hf:org/words")[1] == {"w1", "w2", "w3", "w4"}
    with pytest.raises(CompressionError, match=r"no split 'dev'; it has test, train"):
        load("hf:org/words::dev")
    hub.revisions["v2"] = {"en/train.parquet": shard(["w6"]), "de/train.parquet": shard(["w7"])}
    assert load("hf:org/words:de@v2")[1] == {"w7"}
    with pytest.raises(CompressionError, match="several configurations: name one of de, en"):
        load("hf:org/words@v2")
    with pytest.raises(CompressionError, match="no configuration 'fr'"):
        load("hf:org/words:fr@v2")


def test_the_card_says_which_files(hub, load):
    hub.card["configs"] = [
        {"config_name": "small", "data_files": [{"split": "train", "path": "data/train-00001-*.parquet"}]},
        {"config_name": "all", "data_files": "**/*.parquet", "default": True},
    ]
    assert load("hf:org/words:small")[1] == {"w3"}
    assert load("hf:org/words")[1] == {"w1", "w2", "w3", "w4", "w5"}
    with pytest.raises(CompressionError, match=r"no configuration 'big'; it has small, all"):
        load("hf:org/words:big")
    with pytest.raises(CompressionError, match=r"no split 'test'; it has train"):
        load("hf:org/words:small:test")


def test_a_dataset_of_another_format_is_read_from_its_conversion(hub, load):
    hub.revisions["main"] = {"data.csv": b"text"}
    with pytest.raises(CompressionError, match=r"no parquet files, and no conversion"):
        load("hf:org/words")
    hub.revisions["refs/convert/parquet"] = {"default/train/0000.parquet": shard(["w8"])}
    found, words = load("hf:org/words")
    assert words == {"w8"} and found.provenance["revision"] == hub.commit("refs/convert/parquet")


def test_a_wrong_hash_is_refused(hub, load):
    hub.lie = True
    with pytest.raises(CompressionError, match=r"train-00000.*SHA-256"):
        load("hf:org/words")
    hub.lie = False
    assert load("hf:org/words")[1] >= {"w1"}


def test_what_is_not_there_is_named(hub, load, monkeypatch):
    with pytest.raises(CompressionError, match="calibration dataset hf:org/other@main: org/other is not on"):
        load("hf:org/other")
    with pytest.raises(CompressionError, match="no revision v9"):
        load("hf:org/words@v9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CompressionError, match=r"127\.0\.0\.1:9 can't be reached"):
        load("hf:org/words")
    with pytest.raises(CompressionError, match=r"'hf:words' is not hf:owner/name"):
        load("hf:words")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf:a/b", DatasetName("a/b", None, "train", "main")),
        ("hf:a/b:c", DatasetName("a/b", "c", "train", "main")),
        ("hf:a/b::test", DatasetName("a/b", None, "test", "main")),
        ("hf:a/b:20231101.en:test@refs/pr/1", DatasetName("a/b", "20231101.en", "test", "refs/pr/1")),
    ],
)
def test_names(text, name):
    assert DatasetName.parse(text) == name
    assert DatasetName.parse(str(name)) == name
