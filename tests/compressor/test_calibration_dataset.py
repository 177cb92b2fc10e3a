"""Calibration text from a dataset of the hub: a small local server that speaks the hub's protocol."""

import hashlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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


class Hub:
    """One dataset, org/words: revision -> files. `served` lists the files asked for; `lie` falsifies stated hashes."""

    def __init__(self):
        self.revisions, self.card, self.served, self.lie = {}, {}, [], False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                status, headers, body = hub.answer(self.path.split("?")[0], self.command)
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def commit(revision):
        return hashlib.sha1(revision.encode()).hexdigest()

    def answer(self, path, method):
        as_json = {"Content-Type": "application/json"}
        for revision, files in self.revisions.items():
            commit = self.commit(revision)
            api = "/api/datasets/org/words/revision/"
            if path in (api + revision, api + revision.replace("/", "%2F"), api + commit):
                siblings = [
                    {"rfilename": name, "size": len(content), "lfs": self.lfs(content), "blobId": "0" * 40}
                    for name, content in files.items()
                ]
                answer = {"id": "org/words", "sha": commit, "siblings": siblings, "cardData": self.card}
                return 200, as_json, json.dumps(answer).encode()
            prefix = f"/datasets/org/words/resolve/{commit}/"
            if path.startswith(prefix) and (name := path.removeprefix(prefix)) in files:
                if method == "GET":
                    self.served.append(name)
                etag = self.lfs(files[name])["sha256"]
                return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[name]
        code = "RevisionNotFound" if path.startswith("/api/datasets/org/words") else "RepoNotFound"
        return 404, {"X-Error-Code": code, "X-Error-Message": "not found"}, b"{}"

    def lfs(self, content):
        sha256 = "0" * 64 if self.lie else hashlib.sha256(content).hexdigest()
        return {"sha256": sha256, "size": len(content), "pointerSize": 100}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    server.revisions["main"] = {
        "README.md": b"#",
        "data/train-00000-of-00003.parquet": shard(["w1", "w2"]),
        "data/train-00001-of-00003.parquet": shard(["w3"]),
        "data/train-00002-of-00003.parquet": shard(["w4"]),
        "data/test-00000-of-00001.parquet": shard(["w5"]),
    }
    monkeypatch.setenv("CAI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.server.shutdown()
    server.server.server_close()


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
