import json

import pytest

from cai_runtime.cli import main, options
from cai_runtime.convert.named import NAMED
from cai_runtime.errors import SourceError
from cai_runtime.models.catalog import catalog

NAME = "smollm2-135m-instruct"


@pytest.fixture
def pulled(cached_model):
    """The tiny model in the place of a known name."""
    return cached_model(f"{NAMED[NAME].places[0].uri} somehash converter 1")


def test_catalogue_comes_first_and_nothing_is_local(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(catalog())]] == list(catalog())
    assert all(line.endswith("no") for line in lines[1 : 1 + len(catalog())])
    others = "qwen2.5-coder-0.5b-instruct, whisper-tiny.en, whisper-base, whisper-small"
    assert lines[-1] == f"to fetch with `cai pull NAME`: {NAME}, {others}"


def test_json_is_the_api_s_with_paths(capsys, pulled):
    assert main(["models", "--json"]) == 0
    entries = {entry["id"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["gpt-oss-20b"]["path"] is None
    assert entries["gpt-oss-20b"]["capabilities"]["support_chat_completion"] is True
    assert entries[NAME]["path"] == str(pulled)
    assert entries[NAME]["owned_by"] == "local"


def test_what_was_pulled_is_known_by_name_uri_or_file(pulled, cached_model):
    hub = cached_model("hf://org/tiny@main")
    file = cached_model("/data/my models/a.gguf 123 456 converter 1")
    assert options.fetched_models() == {NAME: pulled, "hf://org/tiny@main": hub, "/data/my models/a.gguf": file}


def test_damaged_entries_are_left_out(pulled):
    (pulled / "config.json").write_text("{}")
    assert options.fetched_models() == {}


def test_find_a_pulled_name_a_directory_and_a_catalogue_id(pulled, tiny_dir):
    assert options.find_model(NAME) == (NAME, pulled)
    assert options.find_model(str(tiny_dir)) == (str(tiny_dir), tiny_dir)
    assert options.find_model("gpt-oss-20b") == ("gpt-oss-20b", None)


def test_nothing_is_fetched_unless_asked_for(monkeypatch, tiny_dir):
    asked = []
    monkeypatch.setattr("cai_runtime.convert.sources.pull", lambda name: asked.append(name) or tiny_dir)
    with pytest.raises(SourceError, match=f"cai pull {NAME}"):
        options.find_model(NAME)
    assert asked == []
    assert options.find_model(NAME, pull=True) == (NAME, tiny_dir)
    assert options.find_model("hf://org/name", pull=True) == ("hf://org/name", tiny_dir)
    assert asked == [NAME, "hf://org/name"]


def test_unknown_models_are_named(tiny_dir):
    with pytest.raises(SourceError, match="'smollm3'.*cai models"):
        options.find_model("smollm3")


def test_without_a_model_the_last_demo_is_meant(cached_model):
    with pytest.raises(SourceError, match="cai demo"):
        options.find_model(None)
    first = cached_model("first", kind="demo", inside="model")
    assert options.find_model(None) == (first.name, first / "model")
    second = cached_model("second", kind="demo", inside="model")
    assert options.find_model(None) == (second.name, second / "model")
