import io
import json

import pytest
from openai.types import Completion

from cai_runtime.cli import main

GREEDY = ["--temperature", "0", "--max-tokens", "12"]


@pytest.fixture
def expected(tiny_dir):
    """What the API answers."""
    from cai_runtime import Client

    with Client(tiny_dir) as client:
        return client.completions.create(prompt="Once upon a time", temperature=0, max_tokens=12)


def test_streamed_whole_and_from_standard_input_are_the_same(tiny_dir, expected, capsys, monkeypatch):
    text = expected.choices[0].text
    assert main(["complete", str(tiny_dir), "Once", "upon", *GREEDY, "a", "time"]) == 0
    assert capsys.readouterr().out == text + "\n"
    assert main(["complete", str(tiny_dir), "Once upon a time", "--no-stream", *GREEDY]) == 0
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time"))
    assert main(["complete", str(tiny_dir), "-", *GREEDY]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_json_is_the_api_s_object_and_its_chunks(tiny_dir, expected, capsys):
    assert main(["complete", str(tiny_dir), "Once upon a time", "--json", *GREEDY]) == 0
    reply = Completion.model_validate_json(capsys.readouterr().out)
    assert [choice.model_dump() for choice in reply.choices] == [choice.model_dump() for choice in expected.choices]
    assert reply.usage == expected.usage
    assert main(["complete", str(tiny_dir), "Once upon a time", "--json", "--stream", *GREEDY]) == 0
    chunks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.choices[0].text


def test_one_word_is_the_prompt_for_the_demo_s_model(cached_model, capsys):
    assert main(["complete", "hello"]) == 1
    assert "cai demo" in capsys.readouterr().err
    cached_model("first", kind="demo", inside="model")
    assert main(["complete", "hello", *GREEDY]) == 0
    assert capsys.readouterr().out != "\n"


def test_bad_parameters_are_named(tiny_dir, capsys):
    assert main(["complete", str(tiny_dir), "hi", "--temperature", "3"]) == 1
    assert "'temperature'" in capsys.readouterr().err
    assert main(["complete", str(tiny_dir), "hi", "--device", "tpu"]) == 1
    assert "tpu" in capsys.readouterr().err
    assert main(["complete", str(tiny_dir), "hi", "--kv-cache", "lots"]) == 1
    assert "lots" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 5000, "~nosuchuser/x.gguf"])
def test_odd_model_names_are_no_model(name, capsys):
    assert main(["complete", name, "hi"]) == 1
    assert "is no directory" in (error := capsys.readouterr().err) and len(error) < 1000
