"""AsyncClient: the same replies, without blocking the event loop."""

import asyncio
import gc
import threading

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cai_runtime import BadRequestError, InternalServerError, NotFoundError


def test_replies_equal_the_synchronous_ones(async_client, client, ask, valid):
    request = {**ask, "temperature": 1, "seed": 3, "n": 2}

    async def run():
        whole = await async_client.chat.completions.create(**request)
        stream = await async_client.chat.completions.create(**request, stream=True)
        chunks = [chunk async for chunk in stream]
        text = await async_client.completions.create(prompt="w", temperature=0)
        pieces = [p async for p in await async_client.completions.create(prompt="w", temperature=0, stream=True)]
        await async_client.close()
        return whole, chunks, text, pieces

    whole, chunks, text, pieces = asyncio.run(run())
    valid(whole, ChatCompletion)
    valid(text, Completion)
    for chunk in chunks:
        valid(chunk, ChatCompletionChunk)
    expected = client.chat.completions.create(**request)
    assert [c.message.content for c in whole.choices] == [c.message.content for c in expected.choices]
    expected_chunks = list(client.chat.completions.create(**request, stream=True))
    assert [chunk.choices for chunk in chunks] == [chunk.choices for chunk in expected_chunks]
    assert text.choices[0].text == "xyz" == "".join(piece.choices[0].text for piece in pieces)


def test_two_tasks_on_one_stream(async_client, ask):
    """Each chunk goes to one of them."""

    async def run():
        stream = await async_client.chat.completions.create(**ask, stream=True)

        async def consume():
            return [chunk.choices[0].delta.content or "" async for chunk in stream]

        pieces = await asyncio.gather(consume(), consume())
        await async_client.close()
        return pieces

    assert sorted("".join(map("".join, asyncio.run(run())))) == sorted("abcdefghijklmnopqrstuvwxyz")


def test_many_tasks_open_a_model_once(async_client, factory, ask):
    async def run():
        async with async_client:
            return await asyncio.gather(*(async_client.chat.completions.create(**ask) for _ in range(40)))

    replies = asyncio.run(run())
    assert {reply.choices[0].message.content for reply in replies} == {"abcdefghijklmnopqrstuvwxyz"}
    assert len(factory.opened) == 1 and factory.runners[0].closed


def test_loading_blocks_neither_the_loop_nor_other_models(factory, tmp_path, ask):
    """More waiters than the default executor has threads."""
    from cai_runtime.client import AsyncClient

    slow, fast = tmp_path / "slow", tmp_path / "fast"
    slow.mkdir()
    fast.mkdir()
    factory.holds[slow] = threading.Event()

    async def run():
        client = AsyncClient(models={"slow": slow, "fast": fast}, _engine_factory=factory)
        waiting = [asyncio.create_task(client.chat.completions.create(**ask, model="slow")) for _ in range(50)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # one who gives up must not take the load from the others
        assert (await client.chat.completions.create(**ask, model="fast")).model == "fast"
        assert not any(task.done() for task in waiting[1:])
        factory.holds[slow].set()
        replies = await asyncio.gather(*waiting[1:])
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        await client.close()
        return replies

    assert all(reply.model == "slow" for reply in asyncio.run(run()))
    assert sorted(path.name for path in factory.opened) == ["fast", "slow"]


def test_errors(async_client, factory, model_dir, ask):
    async def run():
        with pytest.raises(BadRequestError):
            await async_client.chat.completions.create(**ask, top_k=-2)
        with pytest.raises(NotFoundError):
            await async_client.chat.completions.create(**ask, model="nothing")
        factory.errors[model_dir] = ValueError("broken")
        for _ in range(2):  # a failed load is tried again
            with pytest.raises(InternalServerError, match="broken"):
                await async_client.chat.completions.create(**ask)
        del factory.errors[model_dir]
        await async_client.chat.completions.create(**ask)
        factory.runners[0].fail = RuntimeError("device on fire")
        with pytest.raises(InternalServerError, match="device on fire"):
            async for _ in await async_client.chat.completions.create(**ask, stream=True):
                pass
        await async_client.close()
        with pytest.raises(InternalServerError, match="closed"):
            await async_client.chat.completions.create(**ask)

    asyncio.run(run())


@pytest.mark.parametrize("how", ["close", "with", "drop", "cancel", "cancel whole"])
def test_leaving_early_aborts(async_client, factory, ask, how):
    factory.pause_before_step(10, full=2)
    request = {**ask, "max_tokens": 150, "ignore_eos": True, "n": 2}

    async def consume(seen):
        async for chunk in await async_client.chat.completions.create(**request, stream=True):
            seen.append(chunk)

    async def run():
        if how == "cancel whole":
            task = asyncio.create_task(async_client.chat.completions.create(**request))
            while not (
                factory.runners and factory.runners[0].full_steps >= 10 and not factory.runners[0].gate.is_set()
            ):
                await asyncio.sleep(0.001)
        elif how == "cancel":
            seen = []
            task = asyncio.create_task(consume(seen))
            while len(seen) < 10:
                await asyncio.sleep(0.001)
        else:
            stream = await async_client.chat.completions.create(**request, stream=True)
            for _ in range(10):
                await anext(stream)
            if how == "close":
                await stream.close()
                assert [chunk async for chunk in stream] == []
            elif how == "with":
                async with stream:
                    pass
            del stream
            gc.collect()
        if how.startswith("cancel"):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        factory.resume()
        (engine,) = factory.engines
        await asyncio.to_thread(engine.check_integrity)
        stats = engine.stats()
        assert (stats.aborted, stats.running, stats.finished) == (2, 0, 0)
        await async_client.close()

    asyncio.run(run())


def test_models(async_client, ask, model_dir):
    async def run():
        page = await async_client.models.list()
        assert page.object == "list" and [m.id async for m in page] == [m.id for m in page.data]
        assert page.data[-1].id == "abc"
        assert (await async_client.models.retrieve("glm-5-1")).owned_by == "zai-org"
        assert not await async_client.models.unload("abc")
        await async_client.chat.completions.create(**ask)
        assert await async_client.models.unload("abc")
        await async_client.close()

    asyncio.run(run())


def test_engine(async_client, factory, ask):
    async def run():
        engine = await async_client.engine()
        await async_client.chat.completions.create(**ask)
        assert engine is factory.engines[0] and engine.stats().finished == 1
        with pytest.raises(NotFoundError):
            await async_client.engine("nothing")
        await async_client.close()

    asyncio.run(run())
