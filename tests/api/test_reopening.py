"""Engines that end under a client: unloaded beside a request, dead of an error of their own, or failing to close."""

import asyncio
import os

import pytest

from cai_runtime import InternalServerError, NotFoundError
from cai_runtime.api import chat

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def content(reply):
    return reply.choices[0].message.content


def make_dir(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_spellings_of_a_directory_are_one_engine(new_client, factory, model_dir, ask, monkeypatch):
    link = model_dir.parent / "link"
    link.symlink_to(model_dir)
    monkeypatch.chdir(model_dir.parent)
    monkeypatch.setenv("HOME", str(model_dir.parent))
    client = new_client(models={"registered": link, "dotted": model_dir / ".." / "alphabet"})
    names = [str(model_dir), str(link), "alphabet", "./alphabet/", f"{model_dir}/../alphabet", "~/alphabet", "~/link",
             "registered", "dotted"]  # fmt: skip
    for name in names:
        assert client.chat.completions.create(**ask, model=name).model == name
    assert factory.opened == [model_dir]
    assert client.models.unload("~/link") and factory.runners[0].closed


def test_relative_names_survive_a_change_of_directory(new_client, factory, model_dir, ask, monkeypatch):
    monkeypatch.chdir(model_dir.parent)
    client = new_client("./alphabet", models={"mine": "alphabet"})
    monkeypatch.chdir("/")
    assert client.chat.completions.create(**ask).model == "./alphabet"
    assert client.chat.completions.create(**ask, model="mine").model == "mine"
    assert client.models.retrieve("./alphabet").id == "./alphabet"
    assert factory.opened == [model_dir]


class Died(BaseException):
    """No Exception: the engine does not take it for a failure of the model on one request."""


def break_engine(factory):
    """The last engine dies in its next step."""
    factory.runners[-1].fail = Died("of an error of its own")


def test_a_dead_engine_is_opened_again_by_the_next_request(client, factory, ask):
    client.chat.completions.create(**ask)
    break_engine(factory)
    with pytest.raises(InternalServerError) as caught:
        client.chat.completions.create(**ask)
    assert caught.value.code == "engine_closed"  # the request that was in it is not run twice
    assert content(client.chat.completions.create(**ask)) == ALPHABET
    assert content(client.chat.completions.create(**ask)) == ALPHABET
    assert len(factory.opened) == 2 and [runner.closed for runner in factory.runners] == [True, False]


def test_engine_gives_an_engine_that_lives(client, factory, ask):
    dead = client.engine()
    break_engine(factory)
    with pytest.raises(InternalServerError):
        client.chat.completions.create(**ask)
    assert client.engine() is not dead and client.engine().alive


def test_a_dead_engine_is_opened_again_for_async_clients(async_client, factory, ask):
    async def run():
        await async_client.chat.completions.create(**ask)
        break_engine(factory)
        with pytest.raises(InternalServerError):
            await async_client.chat.completions.create(**ask)
        replies = await asyncio.gather(*(async_client.chat.completions.create(**ask) for _ in range(8)))
        await async_client.close()
        return replies

    assert {content(reply) for reply in asyncio.run(run())} == {ALPHABET}
    assert len(factory.opened) == 2


def unload_once_beside(monkeypatch, client):
    """The first request's model is unloaded between its lookup and its start."""
    prepare, left = chat.prepare, [1]

    def prepare_and_unload(request, name, opened):
        found = prepare(request, name, opened)
        if left:
            left.pop()
            assert client._host.unload("abc")
        return found

    monkeypatch.setattr(chat, "prepare", prepare_and_unload)


def test_unloaded_between_lookup_and_start(client, factory, ask, monkeypatch):
    unload_once_beside(monkeypatch, client)
    assert content(client.chat.completions.create(**ask)) == ALPHABET
    assert len(factory.opened) == 2 and factory.runners[0].closed


def test_unloaded_between_lookup_and_start_async(async_client, factory, ask, monkeypatch):
    unload_once_beside(monkeypatch, async_client)

    async def run():
        async with async_client:
            return content(await async_client.chat.completions.create(**ask))

    assert asyncio.run(run()) == ALPHABET
    assert len(factory.opened) == 2


def test_an_engine_of_another_process_is_not_opened_again(client, factory, ask, monkeypatch):
    """After a fork: opening would hang in the libraries that the parent had used."""
    client.chat.completions.create(**ask)
    opened = client._host.open(client._host.resolve("abc"))
    monkeypatch.setattr(os, "getpid", lambda: opened.process + 1)
    assert not client._host.discard(client._host.resolve("abc"), opened)
    assert client._host.open(client._host.resolve("abc")) is opened


@pytest.mark.parametrize("failing", [1, 2])
def test_close_closes_every_engine(new_client, factory, tmp_path, ask, failing):
    names = ["one", "two", "three"]
    client = new_client(models={name: make_dir(tmp_path / name) for name in names})
    for name in names:
        client.chat.completions.create(**ask, model=name)

    def fail(runner):
        runner.closed = True
        raise RuntimeError("device lost")

    for runner in factory.runners[:failing]:
        runner.close = lambda runner=runner: fail(runner)
    with pytest.raises(RuntimeError if failing == 1 else ExceptionGroup) as caught:
        client.close()
    assert [runner.closed for runner in factory.runners] == [True] * 3
    if failing == 2:
        assert [str(error) for error in caught.value.exceptions] == ["device lost"] * 2
    client.close()


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 5000, "\ud800", "a\0b", "/" + "y/" * 3000])
def test_odd_names(client, name, ask):
    for call in (lambda: client.chat.completions.create(**ask, model=name), lambda: client.models.retrieve(name),
                 lambda: client.models.unload(name), lambda: client.engine(name)):  # fmt: skip
        with pytest.raises(NotFoundError) as caught:
            call()
        assert (caught.value.status_code, caught.value.param) == (404, "model")
        assert len(str(caught.value)) < 400 and str(caught.value).encode()
