"""Every parameter of `responses.create`: the values that are taken, and those that are refused by name."""

import inspect
import math

import pytest
from openai.resources.responses import InputItems, Responses

from cai_runtime import BadRequestError
from cai_runtime.api.responses import ResponsesEndpoint
from cai_runtime.api.responses.params import NAMES, UNSUPPORTED, ResponseParams
from cai_runtime.api.responses.store import ResponseStore
from cai_runtime.scalars import shown

FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
CHOOSE = {"tools": [FUNCTION]}
# name -> values that are taken, values that are refused.
TABLE = {
    "model": (["abc", None], [3, b"x"]),
    "input": (["q", [{"role": "user", "content": "q"}]], [3, [], {"role": "user"}]),
    "instructions": (["i", "", None], [3, ["i"]]),
    "max_output_tokens": ([1, 10**6, None], [0, -1, 1.5, "1", True]),
    "metadata": ([{}, {"a": "b"}, {"k" * 64: "v" * 512}, None],
                 [3, "x", {"a": 1}, {1: "a"}, {"k" * 65: "v"}, {"k": "v" * 513}, {str(i): "" for i in range(17)},
                  {"k": "\ud800"}]),
    "store": ([True, False, None], [1, "yes"]),
    "previous_response_id": ([None], [3, "", "resp_1"]),
    "text": ([{}, {"format": {"type": "text"}}, {"verbosity": "medium"}, {"format": {"type": "json_object"}}, None],
             [3, "x", []]),
    "tools": ([[], (), [FUNCTION], {"f": FUNCTION}.values(), None], [3, "f", {"type": "function"}]),
    "tool_choice": (["auto", "none", None], ["required", "any", 3, []]),
    "parallel_tool_calls": ([True, False, None], [1, "no"]),
    "reasoning": ([{}, {"effort": "low"}, {"effort": None, "summary": None}, {"context": "auto", "mode": "standard"}, None],
                  [3, "high"]),
    "truncation": (["auto", "disabled", None], ["yes", True, 3]),
    "include": ([[], (), ["message.output_text.logprobs"], None],
                ["x", 3, [3], ["nothing"], ["reasoning.encrypted_content"], ["file_search_call.results"]]),
    "top_logprobs": ([0, None], [-1, 21, 1.5, True, 3]),
    "chat_template": (["rag", None], [3, b"x"]),
    "reasoning_enabled": ([True, False, None], [1, "yes"]),
    "reasoning_max_tokens": ([1, None], [0, 1.5]),
    "regex": (["[0-9]+", None], ["(", 3]),
    "grammar": (['start: "a"', None], ["start: a", 3]),
    "choice": ([["a", "b"], None], [[], "ab", [1]]),
    "temperature": ([0, 2, 0.5, None], [-0.1, 2.1, "1", True, math.nan]),
    "top_p": ([0, 0.5, 1, None], [-1, 1.1]),
    "min_tokens": ([0, 5, None], [-1]),
    "stop": (["a", ["a", "b"], None], [3, [""]]),
    "stop_token_ids": ([[1], None], [[-1], "x"]),
    "frequency_penalty": ([-2, 2, None], [2.1]),
    "presence_penalty": ([-2, 2, None], [-3]),
    "repetition_penalty": ([1.1, None], [0]),
    "logit_bias": ([{"1": 5}, None], [{"1": 101}]),
    "top_k": ([0, -1, 5, None], [-2]),
    "min_p": ([0, 1, None], [1.5]),
    "seed": ([0, -5, None], [1.5]),
    "ignore_eos": ([True, None], ["yes"]),
    "user": (["u", None], [3]),
    "safety_identifier": (["u", None], [3]),
    "prompt_cache_key": (["u", None], [3]),
    "timeout": ([3, None], [0]),
    "extra_headers": ([{"a": "b"}, None], [3]),
    "extra_query": ([{"a": "b"}, None], [3]),
    "extra_body": ([{"top_k": 3}, None], [3]),
    "access_programs": ([None], [{"cyber": "standard"}]),
    "background": ([False, None], [True, 0]),
    "background_options": ([None], [{}]),
    "context_management": ([[], None], [[{"type": "compaction"}]]),
    "conversation": ([None], ["conv_1", {"id": "conv_1"}]),
    "image": ([None], [{"context_compression": "enabled"}]),
    "max_tool_calls": ([None], [1]),
    "moderation": ([None], [{"model": "m"}]),
    "prompt": ([None], [{"id": "pmpt_1"}]),
    "prompt_cache_options": ([None], [{"mode": "implicit"}]),
    "prompt_cache_retention": ([None], ["24h", "in_memory"]),
    "service_tier": (["auto", "default", None], ["flex", "priority", 3]),
    "verbosity": (["medium", None], ["low", "high", 3]),
}  # fmt: skip


def parse(**params):
    return ResponsesEndpoint(ResponseStore()).parse({"input": "q", **params})


def cases(good):
    return [
        pytest.param(name, value, id=f"{name}-{shown(value, 40)}")
        for name, values in TABLE.items()
        for value in values[0 if good else 1]
    ]


@pytest.mark.parametrize(("name", "value"), cases(good=True))
def test_accepted(name, value):
    parse(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(good=False))
def test_refused_by_name(name, value):
    with pytest.raises(BadRequestError) as caught:
        parse(**{name: value})
    error = caught.value
    assert error.param.split(".")[0].split("[")[0] == name and error.code
    assert f"'{error.param}'" in error.message


def test_the_table_covers_every_parameter():
    assert set(ResponseParams.__annotations__) | set(UNSUPPORTED) == set(TABLE) | {"stream_options"}


@pytest.mark.parametrize("method", [Responses.create, Responses.parse, Responses.stream])
def test_every_parameter_of_the_openai_client_is_known(method):
    own = {
        "self",
        "text_format",
        "parse_as",
        "response_id",
        "starting_after",
        "verbosity",
    }  # of the helpers around `create`
    assert set(inspect.signature(method).parameters) - own <= NAMES


def test_every_option_of_the_openai_client_is_known(client):
    response = client.responses.create(input="q", store=True, max_output_tokens=1)
    ours = client.responses
    for theirs, method in [(Responses.retrieve, ours.retrieve), (Responses.cancel, ours.cancel),
                           (InputItems.list, ours.input_items.list), (Responses.delete, ours.delete)]:  # fmt: skip
        names = set(inspect.signature(theirs).parameters) - {"self", "response_id"}
        method(response.id, **dict.fromkeys(names))


@pytest.mark.parametrize(
    ("params", "param", "code"),
    [
        ({"max_tokens": 3}, "max_tokens", "unknown_parameter"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"n": 2}, "n", "unknown_parameter"),
        ({"response_format": {"type": "text"}}, "response_format", "unknown_parameter"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation",
         "invalid_value"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage", "unknown_parameter"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
        ({"text": {"other": 1}}, "text.other", "unknown_parameter"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
        ({"text": {"format": {"type": "text", "name": "x"}}}, "text.format.name", "unknown_parameter"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "missing_required_parameter"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "missing_required_parameter"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "json_schema": {}}}}, "text.format.json_schema",
         "unknown_parameter"),
        ({"reasoning": {"effort": "minimal"}}, "reasoning.effort", "invalid_value"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "unsupported_parameter"),
        ({"reasoning": {"generate_summary": "auto"}}, "reasoning.generate_summary", "unsupported_parameter"),
        ({"reasoning": {"context": "all_turns"}}, "reasoning.context", "unsupported_parameter"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode", "unsupported_parameter"),
        ({"reasoning": {"depth": 1}}, "reasoning.depth", "unknown_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search_tools_not_supported"),
        ({"tools": [FUNCTION, {"type": "custom", "name": "c"}]}, "tools[1].type", "custom_tools_not_supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0]", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
        ({"tools": [{**FUNCTION, "name": "a b"}]}, "tools[0].name", None),
        ({"tools": [FUNCTION, FUNCTION]}, "tools[1].name", "invalid_value"),
        ({"tools": [{**FUNCTION, "parameters": 3}]}, "tools[0].parameters", None),
        ({"tools": [{**FUNCTION, "strict": "yes"}]}, "tools[0].strict", None),
        ({"tools": [{**FUNCTION, "defer_loading": True}]}, "tools[0].defer_loading", "unsupported_parameter"),
        ({"tools": [{**FUNCTION, "output_schema": {}}]}, "tools[0].output_schema", "unsupported_parameter"),
        ({"tools": [{**FUNCTION, "color": "red"}]}, "tools[0].color", "unknown_parameter"),
        ({**CHOOSE, "tool_choice": {"type": "function"}}, "tool_choice.name", "missing_required_parameter"),
        ({**CHOOSE, "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name", "invalid_value"),
        ({**CHOOSE, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function",
         "unknown_parameter"),
        ({**CHOOSE, "tool_choice": {"type": "file_search"}}, "tool_choice.type", "file_search_tools_not_supported"),
        ({**CHOOSE, "tool_choice": {"type": "allowed_tools", "mode": "none", "tools": []}}, "tool_choice.mode",
         "invalid_value"),
        ({**CHOOSE, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.tools",
         "invalid_value"),
        ({**CHOOSE, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
         "tool_choice.tools[0].type", "mcp_tools_not_supported"),
    ],
)  # fmt: skip
def test_refused_by_place(params, param, code):
    with pytest.raises(BadRequestError) as caught:
        parse(**params)
    assert caught.value.param == param and f"'{param}'" in caught.value.message
    assert code is None or caught.value.code == code


def test_input_is_required(client):
    for params in ({}, {"input": None}, {"instructions": "i"}):
        with pytest.raises(BadRequestError) as caught:
            client.responses.create(**params)
        assert (caught.value.param, caught.value.code) == ("input", "missing_required_parameter")


def test_schemas_keep_their_nulls():
    schema = {"type": "object", "properties": {"a": {"enum": [None, 1]}}, "default": None}
    request = parse(tools=[{**FUNCTION, "parameters": schema}])
    assert request.conversation.tools[0].parameters == schema
    assert request.tool_use.tools_echo[0].parameters == schema
