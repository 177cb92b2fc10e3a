"""Pulling from a hub: a small local server that speaks the hub's protocol, and one that isn't there."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from cai_runtime.convert.sources import fetch_file, pull
from cai_runtime.errors import SourceError

COMMIT = "a" * 40


class Hub:
    """One repository, org/tiny, at one commit. `served` lists the files asked for; `lie` falsifies stated hashes."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.served, self.lie = files, [], False
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

    def sha256(self, name: str) -> str:
        return "0" * 64 if self.lie else hashlib.sha256(self.files[name]).hexdigest()

    def is_large(self, name: str) -> bool:
        return name.endswith((".safetensors", ".gguf"))

    def answer(self, path: str, method: str) -> tuple[int, dict[str, str], bytes]:
        as_json = {"Content-Type": "application/json"}
        if path == "/api/models/org/tiny/revision/main":
            siblings = []
            for name, content in self.files.items():
                sibling: dict = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
                if self.is_large(name):
                    sibling["lfs"] = {"sha256": self.sha256(name), "size": len(content), "pointerSize": 100}
                siblings.append(sibling)
            return 200, as_json, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        if path == f"/api/models/org/tiny/tree/{COMMIT}":
            tree = []
            for name, content in self.files.items():
                item: dict = {
                    "type": "file",
                    "path": name,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                if self.is_large(name):
                    item["lfs"] = {"oid": self.sha256(name), "size": len(content), "pointerSize": 100}
                tree.append(item)
            return 200, as_json, json.dumps(tree).encode()
        prefix = f"/org/tiny/resolve/{COMMIT}/"
        if path.startswith(prefix) and (name := path.removeprefix(prefix)) in self.files:
            if method == "GET":
                self.served.append(name)
            etag = self.sha256(name) if self.is_large(name) else hashlib.sha1(self.files[name]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, self.files[name]
        code = "RevisionNotFound" if path.startswith("/api/models/org/tiny") else "RepoNotFound"
        return 404, {"X-Error-Code": code, "X-Error-Message": "not found"}, b"{}"


@pytest.fixture
def hub(tiny_llama, tmp_path, monkeypatch, home):
    tiny_llama().save_pretrained(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "tokenizer.json": b"{}", "original/params.json": b"{}", "README.md": b"#"}
    server = Hub(files)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_repository_is_pulled_without_pickles_and_only_once(hub):
    path = pull("hf://org/tiny")
    assert "model.safetensors" in hub.served
    kept = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert kept - {".cai_receipt.json"} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert AutoModelForCausalLM.from_pretrained(path).config.hidden_size == 64
    hub.served.clear()
    assert pull("hf://org/tiny") == path
    assert hub.served == []
    (path / "model.safetensors").write_bytes(b"damaged")
    assert pull("hf://org/tiny") == path
    assert (path / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


WEIGHTS = {
    "one file and everything else": (
        ["model.safetensors", "consolidated.safetensors", "model.fp16.safetensors", "checkpoint-10/model.safetensors",
         "onnx/model.onnx", "original/consolidated.safetensors", "openvino/config.json"],
        None, {"model.safetensors"},
    ),
    "shards and everything else": (
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "consolidated-00001-of-00001.safetensors",
         "checkpoint-10/model-00001-of-00002.safetensors"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"},
    ),
    "one file and an index of others": (["model.safetensors", "a.safetensors"], ["a.safetensors"], {"model.safetensors"}),
    "another name": (["weights.safetensors", "consolidated.safetensors"], None, {"weights.safetensors"}),
}  # fmt: skip
BESIDE = {
    "tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model", "LICENSE", "merges.txt",
    "additional_chat_templates/tools.jinja", "preprocessor_config.json",
}  # fmt: skip
UNUSED = {
    "README.md", "trainer_state.json", "model.safetensors.index.fp16.json", "all_results.json", "checkpoint-10/config.json",
    ".gitattributes", "figure.png", "nested/tokenizer.json", "optimizer.pt", "training_args.bin",
}  # fmt: skip


@pytest.mark.parametrize(("weights", "indexed", "wanted"), WEIGHTS.values(), ids=WEIGHTS)
def test_only_what_the_model_needs_is_fetched(hub, weights, indexed, wanted):
    whole = hub.files.pop("model.safetensors")
    hub.files |= dict.fromkeys(weights, whole) | dict.fromkeys((*BESIDE, *UNUSED), b"{}")
    if indexed is not None:
        weight_map = {f"t{k}": name for k, name in enumerate(indexed)}
        hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    path = pull("hf://org/tiny")
    kept = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {".cai_receipt.json"}
    assert kept == wanted | BESIDE | {"config.json", "generation_config.json"}


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (["consolidated.safetensors"], "consolidated.safetensors alone"),
        (["adapter_model.safetensors"], "adapter"),
        (["a.safetensors", "b.safetensors"], r"several weights.*a\.safetensors, b\.safetensors"),
        (["checkpoint-10/model.safetensors"], "no safetensors weights"),
    ],
)
def test_weights_that_are_no_models_are_named(hub, weights, match):
    whole = hub.files.pop("model.safetensors")
    hub.files |= dict.fromkeys(weights, whole)
    with pytest.raises(SourceError, match=match):
        pull("hf://org/tiny")


def test_an_index_that_names_what_is_not_there(hub):
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = b'{"weight_map": {"t": "gone.safetensors"}}'
    with pytest.raises(SourceError, match=r"names gone\.safetensors, which the repository lacks"):
        pull("hf://org/tiny")


def test_file_is_fetched_and_checked(hub, tiny_llama, write_gguf):
    assert fetch_file("hf://org/tiny/README.md").read_bytes() == b"#"
    hub.files["sub/tiny.gguf"] = write_gguf(tiny_llama()).read_bytes()
    assert (pull("hf://org/tiny/sub/tiny.gguf") / "model.safetensors").is_file()
    with pytest.raises(SourceError, match=r"has no file nothing\.txt"):
        fetch_file("hf://org/tiny/nothing.txt")


def test_wrong_hash_is_refused(hub):
    hub.lie = True
    with pytest.raises(SourceError, match=r"model\.safetensors.*SHA-256"):
        pull("hf://org/tiny")
    hub.lie = False
    assert (pull("hf://org/tiny") / "model.safetensors").is_file()


def test_what_is_not_there_is_named(hub):
    with pytest.raises(SourceError, match="org/other is not on"):
        pull("hf://org/other")
    with pytest.raises(SourceError, match="no revision v9"):
        pull("hf://org/tiny@v9")
    del hub.files["model.safetensors"]
    with pytest.raises(SourceError, match="no safetensors"):
        pull("hf://org/tiny", force=True)


def test_hub_out_of_reach_is_said(home, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:9 can't be reached"):
        pull("hf://org/tiny")
