"""A real model that calls tools: Qwen2.5-Coder-0.5B-Instruct."""

import json

import pytest
from openai.types.chat import ChatCompletion

from cai_runtime import Client
from cai_runtime.convert.sources import pulled

pytestmark = pytest.mark.slow

NAME = "qwen2.5-coder-0.5b-instruct"
TOOLS = [
    {"type": "function", "function": {
        "name": f"get_{what}", "description": f"Get the {what} in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
                       "additionalProperties": False}}}
    for what in ("weather", "time")
]  # fmt: skip
QUESTION = [{"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture(params=[None, "generic"])
def client(request, qwen_dir):
    assert pulled(NAME) == qwen_dir, "opened by its name"
    with Client(NAME, max_context=2048, format=request.param) as client:
        yield client


def test_a_call_its_result_and_the_answer(client):
    options = {"tools": TOOLS, "temperature": 0, "parallel_tool_calls": False}
    reply = client.chat.completions.create(messages=QUESTION, **options, tool_choice="required", max_tokens=60)
    assert ChatCompletion.model_validate(reply.model_dump(), strict=True)
    (choice,) = reply.choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    assert choice.finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": -7, "sky": "clear"}'}
    messages = [*QUESTION, choice.message, result]
    answer = client.chat.completions.create(messages=messages, **options, tool_choice="none", max_tokens=60)
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(
        messages=QUESTION, **options, tool_choice="required", max_tokens=60, stream=True
    )
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    assert [delta.function.name for delta in deltas if delta.id] == ["get_weather"]
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments


def test_a_named_function_is_called_once(client):
    named = {"type": "function", "function": {"name": "get_time"}}
    reply = client.chat.completions.create(
        messages=QUESTION, tools=TOOLS, tool_choice=named, temperature=0, max_tokens=100
    )
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "get_time" and reply.choices[0].finish_reason == "tool_calls"
