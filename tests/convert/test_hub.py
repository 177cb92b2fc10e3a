"""Pulling from a hub: a local server that speaks its protocol, and one that isn't there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from cai_runtime.convert.sources import fetch_file, pull
from cai_runtime.errors import SourceError


@pytest.fixture
def hub(tiny_llama, tmp_path, serve_hub):
    tiny_llama().save_pretrained(tmp_path / "model")
    server = serve_hub("models/org/tiny")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    unwanted = {"pytorch_model.bin": b"pickle", "original/params.json": b"{}", "README.md": b"#"}
    server.revisions["main"] = files | {"tokenizer.json": b"{}"} | unwanted
    return server


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
    assert (path / "model.safetensors").read_bytes() == hub.revisions["main"]["model.safetensors"]


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
    whole = hub.revisions["main"].pop("model.safetensors")
    hub.revisions["main"] |= dict.fromkeys(weights, whole) | dict.fromkeys((*BESIDE, *UNUSED), b"{}")
    if indexed is not None:
        weight_map = {f"t{k}": name for k, name in enumerate(indexed)}
        hub.revisions["main"]["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
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
    whole = hub.revisions["main"].pop("model.safetensors")
    hub.revisions["main"] |= dict.fromkeys(weights, whole)
    with pytest.raises(SourceError, match=match):
        pull("hf://org/tiny")


def test_an_index_that_names_what_is_not_there(hub):
    del hub.revisions["main"]["model.safetensors"]
    hub.revisions["main"]["model.safetensors.index.json"] = b'{"weight_map": {"t": "gone.safetensors"}}'
    with pytest.raises(SourceError, match=r"names gone\.safetensors, which the repository lacks"):
        pull("hf://org/tiny")


def test_file_is_fetched_and_checked(hub, tiny_llama, write_gguf):
    assert fetch_file("hf://org/tiny/README.md").read_bytes() == b"#"
    hub.revisions["main"]["sub/tiny.gguf"] = write_gguf(tiny_llama()).read_bytes()
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
    del hub.revisions["main"]["model.safetensors"]
    with pytest.raises(SourceError, match="no safetensors"):
        pull("hf://org/tiny", force=True)


def test_hub_out_of_reach_is_said(home, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:9 can't be reached"):
        pull("hf://org/tiny")
