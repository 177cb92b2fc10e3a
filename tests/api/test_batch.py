"""`client.batch`: requests in OpenAI's batch format, answered as by the endpoints themselves."""

import asyncio
import gc
import json
import threading
import time

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from cai_runtime import Client, InternalServerError
from cai_runtime.errors import BatchFileError, OptionTypeError, OptionValueError

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def line(custom_id, url="/v1/completions", **body):
    body = body or {"prompt": "w", "temperature": 0}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path, *lines):
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def texts(results):
    return {r["custom_id"]: r["response"]["body"]["choices"][0]["text"] for r in results}


def test_every_endpoint_answers_as_it_does_alone(client, tmp_path, ask, valid):
    source = write(
        tmp_path / "in.jsonl",
        line("chat", "/v1/chat/completions", **ask),
        line("text"),
        line("response", "/v1/responses", input="hi", temperature=0),
    )
    summary = client.batch(source, tmp_path / "out.jsonl")
    assert (summary.total, summary.succeeded, summary.failed, summary.resumed) == (3, 3, 0, 0)
    found = {result["custom_id"]: result for result in read(tmp_path / "out.jsonl")}
    for result in found.values():
        assert sorted(result) == ["custom_id", "error", "id", "response"] and result["error"] is None
        assert result["id"].startswith("batch_req_")
        assert sorted(result["response"]) == ["body", "request_id", "status_code"]
        assert result["response"]["status_code"] == 200
    bodies = {custom_id: result["response"]["body"] for custom_id, result in found.items()}
    assert ChatCompletion.model_validate(bodies["chat"]).choices[0].message.content == ALPHABET
    assert Completion.model_validate(bodies["text"]).choices[0].text == "xyz"
    assert Response.model_validate(bodies["response"]).output_text == ALPHABET


BAD = {
    "no JSON": (b"{oh", "invalid_json_line", None),
    "no UTF-8": (b'{"custom_id": "\xff"}', "invalid_json_line", None),
    "not a number of JSON": (b'{"custom_id": NaN}', "invalid_json_line", None),
    "nested too deep": (b"[" * 100_000, "invalid_json_line", None),
    "no object": (b"[1]", "invalid_json_line", None),
    "no custom id": ({**line("x"), "custom_id": None}, "missing_required_parameter", "custom_id"),
    "custom id a number": ({**line("x"), "custom_id": 3}, "invalid_type", "custom_id"),
    "custom id empty": (line(""), "invalid_value", "custom_id"),
    "custom id again": ({**line("good"), "body": {"prompt": "x"}}, "duplicate_custom_id", "custom_id"),
    "no method": ({**line("x"), "method": None}, "missing_required_parameter", "method"),
    "method": ({**line("x"), "method": "GET"}, "invalid_method", "method"),
    "no url": ({**line("x"), "url": None}, "missing_required_parameter", "url"),
    "url": (line("x", "/v1/images"), "invalid_url", "url"),
    "no body": ({**line("x"), "body": None}, "missing_required_parameter", "body"),
    "body a text": ({**line("x"), "body": "{}"}, "invalid_type", "body"),
    "unknown field": ({**line("x"), "prompt": "w"}, "unknown_parameter", "prompt"),
}


@pytest.mark.parametrize("bad, code, param", BAD.values(), ids=BAD)
def test_what_is_no_request_gives_an_error_that_names_the_line(client, tmp_path, bad, code, param):
    source = write(tmp_path / "in.jsonl", line("good"), b"", bad, line("last"))
    summary = client.batch(source, tmp_path / "out.jsonl")
    assert (summary.succeeded, summary.failed) == (2, 1)
    (failed,) = (result for result in read(tmp_path / "out.jsonl") if result["error"])
    assert failed["response"] is None
    assert failed["custom_id"] == ("x" if isinstance(bad, dict) and bad["custom_id"] == "x" else None)
    error = failed["error"]
    assert (error["code"], error["line"], error["param"]) == (code, 3, param)
    assert error["message"].startswith("Line 3: ")
    assert client.batch(source, tmp_path / "out.jsonl").resumed == 3


@pytest.mark.parametrize(
    "body, status, param",
    [
        ({"prompt": "w", "stream": True}, 400, "stream"),
        ({"prompt": "w", "extra_body": {"stream": True}}, 400, "stream"),
        ({"prompt": "w", "temperature": 9}, 400, "temperature"),
        ({"prompt": "w", "model": "nothing"}, 404, None),
        ({"prompt": "w", "timeout": 1e-9}, 408, None),
    ],
)
def test_what_an_endpoint_refuses_is_its_error_body(client, body, status, param):
    good, bad = client.batch([line("good"), line("bad", **body)], ordered=True)
    assert good["response"]["status_code"] == 200
    assert bad["error"] is None and bad["response"]["status_code"] == status
    assert sorted(bad["response"]["body"]["error"]) == ["code", "message", "param", "type"]
    assert param is None or bad["response"]["body"]["error"]["param"] == param


def test_lines_of_two_models(factory, model_dir, tmp_path, new_client):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    client = new_client(models={"abc": model_dir, "other": other})
    lines = [line(str(i), prompt="w", temperature=0, model=("abc", "other")[i % 2]) for i in range(6)]
    results = list(client.batch(lines))
    assert set(texts(results).values()) == {"xyz"} and len(results) == 6
    assert sorted(path.name for path in factory.opened) == ["alphabet", "other"]


def test_order_is_that_of_the_requests_where_it_is_asked_for(client):
    lines = [line(str(i), prompt="abcdefghijklmnopqrstuvwxy"[: 1 + i * 7 % 25], temperature=0, max_tokens=40)
             for i in range(50)]  # fmt: skip
    for window in (1, 3, None):
        results = list(client.batch(iter(lines), ordered=True, window=window))
        assert [result["custom_id"] for result in results] == [str(i) for i in range(50)]
    assert sorted(texts(client.batch(lines, window=4)), key=int) == [str(i) for i in range(50)]


def test_no_more_than_the_window_is_read_ahead(client, factory):
    taken = []

    def requests():
        for i in range(500):
            taken.append(i)
            yield line(str(i))

    with client.batch(requests(), window=10) as results:
        for count, _ in enumerate(results, start=1):
            assert len(taken) <= count + 8 * 10 + 10
    assert len(taken) == 500


def test_a_shared_system_prompt_is_taken_from_the_prefix_cache(client, ask):
    messages = [{"role": "system", "content": "be brief and sing the alphabet"}, *ask["messages"]]
    lines = [line(str(i), "/v1/chat/completions", messages=[*messages[:1], {"role": "user", "content": str(i)}])
             for i in range(4)]  # fmt: skip
    results = client.batch(lines, window=1, ordered=True)
    details = [result["response"]["body"]["usage"]["prompt_tokens_details"] for result in results]
    assert [found["cached_tokens"] > 30 for found in details] == [False, True, True, True]


def test_a_full_engine_makes_the_batch_wait(model_dir, factory):
    """`max_waiting` refuses others' requests, not the batch's own."""

    def open_small(path, **options):
        engine = factory(path)
        engine._loop.inbox._most = 2
        return engine

    with Client("abc", models={"abc": model_dir}, _engine_factory=open_small) as client:
        results = list(client.batch([line(str(i)) for i in range(40)]))
        assert set(texts(results).values()) == {"xyz"} and len(results) == 40
        (never,) = client.batch([line("x", prompt="w", n=3)])
        assert never["response"]["status_code"] == 400


def test_a_dead_engine_fails_its_requests_and_the_next_ones_open_it_again(client, factory):
    lines = iter([line(str(i)) for i in range(30)])
    with client.batch(lines, window=2) as results:
        first = next(results)
        factory.engines[0].close()
        rest = list(results)
    statuses = [result["response"]["status_code"] for result in (first, *rest)]
    assert len(statuses) == 30 and set(statuses) <= {200, 500} and statuses[-1] == 200
    assert len(factory.engines) == 2


def test_a_closed_client_ends_the_batch(client, tmp_path):
    """Else every line left would be an error, and would count as done."""
    results = client.batch([line(str(i)) for i in range(100)], window=2)
    next(results)
    client.close()
    with pytest.raises(InternalServerError, match="closed"):
        list(results)
    assert list(results) == []


def endless(then_raise=False):
    """A line that is refused at once, and requests that run until they are stopped."""
    yield {**line("bad"), "method": "GET"}
    yield from [line(str(i), prompt="w", ignore_eos=True, max_tokens=150) for i in range(3)]
    if then_raise:
        raise KeyError("mine")


def assert_idle(factory):
    factory.resume()
    for engine in factory.engines:
        engine.check_integrity()
        assert engine.stats().running == engine.stats().waiting == 0


@pytest.mark.parametrize("how", ["close", "drop", "raise"])
def test_leaving_early_aborts_what_runs(client, factory, how):
    factory.pause_before_step(3)
    engine = client.engine()
    results = client.batch(endless(then_raise=how == "raise"))
    assert next(results)["error"]
    thread = results._loop._thread
    while not engine.stats().running:
        time.sleep(0.001)
    if how == "raise":
        with pytest.raises(KeyError, match="mine"):
            next(results)
    elif how == "close":
        got = []
        waiting = threading.Thread(target=got.extend, args=(results,))
        waiting.start()
        results.close()
        waiting.join()
        assert got == list(results) == []
    del results
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert_idle(factory)


def test_async_results_equal_the_synchronous_ones(async_client, client, tmp_path):
    lines = [line(str(i), prompt=ALPHABET[i], temperature=0) for i in range(20)]
    bad = {**line("bad"), "method": "GET"}
    source = write(tmp_path / "in.jsonl", *lines, bad)

    async def generate():
        for item in lines:
            yield item

    async def run():
        async with async_client:
            ordered = [result async for result in async_client.batch(lines, ordered=True, window=3)]
            of_async = [result async for result in async_client.batch(generate())]
            of_file = [result async for result in async_client.batch(source)]
            summary = await async_client.batch(source, tmp_path / "out.jsonl")
            again = await async_client.batch(source, tmp_path / "out.jsonl")
        return ordered, of_async, of_file, summary, again

    ordered, of_async, of_file, summary, again = asyncio.run(run())
    expected = texts(client.batch(lines))
    assert [result["custom_id"] for result in ordered] == [str(i) for i in range(20)]
    assert texts(ordered) == texts(of_async) == expected
    assert texts(r for r in of_file if not r["error"]) == expected and len(of_file) == 21
    assert (summary.succeeded, summary.failed, summary.resumed) == (20, 1, 0)
    assert (again.succeeded, again.failed, again.resumed) == (20, 1, 21)


@pytest.mark.parametrize("how", ["close", "drop", "cancel", "raise"])
def test_leaving_async_results_early_aborts_what_runs(async_client, factory, how):
    async def run():
        factory.pause_before_step(3)
        engine = await async_client.engine()
        results = async_client.batch(endless(then_raise=how == "raise"))
        assert (await anext(results))["error"]
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        if how == "raise":
            with pytest.raises(KeyError, match="mine"):
                await anext(results)
        elif how != "drop":
            waiting = asyncio.create_task(anext(results))
            await asyncio.sleep(0)
            await results.close() if how == "close" else waiting.cancel()
            with pytest.raises(StopAsyncIteration if how == "close" else asyncio.CancelledError):
                await waiting
            del waiting
        del results
        gc.collect()
        while asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(assert_idle, factory)
        await async_client.close()

    asyncio.run(run())


def test_arguments_are_checked(client, tmp_path):
    source = write(tmp_path / "in.jsonl", line("a"))
    for wrong in ({"ordered": 1}, {"window": "3"}, {"progress": "yes"}, {"output": 3}):
        with pytest.raises(OptionTypeError, match=next(iter(wrong))):
            client.batch(source, **wrong)
    with pytest.raises(OptionValueError, match="window"):
        client.batch(source, window=0)
    for wrong in (3, line("a"), None, b"in.jsonl"):
        with pytest.raises(OptionTypeError, match="source"):
            client.batch(wrong)
    with pytest.raises(OptionTypeError, match="source must be a file"):
        client.batch([line("a")], tmp_path / "out.jsonl")
    with pytest.raises(BatchFileError, match="nothing"):
        client.batch(tmp_path / "nothing", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
