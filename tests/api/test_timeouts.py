"""`timeout`: the caller gets openai's APITimeoutError, and the request is freed."""

import asyncio
import copy
import pickle
import threading

import openai
import pytest

import cai_runtime
from cai_runtime import APITimeoutError

LONG = {"max_tokens": 150, "ignore_eos": True}
SHORT = 0.05


@pytest.fixture
def stuck(client, factory, ask):
    """A client whose model stands still from its tenth step on."""
    factory.pause_before_step(10)
    client.engine()  # loading counts, and may take longer than the tests' timeouts
    return client


def assert_free(factory, aborted):
    factory.resume()
    (engine,) = factory.engines
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.aborted, stats.running, stats.waiting) == (aborted, 0, 0)


@pytest.mark.parametrize("timeout", [SHORT, openai.Timeout(SHORT)])
def test_whole_reply(stuck, factory, ask, timeout):
    with pytest.raises(openai.APITimeoutError, match="0.05 s") as caught:
        stuck.chat.completions.create(**ask, **LONG, n=2, timeout=timeout)
    assert isinstance(caught.value, APITimeoutError) and isinstance(caught.value, openai.APIConnectionError)
    assert (caught.value.code, caught.value.status_code) == ("timeout", 408)
    assert_free(factory, aborted=2)


def test_none_of_a_request_is_no_limit_whatever_the_clients_is(client, ask):
    client.engine()
    hurried = client.with_options(timeout=1e-9)
    for not_given in ({}, {"timeout": openai.NOT_GIVEN}):
        with pytest.raises(APITimeoutError):
            hurried.chat.completions.create(**ask, **not_given)
    assert hurried.chat.completions.create(**ask, timeout=None).choices


def test_stream_waits_that_long_for_each_chunk(stuck, factory, ask):
    stream = stuck.chat.completions.create(**ask, **LONG, stream=True, timeout=0.5)
    for _ in range(10):
        next(stream)
    with pytest.raises(APITimeoutError):
        list(stream)
    assert_free(factory, aborted=1)


def test_async(async_client, factory, ask):
    factory.pause_before_step(10)

    async def run():
        with pytest.raises(APITimeoutError):
            await async_client.chat.completions.create(**ask, **LONG, timeout=SHORT)
        stream = await async_client.chat.completions.create(**ask, **LONG, stream=True, timeout=SHORT)
        await anext(stream)
        with pytest.raises(APITimeoutError):
            [chunk async for chunk in stream]
        await asyncio.to_thread(assert_free, factory, 2)

    asyncio.run(run())


def test_loading_counts_and_goes_on(client, factory, model_dir, ask):
    factory.holds[model_dir] = threading.Event()
    for _ in range(2):
        with pytest.raises(APITimeoutError, match="not open"):
            client.chat.completions.create(**ask, timeout=SHORT)
    factory.holds[model_dir].set()
    client.chat.completions.create(**ask, timeout=30)
    assert len(factory.opened) == 1


def test_default_of_the_client(new_client, factory, model_dir, ask):
    client = new_client(model_dir, timeout=SHORT)
    factory.pause_before_step(10)
    with pytest.raises(APITimeoutError):
        client.completions.create(prompt="a", **LONG)
    with pytest.raises(APITimeoutError):
        client.with_options(max_retries=3).chat.completions.create(**ask, **LONG)
    factory.resume()
    for unlimited in ({"timeout": None}, {"timeout": 30}):
        client.chat.completions.create(**ask, **unlimited)
        client.with_options(**unlimited).chat.completions.create(**ask)
    assert len(factory.opened) == 1  # the copies have the same models


def test_no_timeout_no_limit(client, ask):
    assert client.chat.completions.create(**ask, timeout=openai.NOT_GIVEN).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda client: pickle.loads(pickle.dumps(client))])
@pytest.mark.parametrize("kind", [cai_runtime.Client, cai_runtime.AsyncClient])
def test_copies_are_new_clients_of_the_same_options(kind, again):
    client = kind("/nowhere", models={"a": "/b"}, max_batch=3, timeout=2, generation_config="none", format="plain")
    new = again(client)
    assert type(new) is kind and new is not client and new._host is not client._host
    assert repr(new) == repr(client) and new._host._options == client._host._options
    assert new._host._format_name == "plain"
    assert "max_batch=3" in repr(client) and "timeout=2" in repr(client)
