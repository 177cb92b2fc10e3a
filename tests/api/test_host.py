"""Where a model's name leads, and when models are opened and closed."""

import threading
import time

import pytest

from cai_runtime import (
    APIError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    UnprocessableEntityError,
)
from cai_runtime.errors import CheckpointError, MemoryBudgetError, UnsupportedModelError


def make_dir(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_names(new_client, factory, model_dir, tmp_path, home, ask):
    catalogued = make_dir(home / "models" / "llama-3-1-8b")
    client = new_client(models={"abc": model_dir, "glm-5-1": model_dir, "tilde": str(model_dir)})
    for name, path in [
        ("abc", model_dir),
        (str(model_dir), model_dir),
        (model_dir, model_dir),
        ("llama-3-1-8b", catalogued),
        ("glm-5-1", model_dir),
    ]:
        assert client.chat.completions.create(**ask, model=name).model == str(name)
        assert path in factory.opened
    assert len(factory.opened) == 2  # one engine for each directory, whatever it is called


def test_relative_directory(new_client, factory, model_dir, ask, monkeypatch):
    monkeypatch.chdir(model_dir.parent)
    client = new_client("./alphabet")
    assert client.chat.completions.create(**ask).model == "./alphabet"
    assert factory.opened == [model_dir]


def test_default(new_client, model_dir, ask):
    assert new_client(model_dir).chat.completions.create(**ask).model == str(model_dir)
    with pytest.raises(BadRequestError) as caught:
        new_client(models={"abc": model_dir}).chat.completions.create(**ask)
    assert (caught.value.param, caught.value.code) == ("model", "missing_required_parameter")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("llama-3-1-8b", "Client(models={'llama-3-1-8b': directory})"),
        ("gone", "which is not a directory"),
        ("smollm2-135m-instruct", "cai pull smollm2-135m-instruct"),
    ],
)
def test_weights_that_are_not_here(new_client, factory, tmp_path, ask, name, says):
    client = new_client(models={"gone": tmp_path / "gone"})
    with pytest.raises(NotFoundError) as caught:
        client.chat.completions.create(**ask, model=name)
    error = caught.value
    assert (error.status_code, error.param, error.code) == (404, "model", "model_not_found")
    assert says in error.message and name in error.message
    assert factory.opened == []


def test_names_that_end_in_r_stand_for_the_model_without(client, new_client, tokenizer, model_dir, ask):
    tokenizer.chat_template = "{{ 'on:' if think else '' }}{{ messages[0].content }}".replace(
        "think", "enable_thinking"
    )
    counts = [
        client.chat.completions.create(**ask, **options, max_tokens=1).usage.prompt_tokens
        for options in (
            {}, {"model": "abc-r"}, {"model": f"{model_dir}-r"}, {"model": "abc-r", "reasoning_enabled": False},
            {"model": "abc-r", "reasoning_effort": "none"}, {"reasoning_enabled": True},
        )
    ]  # fmt: skip
    assert counts == [2, 5, 5, 2, 2, 5]
    assert client.chat.completions.create(**ask, model="abc-r").model == "abc-r"
    assert client.models.retrieve("abc-r").id == "abc-r"
    own = new_client(models={"abc": model_dir, "abc-r": model_dir})  # a name of its own is what it says
    assert own.chat.completions.create(**ask, model="abc-r", max_tokens=1).usage.prompt_tokens == 2


def test_a_model_that_can_not_reason_has_no_name_with_r(client, ask):
    with pytest.raises(BadRequestError, match="'abc-r' asks for reasoning by default") as caught:
        client.chat.completions.create(**ask, model="abc-r")
    assert (caught.value.param, caught.value.code) == ("model", "reasoning_not_supported")
    assert client.completions.create(model="abc-r", prompt="w", temperature=0).choices[0].text == "xyz"
    with pytest.raises(NotFoundError, match="weights of 'cai-llama-3-1-8b-slim'"):
        client.chat.completions.create(**ask, model="cai-llama-3-1-8b-slim-r")


@pytest.mark.parametrize("name", ["whisper-large-v3", "cai-whisper-large-v3-turbo-slim"])
def test_models_that_write_no_text(new_client, factory, model_dir, ask, name):
    client = new_client(models={name: model_dir})
    for call in (lambda: client.chat.completions.create(**ask, model=name),
                 lambda: client.completions.create(prompt="x", model=name)):  # fmt: skip
        with pytest.raises(BadRequestError, match="support_chat_completion") as caught:
            call()
        assert caught.value.param == "model"
    assert factory.opened == []


@pytest.mark.parametrize("models", ["abc", ["abc"], {3: "dir"}, {"": "dir"}])
def test_models_must_be_names_and_directories(new_client, models):
    with pytest.raises(TypeError, match="models must map names"):
        new_client(models=models)


def test_options_reach_the_engine(new_client, factory, model_dir, ask):
    new_client(model_dir).chat.completions.create(**ask)
    new_client(model_dir, device="cpu", dtype="bfloat16", kv_cache="2GiB", max_context=64, max_batch=3,
               prefill_chunk=7, prefix_cache=False, max_waiting=9,
               progress=False).chat.completions.create(**ask)  # fmt: skip
    assert factory.options[0] == {"device": "auto", "dtype": "auto"}
    assert factory.options[1] == {"device": "cpu", "dtype": "bfloat16", "kv_cache": "2GiB", "max_context": 64,
                                  "max_batch": 3, "prefill_chunk": 7, "prefix_cache": False, "max_waiting": 9,
                                  "progress": False}  # fmt: skip


def test_threads_open_a_model_once_and_do_not_hold_up_others(new_client, factory, model_dir, tmp_path, ask):
    other = make_dir(tmp_path / "other")
    client = new_client(models={"abc": model_dir, "other": other})
    factory.holds[model_dir] = threading.Event()
    replies = []
    threads = [
        threading.Thread(target=lambda: replies.append(client.chat.completions.create(**ask, model="abc")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    assert client.chat.completions.create(**ask, model="other").model == "other"
    assert replies == []
    factory.holds[model_dir].set()
    for thread in threads:
        thread.join(timeout=60)
    assert len(replies) == 8
    assert sorted(path.name for path in factory.opened) == ["alphabet", "other"]


def test_unload(client, factory, ask):
    assert not client.models.unload("abc")
    client.chat.completions.create(**ask)
    assert client.models.unload("abc") and factory.runners[0].closed
    assert not client.models.unload("abc")
    client.chat.completions.create(**ask)  # opens again
    assert len(factory.opened) == 2 and not factory.runners[1].closed
    with pytest.raises(NotFoundError):
        client.models.unload("nothing")


def test_close(new_client, factory, model_dir, tmp_path, ask):
    other = make_dir(tmp_path / "other")
    with new_client(models={"abc": model_dir, "other": other}) as client:
        for name in ("abc", "other"):
            client.chat.completions.create(**ask, model=name)
    client.close()
    assert [runner.closed for runner in factory.runners] == [True, True]
    for call in (lambda: client.chat.completions.create(**ask, model="abc"),
                 lambda: client.completions.create(prompt="x", model="abc")):  # fmt: skip
        with pytest.raises(InternalServerError, match="closed"):
            call()
    assert len(factory.opened) == 2


def test_close_while_a_model_loads(new_client, factory, model_dir, ask):
    client = new_client(model_dir)
    factory.holds[model_dir] = threading.Event()
    errors = []

    def use():
        try:
            client.chat.completions.create(**ask)
        except APIError as error:
            errors.append(error.code)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not factory.opened:
        time.sleep(0.001)
    closing = threading.Thread(target=client.close)
    closing.start()
    while not client._host._closed:
        time.sleep(0.001)
    factory.holds[model_dir].set()
    for thread in [*threads, closing]:
        thread.join(timeout=60)
    assert all(runner.closed for runner in factory.runners) and len(factory.opened) == 1
    assert set(errors) <= {"client_closed", "engine_closed"} and len(errors) >= 2


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (CheckpointError("cut short", file="x.safetensors"), UnprocessableEntityError, "invalid_checkpoint"),
        (UnsupportedModelError("no such architecture"), UnprocessableEntityError, "unsupported_model"),
        (MemoryBudgetError("too big"), InternalServerError, "insufficient_memory"),
        (OSError("disk"), InternalServerError, None),
    ],
)
def test_a_model_that_does_not_open(client, factory, model_dir, ask, error, kind, code):
    factory.errors[model_dir] = error
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**ask)
    assert caught.value.code == code and caught.value.__cause__ is error and str(error) in caught.value.message
    del factory.errors[model_dir]
    client.chat.completions.create(**ask)  # the failure is not remembered
