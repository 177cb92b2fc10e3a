"""`cai batch`: the options reach the client, and the end is told."""

import json

import pytest

from cai_runtime.cli import main

BODY = {"prompt": "Once", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def files(tmp_path):
    """An input of a request that names no model and one that names OpenAI's, and the output's place."""
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
        for name, body in {"default": BODY, "named": {**BODY, "model": "gpt-4o-mini"}}.items()
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(source), str(tmp_path / "out.jsonl")


def read(path):
    with open(path) as file:  # noqa: PTH123
        results = [json.loads(line) for line in file]
    return {result["custom_id"]: result["response"] for result in results}


def test_models_by_name_and_a_second_run(files, tiny_dir, capsys):
    command = ["batch", *files, "--model", str(tiny_dir), "--serve", f"gpt-4o-mini={tiny_dir}", "--no-progress"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"2 succeeded, 0 failed: {files[1]}\n"
    texts = {name: reply["body"]["choices"][0]["text"] for name, reply in read(files[1]).items()}
    assert texts["default"] == texts["named"] != ""
    assert main(command) == 0
    assert "2 succeeded, 0 failed, of these 2 by an earlier run" in capsys.readouterr().err


def test_without_a_model_the_lines_say_so(files, capsys):
    assert main(["batch", *files]) == 0
    assert "0 succeeded, 2 failed" in capsys.readouterr().err
    found = read(files[1])
    assert found["default"]["body"]["error"]["param"] == "model" and found["default"]["status_code"] == 400
    assert found["named"]["status_code"] == 404


def test_the_default_model_may_be_one_of_those_served(files, tiny_dir, capsys):
    assert main(["batch", *files, "--model", "gpt-4o-mini", "--serve", f"gpt-4o-mini={tiny_dir}", "--ordered"]) == 0
    assert [*read(files[1])] == ["default", "named"]


def test_progress_is_shown_where_it_is_asked_for(files, tiny_dir, capsys):
    assert main(["batch", *files, "--model", str(tiny_dir), "--progress"]) == 0
    assert "batch:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [(["--serve", "x"], "NAME=DIR"), (["--window", "0"], "window"), (["--timeout", "0"], "timeout"),
     (["--model", "nothing"], "nothing")],
)  # fmt: skip
def test_bad_options_are_named(files, capsys, options, said):
    assert main(["batch", *files, *options]) == 1
    assert said in capsys.readouterr().err


def test_a_bad_output_is_told_before_a_model_opens(files, tiny_dir, capsys):
    assert main(["batch", files[0], files[0], "--model", str(tiny_dir)]) == 1
    assert "is the input" in capsys.readouterr().err
