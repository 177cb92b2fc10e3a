"""`parse` and `stream` of chat and Responses: the openai package's own objects, of our replies and streams."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Literal

import openai
import pydantic
import pytest
from openai.lib.streaming.chat import ChatCompletionStream
from openai.lib.streaming.responses import ResponseStream
from openai.types.chat import ParsedChatCompletion
from openai.types.responses import FunctionTool, ParsedResponse
from pydantic import BaseModel

from cai_runtime import BadRequestError


class Place(BaseModel):
    name: Literal["abc", "xyz"]
    far: bool


class Answer(BaseModel):
    """What the alphabet says."""

    place: Place
    other: Place | None = pydantic.Field(None, description="Another one.")


@pydantic.dataclasses.dataclass
class Point:
    axis: Literal["x", "y"]


POINT = {
    "type": "object",
    "properties": {"axis": {"enum": ["x", "y"]}},
    "required": ["axis"],
    "additionalProperties": False,
}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}
TOOL = openai.pydantic_function_tool(Place, name="look", description="Looks at a place.")
LOOSE = {"type": "function", "function": {"name": "loose", "parameters": {"type": "object", "properties": {}}}}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
RESPONSE = {"input": "hi", "temperature": 0}


@pytest.fixture(autouse=True)
def room(factory):
    """For tools, which are put to the model as text."""
    factory.prepare = lambda runner: setattr(runner, "max_context", 1000)


def bare(reply):
    """Without what differs from call to call, and what is not there."""
    dumped = reply.model_dump(exclude_none=True)
    for name in ("id", "created", "created_at", "completed_at"):
        dumped.pop(name, None)
    for item in dumped.get("output", ()):
        del item["id"]
        item.pop("call_id", None)
    for choice in dumped.get("choices", ()):
        for call in choice["message"].get("tool_calls", ()):
            del call["id"]
            call.pop("index", None)  # the package's accumulator leaves it
    if "usage" in dumped:  # the second of two equal prompts comes from the prefix cache
        details = "prompt_tokens_details" if "choices" in dumped else "input_tokens_details"
        dumped["usage"].pop(details, None)
    return dumped


class Sync:
    """Calls of both clients in one way."""

    def __init__(self, client):
        self.client = client

    def parse(self, endpoint, **params):
        return endpoint(self.client).parse(**params)

    def stream(self, endpoint, **params):
        with endpoint(self.client).stream(**params) as stream:
            events = list(stream)
        final = stream.get_final_response if hasattr(stream, "get_final_response") else stream.get_final_completion
        return events, final()


class Async(Sync):
    def parse(self, endpoint, **params):
        return asyncio.run(endpoint(self.client).parse(**params))

    def stream(self, endpoint, **params):
        async def run():
            async with endpoint(self.client).stream(**params) as stream:
                events = [event async for event in stream]
            final = stream.get_final_response if hasattr(stream, "get_final_response") else stream.get_final_completion
            return events, await final()

        return asyncio.run(run())


@pytest.fixture(params=["sync", "async"])
def both(request, client, async_client):
    return Sync(client) if request.param == "sync" else Async(async_client)


def chat(client):
    return client.chat.completions


def responses(client):
    return client.responses


def test_chat_of_a_model(both):
    reply = both.parse(chat, response_format=Answer, **CHAT)
    assert isinstance(reply, ParsedChatCompletion)
    message = reply.choices[0].message
    assert isinstance(message.parsed, Answer) and message.parsed == Answer.model_validate_json(message.content)

    events, final = both.stream(chat, response_format=Answer, stream_options={"include_usage": True}, **CHAT)
    assert final.choices[0].message.parsed == message.parsed and bare(final) == bare(reply)
    deltas = [event for event in events if event.type == "content.delta"]
    assert "".join(event.delta for event in deltas) == deltas[-1].snapshot == message.content
    (done,) = (event for event in events if event.type == "content.done")
    assert done.parsed == message.parsed
    assert "".join(e.chunk.choices[0].delta.content or "" for e in events if e.type == "chunk" and e.chunk.choices) == (
        message.content
    )


@pytest.mark.parametrize("more", [{}, {"n": 2}], ids=str)
def test_chat_with_a_tool_of_a_model(both, more):
    params = {
        **CHAT,
        **more,
        "tools": (tool for tool in [TOOL]),
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    reply = both.parse(chat, **params)
    calls = [call for choice in reply.choices for call in choice.message.tool_calls]
    assert len(calls) == more.get("n", 1)
    for call in calls:
        assert call.function.parsed_arguments == Place.model_validate_json(call.function.arguments)
    params["tools"] = [TOOL]
    events, final = both.stream(chat, stream_options={"include_usage": True}, **params)
    assert bare(final) == bare(reply)
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [call.function.parsed_arguments for call in calls]


def test_responses_of_a_model(both):
    response = both.parse(responses, text_format=Answer, **RESPONSE)
    assert isinstance(response, ParsedResponse) and isinstance(response.output_parsed, Answer)
    assert response.output_parsed == Answer.model_validate_json(response.output_text)

    events, final = both.stream(responses, text_format=Answer, **RESPONSE)
    assert final.output_parsed == response.output_parsed and bare(final) == bare(response)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == deltas[-1].snapshot == response.output_text
    (done,) = (event for event in events if event.type == "response.output_text.done")
    assert done.parsed == response.output_parsed
    assert events[-1].type == "response.completed" and events[-1].response.output_parsed == response.output_parsed


AS_OBJECT = FunctionTool(type="function", name="look", parameters=TOOL["function"]["parameters"], strict=True)


@pytest.mark.parametrize("tool", [TOOL, AS_OBJECT], ids=["model", "schema"])
def test_responses_with_a_tool(both, tool):
    params = {**RESPONSE, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    (call,) = both.parse(responses, **params).output
    place = Place.model_validate_json(call.arguments)
    assert call.name == "look" and call.parsed_arguments == (place if tool is TOOL else place.model_dump())
    events, final = both.stream(responses, **params)
    assert final.output[0].parsed_arguments == call.parsed_arguments
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert deltas[-1].snapshot == call.arguments


def test_without_a_format_nothing_is_parsed(both):
    reply, response = both.parse(chat, **CHAT), both.parse(responses, **RESPONSE)
    assert reply.choices[0].message.content == response.output_text and reply.choices[0].message.parsed is None
    assert response.output_parsed is None
    as_json = both.parse(chat, response_format=AS_SCHEMA, regex=openai.NOT_GIVEN, **CHAT).choices[0].message
    assert as_json.content == '{"axis":"x"}' and as_json.parsed is None


def test_other_formats(both):
    assert both.parse(chat, response_format=Point, **CHAT).choices[0].message.parsed == Point("x")
    assert both.parse(responses, text_format=Point, **RESPONSE).output_parsed == Point("x")
    assert both.parse(responses, text_format=Point, text={"verbosity": "medium"}, **RESPONSE).text.verbosity == "medium"


def test_parse_as(client):
    text = {"format": {"type": "json_schema", "name": "point", "schema": POINT}}
    assert client.responses.parse(text=text, parse_as=Point, **RESPONSE).output_parsed == Point("x")
    assert client.responses.parse(text_format=Point, parse_as=None, **RESPONSE).output_parsed is None


def test_thoughts_logprobs_and_our_own_parameters(both):
    params = {**CHAT, "response_format": Point, "logprobs": True, "top_k": 3, "seed": 1, "min_tokens": 2}
    reply = both.parse(chat, **params)
    events, final = both.stream(chat, **params)
    assert final.choices[0].logprobs == reply.choices[0].logprobs
    assert [event for event in events if event.type == "logprobs.content.done"]


def test_cut_off_answers_raise_the_packages_own_errors(both):
    with pytest.raises(openai.LengthFinishReasonError) as caught:
        both.parse(chat, response_format=Answer, max_tokens=5, **CHAT)
    assert caught.value.completion.usage.completion_tokens == 5
    with pytest.raises(openai.LengthFinishReasonError):
        both.stream(chat, response_format=Answer, max_tokens=5, **CHAT)
    with pytest.raises(pydantic.ValidationError):
        both.parse(responses, text_format=Answer, max_output_tokens=5, **RESPONSE)
    with pytest.raises(pydantic.ValidationError):
        both.stream(responses, text_format=Answer, max_output_tokens=5, **RESPONSE)
    with pytest.raises(RuntimeError, match=r"response\.completed"):  # after its events
        both.stream(responses, max_output_tokens=5, **RESPONSE)


@pytest.mark.parametrize("endpoint", [chat, responses])
def test_leaving_early_frees_the_request(client, factory, endpoint):
    factory.pause_before_step(10)
    params = {**(CHAT if endpoint is chat else RESPONSE), "ignore_eos": True}
    with endpoint(client).stream(**params) as stream:
        assert isinstance(stream, (ChatCompletionStream, ResponseStream))
        next(stream)
    assert_freed(factory)


@pytest.mark.parametrize("endpoint", [chat, responses])
def test_leaving_early_frees_the_request_of_an_async_client(async_client, factory, endpoint):
    factory.pause_before_step(10)
    params = {**(CHAT if endpoint is chat else RESPONSE), "ignore_eos": True}

    async def run():
        async with endpoint(async_client).stream(**params) as stream:
            await anext(stream)

    asyncio.run(run())
    assert_freed(factory)


def assert_freed(factory):
    factory.resume()
    (engine,) = factory.engines
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.aborted, stats.running, stats.waiting, stats.finished) == (1, 0, 0, 0)


@pytest.mark.parametrize("endpoint", [chat, responses])
@pytest.mark.parametrize("method", ["parse", "stream"])
@pytest.mark.parametrize("by_options", [False, True])
def test_a_timeout_frees_the_request(both, factory, endpoint, method, by_options):
    factory.pause_before_step(10)
    engine = both.client.engine()  # loading counts, and may take longer than the timeout
    if asyncio.iscoroutine(engine):
        asyncio.run(engine)
    params = {**(CHAT if endpoint is chat else RESPONSE), "ignore_eos": True}
    if by_options:
        both.client = both.client.with_options(timeout=0.2)
    else:
        params["timeout"] = 0.2
    with pytest.raises(openai.APITimeoutError):
        getattr(both, method)(endpoint, **params)
    assert_freed(factory)


@pytest.mark.filterwarnings("error")
def test_a_stream_that_is_not_entered_sends_nothing(client, async_client, factory):
    for one in (client, async_client):
        chat(one).stream(**CHAT)
        responses(one).stream(**RESPONSE)
    assert factory.opened == []


@dataclasses.dataclass
class Plain:
    axis: str


class NoSchema(BaseModel):
    call: Callable[[], None]


class Loose(BaseModel):
    some: set[int]


@pytest.mark.parametrize(
    ("endpoint", "params", "param"),
    [
        (chat, {"response_format": 3}, "response_format"),
        (chat, {"response_format": int}, "response_format"),
        (chat, {"response_format": Plain}, "response_format"),
        (chat, {"response_format": NoSchema}, "response_format"),
        (chat, {"response_format": Loose}, "response_format.json_schema.schema"),
        (chat, {"response_format": {"type": "xml"}}, "response_format.type"),
        (chat, {"response_format": Place, "regex": "a"}, "regex"),
        (chat, {"response_format": Place, "extra_body": {"response_format": {"type": "text"}}}, "response_format"),
        (chat, {"extra_body": {"stream": False}}, "stream"),
        (chat, {"tools": "look"}, "tools"),
        (chat, {"tools": ["look"]}, "tools[0]"),
        (chat, {"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        (chat, {"tools": [{"function": {}}]}, "tools[0].type"),
        (chat, {"tool": [TOOL]}, "tool"),
        (responses, {"text_format": 3}, "text_format"),
        (responses, {"text_format": {"type": "json_object"}}, "text_format"),
        (responses, {"text_format": NoSchema}, "text_format"),
        (responses, {"text_format": Loose}, "text.format.schema"),
        (responses, {"text_format": Place, "text": {"format": {"type": "text"}}}, "text.format"),
        (responses, {"text_format": Place, "text": "x"}, "text"),
        (responses, {"tools": [LOOSE]}, "tools[0]"),
        (responses, {"tools": 3}, "tools"),
        (responses, {"tools": [3]}, "tools[0]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["parse", "stream"])
def test_refused(both, endpoint, params, param, method):
    with pytest.raises(BadRequestError) as caught:
        getattr(both, method)(endpoint, **(CHAT if endpoint is chat else RESPONSE), **params)
    assert caught.value.param == param


def test_refused_by_one_of_them(client):
    for call, param in [
        (lambda: client.chat.completions.parse(tools=[LOOSE], **CHAT), "tools"),
        (lambda: client.chat.completions.parse(stream=True, **CHAT), "stream"),
        (lambda: client.chat.completions.stream(stream=False, **CHAT), "stream"),
        (lambda: client.responses.parse(stream=True, **RESPONSE), "stream"),
        (lambda: client.responses.parse(parse_as=3, **RESPONSE), "parse_as"),
        (lambda: client.responses.stream(response_id="resp_1"), "response_id"),
        (lambda: client.responses.stream(starting_after=3), "starting_after"),
    ]:
        with pytest.raises(BadRequestError) as caught:
            call()
        assert caught.value.param == param
