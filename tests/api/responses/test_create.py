"""client.responses.create: what a response holds, what the model is given, and that the whole is the fold of the stream."""

import asyncio
import json
import threading

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

import cai_runtime
from cai_runtime import APIError, APITimeoutError, BadRequestError, InternalServerError
from cai_runtime.formats.events import ArgumentsEvent, EndEvent, MarkerEvent, ReasoningEvent, TextEvent, ToolCallEvent

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
STREAM_EVENT = TypeAdapter(ResponseStreamEvent)
WEATHER = {"type": "function", "name": "weather", "description": "Of a city.",
           "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}  # fmt: skip
CALL = [
    ReasoningEvent("I should look."),
    MarkerEvent(()),
    ToolCallEvent(0, "call_1", "weather"),
    ArgumentsEvent(0, '{"city": '),
    ArgumentsEvent(0, '"Rome"}'),
    EndEvent("tool_calls"),
]
ANSWER = [TextEvent("It rains."), EndEvent("stop")]
# The keys of the example in OpenAI's documentation of POST /v1/responses, whose shape the reference refers to.
DOCUMENTED = json.loads("""{
  "id": "resp_67ccd2bed1ec8190b14f964abc0542670bb6a6b452d3795b", "object": "response", "created_at": 1741476542,
  "status": "completed", "completed_at": 1741476543, "background": false, "error": null, "incomplete_details": null,
  "instructions": null, "max_output_tokens": null, "model": "gpt-5.4", "output": [{"type": "message",
  "id": "msg_67ccd2bf17f0819081ff3bb2cf6508e60bb6a6b452d3795b", "status": "completed", "role": "assistant",
  "content": [{"type": "output_text", "text": "In a peaceful grove", "annotations": []}]}],
  "parallel_tool_calls": true, "previous_response_id": null, "reasoning": {"effort": null, "summary": null},
  "store": true, "temperature": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
  "top_p": 1.0, "truncation": "disabled", "usage": {"input_tokens": 36, "input_tokens_details": {"cached_tokens": 0},
  "output_tokens": 87, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 123}, "user": null,
  "metadata": {}}""")


def ask(**params):
    return {"input": "hi", "temperature": 0, **params}


def test_whole_response(client, valid):
    response = client.responses.create(**ask())
    valid(response, Response)
    assert response.id.startswith("resp_") and response.output_text == ALPHABET
    assert (response.status, response.model, response.output[0].status) == ("completed", "abc", "completed")
    assert response.completed_at >= response.created_at
    prompt = len("user:hi\nassistant:\n")
    assert response.usage.model_dump(exclude_none=True) == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": prompt},
        "output_tokens": 27,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + 27,
    }


def missing(example, ours, place="response"):
    """Keys of `example` that `ours` lacks, and values of another type where both have one."""
    if isinstance(example, dict):
        for key, value in example.items():
            if key not in ours:
                yield f"{place}.{key}"
            else:
                yield from missing(value, ours[key], f"{place}.{key}")
    elif isinstance(example, list):
        for one, other in zip(example, ours, strict=True):
            yield from missing(one, other, place)
    elif example is not None and not isinstance(ours, (int, float) if isinstance(example, int) else type(example)):
        yield f"{place}: {ours!r}"


def test_every_key_of_the_documented_example_is_there(client):
    ours = json.loads(client.responses.create(**ask()).model_dump_json())
    assert list(missing(DOCUMENTED, ours)) == []


def test_stream(client):
    events = list(client.responses.create(**ask(stream=True)))
    for event in events:
        dumped = event.model_dump()
        assert STREAM_EVENT.validate_python(dumped, strict=True).model_dump() == dumped
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert deltas == list(ALPHABET)  # as they come
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed" and events[0].response.status == "in_progress"
    assert {event.response.id for event in (*events[:2], events[-1])} == {events[0].response.id}
    assert events[-1].response.usage.output_tokens == 27


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_output_tokens": 5},
        {"temperature": 1, "seed": 3, "top_p": 0.9, "top_k": 4, "ignore_eos": True, "max_output_tokens": 40},
        {"stop": ["ghi"]},
        {"instructions": "be brief", "metadata": {"a": "b"}, "user": "u", "text": {"format": {"type": "text"}}},
    ],
)
def test_whole_response_is_fold_of_stream(client, options):
    def flat(response):
        dumped = response.model_dump(exclude={"id", "created_at", "completed_at"})
        dumped["usage"]["input_tokens_details"] = None  # the cache is warmer the second time
        for item in dumped["output"]:
            item.pop("id")
        return dumped

    whole = client.responses.create(**ask(**options))
    *_, last = client.responses.create(**ask(**options), stream=True)
    assert flat(last.response) == flat(whole)


def test_parameters_come_back(client):
    params = {
        "instructions": "be brief",
        "max_output_tokens": 3,
        "metadata": {"purpose": "test"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "user": "u",
        "temperature": 0.5,
        "top_p": 0.75,
        "truncation": "auto",
    }
    response = client.responses.create(input="hi", **params)
    assert {name: getattr(response, name) for name in params} == params
    assert (response.store, response.service_tier, response.top_logprobs) == (False, "default", 0)


def test_max_output_tokens(client):
    response = client.responses.create(**ask(max_output_tokens=3))
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.output_text, response.output[0].status) == ("abc", "incomplete")
    assert response.completed_at is None
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(**ask(max_output_tokens=500))
    assert (caught.value.param, caught.value.code) == ("max_output_tokens", "context_length_exceeded")


def test_instructions_come_first(client, prompts):
    client.responses.create(**ask(max_output_tokens=1))
    prompts()
    client.responses.create(**ask(instructions="be brief", max_output_tokens=1))
    assert prompts() == ["system:be brief\nuser:hi\nassistant:\n"]


def test_calls_and_their_outputs(client, scripted, prompts):
    """The loop of an agent: the response's output goes back as it is, with the outputs of its calls."""
    format = scripted(CALL, ANSWER)
    first = client.responses.create(input="Rome?", tools=[WEATHER])
    assert [item.type for item in first.output] == ["reasoning", "function_call"]
    thought, call = first.output
    assert thought.content[0].text == "I should look." and thought.summary == []
    assert (call.name, call.call_id, call.arguments) == ("weather", "call_1", '{"city": "Rome"}')
    assert first.usage.output_tokens_details.reasoning_tokens == 1 and first.output_text == ""
    assert first.tools[0].model_dump(exclude_none=True) == {**WEATHER, "strict": False}
    prompts()
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    second = client.responses.create(
        input=[{"role": "user", "content": "Rome?"}, *first.output, output], tools=[WEATHER]
    )
    assert second.output_text == "It rains."
    (prompt,) = prompts()
    assert prompt.startswith('user:Rome?\nassistant:(I should look.)[weather {"city": "Rome"}]\ntool:rain\ntool {')
    assert [tool.name for tool in format.conversations[1].tools] == ["weather"]


@pytest.mark.parametrize(
    ("choice", "conversation_choice", "names"),
    [
        ("auto", "auto", ["weather", "time"]),
        ("none", "none", ["weather", "time"]),
        ("required", "required", ["weather", "time"]),
        ({"type": "function", "name": "time"}, "time", ["weather", "time"]),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "time"}]}, "auto", ["time"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]}, "required",
         ["time"]),
    ],
)  # fmt: skip
def test_tool_choice(client, scripted, choice, conversation_choice, names):
    format = scripted(ANSWER)
    tools = [WEATHER, {"type": "function", "name": "time", "parameters": None, "strict": True}]
    response = client.responses.create(input="?", tools=tools, tool_choice=choice, parallel_tool_calls=False)
    (conversation,) = format.conversations
    assert getattr(conversation.tool_choice, "name", conversation.tool_choice) == conversation_choice
    assert [tool.name for tool in conversation.tools] == names and not conversation.parallel_tool_calls
    assert [tool.name for tool in response.tools] == ["weather", "time"]
    assert response.model_dump(exclude_none=True)["tool_choice"] == choice


def test_reasoning(client, scripted):
    format = scripted([ReasoningEvent("hm"), EndEvent("length")])
    response = client.responses.create(input="?", reasoning={"effort": "high"}, reasoning_max_tokens=9)
    reasoning = format.conversations[0].reasoning
    assert (reasoning.effort, reasoning.max_tokens) == ("high", 9) and response.reasoning.effort == "high"
    # It ended inside the thought, with tokens left.
    assert (response.status, response.incomplete_details.reason) == ("incomplete", None)
    assert response.output[0].content[0].text == "hm"


def test_json_schema(client):
    schema = {"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"], "additionalProperties": False}
    text = {"format": {"type": "json_schema", "name": "t", "schema": schema}}
    response = client.responses.create(**ask(text=text))
    assert json.loads(response.output_text) == {"a": "b"} and response.status == "completed"
    echoed = json.loads(response.model_dump_json(by_alias=True, exclude_none=True))["text"]["format"]
    assert echoed == {**text["format"], "strict": False}
    assert json.loads(client.responses.create(**ask(text=response.text)).output_text) == {"a": "b"}
    assert client.responses.create(**ask(choice=["q"])).output_text == "q"
    for param, options in [("text.format", {"text": text, "choice": ["q"]}),
                           ("ignore_eos", {"text": text, "ignore_eos": True})]:  # fmt: skip
        with pytest.raises(BadRequestError) as caught:
            client.responses.create(**ask(**options))
        assert caught.value.param == param


INCLUDE = {"include": ["message.output_text.logprobs"]}


def test_logprobs(client, valid):
    params = ask(max_output_tokens=3, top_logprobs=2, **INCLUDE)
    whole = client.responses.create(**params)
    valid(whole, Response)
    listed = whole.output[0].content[0].logprobs
    assert [each.token for each in listed] == ["a", "b", "c"] and whole.top_logprobs == 2
    for each in listed:
        assert len(each.top_logprobs) == 2 and each.top_logprobs[0].logprob == each.logprob < 0
        assert bytes(each.bytes).decode() == each.token
    chat = client.chat.completions.create(
        messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    assert [each.model_dump() for each in listed] == [each.model_dump() for each in chat.choices[0].logprobs.content]

    events = list(client.responses.create(**params, stream=True))
    for event in events:
        dumped = event.model_dump()
        assert STREAM_EVENT.validate_python(dumped, strict=True).model_dump() == dumped
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert [each.token for event in deltas for each in event.logprobs] == [each.token for each in done.logprobs]
    assert events[-1].response.output[0].content[0].logprobs == listed


def test_logprobs_are_of_the_text_alone(client, scripted):
    scripted([*CALL[:2], TextEvent("a"), MarkerEvent(()), TextEvent("b"), *CALL[2:]])
    response = client.responses.create(input="?", **INCLUDE)
    _, message, _ = response.output
    assert len(message.content[0].logprobs) == 2 and message.content[0].logprobs[0].top_logprobs == []


def test_top_logprobs_need_the_include(client):
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(**ask(top_logprobs=1))
    assert caught.value.param == "top_logprobs"


def test_a_schema_that_cannot_be_enforced_is_refused_by_its_place(client):
    text = {"format": {"type": "json_schema", "name": "t", "schema": {"type": "object", "properties": 3}}}
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(**ask(text=text))
    assert caught.value.param == "text.format.schema"


def test_failure_in_the_stream(client, factory):
    factory.pause_before_step(10)
    stream = client.responses.create(**ask(stream=True, ignore_eos=True, store=True))
    seen = [next(stream) for _ in range(6)]
    while factory.runners[0].gate.is_set():
        pass
    factory.runners[0].fail = RuntimeError("device on fire")
    factory.resume()
    with pytest.raises(InternalServerError, match="device on fire"):
        for event in stream:
            seen.append(event)  # noqa: PERF402 - a list is wanted up to the failure
    assert [event.type.removeprefix("response.") for event in seen[-4:]] == [
        "output_text.done", "content_part.done", "output_item.done", "failed"]  # fmt: skip
    failed = seen[-1].response
    assert (failed.status, failed.error.code) == ("failed", "server_error") and "on fire" in failed.error.message
    assert client.responses.retrieve(failed.id) == failed


def test_timeout_in_the_stream(client, factory):
    factory.pause_before_step(10)
    client.engine()  # loading counts, and may take longer
    stream = client.responses.create(**ask(stream=True, ignore_eos=True, store=True), timeout=0.05)
    seen = []
    with pytest.raises(APITimeoutError):
        for event in stream:
            seen.append(event)  # noqa: PERF402
    assert seen[-1].type == "response.failed" and "0.05 s" in seen[-1].response.error.message
    assert client.responses.retrieve(seen[0].response.id).status == "failed"
    factory.resume()
    factory.engines[0].check_integrity()
    assert factory.engines[0].stats().aborted == 1


def test_leaving_a_stream_frees_the_request(client, factory):
    factory.pause_before_step(10)
    with client.responses.create(**ask(stream=True, ignore_eos=True, store=True)) as stream:
        created = next(stream)
    factory.resume()
    (engine,) = factory.engines
    engine.check_integrity()
    assert (engine.stats().aborted, engine.stats().running) == (1, 0)
    assert client.responses.retrieve(created.response.id).status == "cancelled"


def test_cancel_a_running_response(client, factory):
    factory.pause_before_step(10)
    stream = client.responses.create(**ask(stream=True, ignore_eos=True, store=True))
    seen = [next(stream) for _ in range(6)]
    response_id = seen[0].response.id
    running = client.responses.retrieve(response_id)
    assert (running.status, running.output_text) == ("in_progress", "ab")
    cancelled = client.responses.cancel(response_id)
    assert (cancelled.status, cancelled.output[0].status) == ("cancelled", "incomplete")
    factory.resume()
    with pytest.raises(APIError) as caught:
        for event in stream:
            seen.append(event)  # noqa: PERF402
    assert caught.value.code == "request_aborted" and seen[-1].type == "response.output_item.done"
    assert client.responses.cancel(response_id) == cancelled  # again is no error


def test_cancel_of_a_finished_response_returns_it(client):
    response = client.responses.create(**ask(store=True))
    assert client.responses.cancel(response.id) == response


def test_many_threads(client):
    """Each gets its own response, streamed or whole, and all of them are kept."""
    failures, ids = [], set()

    def work(i):
        try:
            if i % 2:
                response = client.responses.create(**ask(input=f"q{i}", store=True, max_output_tokens=1 + i % 26))
            else:
                *_, last = client.responses.create(
                    **ask(input=f"q{i}", store=True, max_output_tokens=1 + i % 26), stream=True
                )
                response = last.response
            assert response.output_text == ALPHABET[: 1 + i % 26]
            assert client.responses.retrieve(response.id) == response
            (item,) = client.responses.input_items.list(response.id).data
            assert item.content[0].text == f"q{i}"
            ids.add(response.id)
        except BaseException as error:  # noqa: BLE001 - seen by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == [] and len(ids) == 50


def test_async(async_client):
    async def run():
        whole = await async_client.responses.create(**ask(store=True))
        stream = await async_client.responses.create(**ask(stream=True, previous_response_id=whole.id, store=True))
        events = [event async for event in stream]
        last = events[-1].response
        assert (whole.output_text, last.output_text) == (ALPHABET, ALPHABET)
        assert await async_client.responses.retrieve(last.id) == last
        texts = [item.content[0].text async for item in async_client.responses.input_items.list(last.id, limit=1)]
        page = await async_client.responses.input_items.list(last.id)
        body = {"after": page.first_id, "limit": 1}
        rest = [item async for item in async_client.responses.input_items.list(last.id, extra_body=body)]
        assert rest == page.data[1:]
        assert texts == [item.content[0].text for item in page.data] == ["hi", ALPHABET, "hi"]
        async with await async_client.responses.create(**ask(stream=True, store=True, ignore_eos=True)) as left:
            created = await anext(left)
        assert (await async_client.responses.retrieve(created.response.id)).status == "cancelled"
        assert (await async_client.responses.cancel(last.id)).status == "completed"
        await async_client.responses.delete(last.id)
        with pytest.raises(cai_runtime.NotFoundError):
            await async_client.responses.retrieve(last.id)

    asyncio.run(run())


def test_async_failure(async_client, factory):
    async def run():
        stream = await async_client.responses.create(**ask(stream=True, ignore_eos=True, store=True))
        seen = [await anext(stream) for _ in range(6)]
        while factory.runners[0].gate.is_set():
            await asyncio.sleep(0)
        factory.runners[0].fail = RuntimeError("device on fire")
        factory.resume()
        with pytest.raises(InternalServerError, match="on fire"):
            async for event in stream:
                seen.append(event)  # noqa: PERF401 - a list is wanted up to the failure
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        assert seen[-1].type == "response.failed" and seen[-2].type == "response.output_item.done"
        with pytest.raises(InternalServerError, match="on fire"):
            await async_client.responses.create(**ask(store=True))
        assert len(async_client._responses) == 1  # the stream's alone

    factory.pause_before_step(10)
    asyncio.run(run())


def test_module_function(factory, model_dir):
    cai_runtime.configure(model=model_dir, _engine_factory=factory)
    try:
        first = cai_runtime.respond("hi", temperature=0, store=True)
        again = cai_runtime.respond("more", temperature=0, previous_response_id=first.id, max_output_tokens=2)
        assert (first.output_text, again.output_text) == (ALPHABET, "ab")
    finally:
        factory.resume()
        cai_runtime.close()


def test_the_reply_of_the_openai_types_goes_back(client, scripted):
    """Objects, dicts with every key, and JSON of an earlier output are all taken."""
    scripted(CALL, *[ANSWER] * 4)
    first = client.responses.create(input="Rome?", tools=[WEATHER])
    output = {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "rain"}]}
    for given in (
        first.output,
        [item.model_dump() for item in first.output],
        json.loads(first.model_dump_json())["output"],
    ):
        response = client.responses.create(input=[{"role": "user", "content": "?"}, *given, output], tools=[WEATHER])
        assert response.output_text == "It rains."
