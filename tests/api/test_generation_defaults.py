"""Sampling parameters that a checkpoint recommends are the defaults of requests that name none."""

import json

import pytest

from cai_runtime import UnprocessableEntityError
from cai_runtime.api import chat, completions
from cai_runtime.errors import InvalidConfigError
from cai_runtime.slim.generation_defaults import GenerationDefaults
from cai_runtime.slim.inspect import format_inspection, inspect_checkpoint

ASK = {chat: {"messages": [{"role": "user", "content": "hi"}]}, completions: {"prompt": "hi"}}
FILE = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
OPENAI = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def write(model_dir, config):
    (model_dir / "generation_config.json").write_text(config if isinstance(config, str) else json.dumps(config))


def sampling(client, endpoint, **params):
    """What the engine is told of a request."""
    request = endpoint.parse({**ASK[endpoint], **params})
    model = client._host.resolve(None)
    told = endpoint.prepare(request, model, client._host.open(model)).requests[0].sampling
    return {name: getattr(told, name) for name in OPENAI}


@pytest.mark.parametrize("endpoint", [chat, completions])
def test_used_where_a_request_names_none(client, model_dir, endpoint):
    write(model_dir, FILE)
    expected = {name: FILE[name] for name in OPENAI}
    assert sampling(client, endpoint) == expected
    for name, value in OPENAI.items():
        assert sampling(client, endpoint, **{name: value}) == {**expected, name: value}
    assert sampling(client, endpoint, top_p=0) == expected  # an explicit 0 is "not given"


def test_none_of_them_if_so_wanted(new_client, model_dir):
    write(model_dir, FILE)
    assert sampling(new_client(model_dir, generation_config="none"), chat) == OPENAI


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.3},
         {"temperature": 0.0, "repetition_penalty": 1.3}),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"temperature": None, "top_k": None, "do_sample": None}, {}),
        ({"top_k": -1, "top_p": 0, "temperature": 0}, {"temperature": 0.0}),
    ],
)  # fmt: skip
def test_reading(client, model_dir, config, expected):
    write(model_dir, config)
    assert sampling(client, chat) == {**OPENAI, **expected}
    assert GenerationDefaults.read(model_dir).given() == expected


def test_no_file_and_a_byte_order_mark(client, model_dir):
    assert GenerationDefaults.read(model_dir) == GenerationDefaults() == GenerationDefaults(**OPENAI)
    (model_dir / "generation_config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(FILE).encode())
    assert GenerationDefaults.read(model_dir).temperature == 0.6


@pytest.mark.parametrize(
    ("config", "says"),
    [({"temperature": "0.6"}, "temperature"), ({"temperature": 3}, "temperature"), ({"top_k": 1.5}, "top_k"),
     ({"top_p": True}, "top_p"), ({"repetition_penalty": 0}, "repetition_penalty"), ("[1]", "JSON object"),
     ("{", "JSON"), ('{"min_p": NaN}', "min_p")],
)  # fmt: skip
def test_values_that_cannot_be_used(new_client, model_dir, factory, ask, config, says):
    write(model_dir, config)
    with pytest.raises(InvalidConfigError, match=says):
        GenerationDefaults.read(model_dir)
    with pytest.raises(UnprocessableEntityError, match='generation_config="none"'):
        new_client(model_dir).chat.completions.create(**ask)
    assert factory.opened == []
    new_client(model_dir, generation_config="none").chat.completions.create(**ask)


def test_inspect_shows_them(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    inspection = inspect_checkpoint(tmp_path)
    assert "sampling defaults" not in format_inspection(inspection)
    assert inspection.to_json()["sampling_defaults"] == {}
    write(tmp_path, FILE)
    inspection = inspect_checkpoint(tmp_path)
    assert "sampling defaults: temperature 0.6, top_k 20, top_p 0.9" in format_inspection(inspection)
    assert inspection.to_json()["sampling_defaults"] == {name: FILE[name] for name in OPENAI}
    write(tmp_path, {"temperature": 9})
    assert "temperature must be" in format_inspection(inspect_checkpoint(tmp_path))
