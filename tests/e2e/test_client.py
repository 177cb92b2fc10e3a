"""The clients over a real model: sensible answers in the objects of the API, whole and streamed, sync and async."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

import cai_runtime

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(smollm2_dir: Path) -> Iterator[cai_runtime.Client]:
    with cai_runtime.Client(model="smol", models={"smol": smollm2_dir}, kv_cache="128MiB") as client:
        yield client


def test_chat_answers_and_validates(client: cai_runtime.Client):
    reply = client.chat.completions.create(messages=QUESTION, temperature=0, max_tokens=40)
    ChatCompletion.model_validate(reply.model_dump(), strict=True)
    message = reply.choices[0].message
    assert "Paris" in (message.content or "") and reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens == reply.usage.total_tokens


def test_the_stream_folds_to_the_reply(client: cai_runtime.Client):
    options = {"messages": QUESTION, "temperature": 0, "max_tokens": 40, "seed": 1}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_stop_string_never_leaks(client: cai_runtime.Client):
    whole = client.completions.create(prompt="One, two, three,", temperature=0, max_tokens=12).choices[0].text
    stop = whole.strip()[3:7]
    stopped = client.completions.create(prompt="One, two, three,", temperature=0, max_tokens=12, stop=stop)
    Completion.model_validate(stopped.model_dump(), strict=True)
    assert stopped.choices[0].text == whole[: whole.index(stop)] and stopped.choices[0].finish_reason == "stop"
    pieces = client.completions.create(prompt="One, two, three,", temperature=0, max_tokens=12, stop=stop, stream=True)
    assert "".join(c.choices[0].text for c in pieces) == stopped.choices[0].text


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(smollm2_dir: Path, client: cai_runtime.Client):
    async def crowd() -> list[str | None]:
        async with cai_runtime.AsyncClient(model=str(smollm2_dir), kv_cache="128MiB") as many:
            replies = await asyncio.gather(
                *(
                    many.chat.completions.create(
                        messages=QUESTION, temperature=0.9, top_p=0.95, seed=i % 3, max_tokens=12
                    )
                    for i in range(9)
                )
            )
            return [r.choices[0].message.content for r in replies]

    alone = [
        client.chat.completions.create(messages=QUESTION, temperature=0.9, top_p=0.95, seed=seed, max_tokens=12)
        for seed in range(3)
    ]
    assert asyncio.run(crowd()) == [r.choices[0].message.content for r in alone] * 3


def test_module_level_functions(smollm2_dir: Path):
    try:
        reply = cai_runtime.chat("Say hello.", model=str(smollm2_dir), max_tokens=4, temperature=0)
        assert isinstance(reply, ChatCompletion)
        completion = cai_runtime.complete("Two plus two is", model=str(smollm2_dir), max_tokens=4, temperature=0)
        assert isinstance(completion, Completion)
        assert len([m for m in cai_runtime.list_models().data if m.owned_by != "local"]) == 16
    finally:
        cai_runtime.close()
