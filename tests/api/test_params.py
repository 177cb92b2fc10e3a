"""Every parameter of both endpoints: what is out of range, of a wrong type, unknown or not served is refused by name."""

import math

import numpy as np
import pytest
from openai import NOT_GIVEN, Timeout, omit

from cai_runtime import BadRequestError
from cai_runtime.api import chat, completions
from cai_runtime.api.params import choice_seed
from cai_runtime.scalars import shown

REQUIRED = {chat: {"messages": [{"role": "user", "content": "hi"}]}, completions: {"prompt": "hi"}}

# Name: (values at or inside the limits, values outside or of a wrong type)
SHARED = {
    "model": (["abc", None], [3, ["abc"], b"abc"]),
    "temperature": (
        [0, 0.0, 1, 2, np.float32(0.5), np.int64(1), None],
        [10**5000, np.bool_(True), -0.01, 2.01, "1", True, math.nan, math.inf, [1]],
    ),
    "top_p": ([0, 0.5, 1, None], [-0.1, 1.1, "1", False, math.nan]),
    "max_tokens": ([1, 10, None], [0, -1, 1.0, "10", True, math.inf]),
    "max_completion_tokens": ([1, 10, None], [0, -1, 1.0, "10", True]),
    "min_tokens": ([0, 5, None], [-1, 1.0, "1", True]),
    "stop_token_ids": ([[], [3], (3, 4), np.array([1, 2])], ["1", 5, [-1], [1.5], [True], ["1"], {1: 2}]),
    "stop": (
        ["x", ["x"], [], [str(i) for i in range(16)], None],
        ["", [""], ["x", 1], 3, [str(i) for i in range(17)], {"x": 1}, b"x"],
    ),
    "frequency_penalty": ([-2, 0, 2, None], [-2.01, 2.01, "0", True, math.nan]),
    "presence_penalty": ([-2, 0, 2, None], [-2.01, 2.01, "0", True, math.nan]),
    "repetition_penalty": ([0.5, 1, 1.3, np.float32(1.1), None], [0, -1, 1e-300, 1e300, "1", True, math.nan, math.inf]),
    "logit_bias": (
        [{}, {"5": 100}, {5: -100}, {"5": 1.5}, {np.int64(5): np.float32(1)}, None],
        [
            {"5": 101},
            {"5": -101},
            {"x": 1},
            {-1: 1},
            {"5": "1"},
            {"5": math.nan},
            {"5": True},
            {True: 1},
            {"9" * 5000: 1},
            {10**5000: 1},
            [5],
            "5",
        ],
    ),
    "top_k": ([0, 40, -1, np.int32(3), None], [-2, 1.0, "1", True]),
    "min_p": ([0, 0.05, 1, None], [-0.1, 1.1, "0", True, math.nan]),
    "seed": (
        [0, -1, 2**63 - 1, -(2**63), np.int64(3), np.uint8(3), None],
        [2**63, 10**5000, -(2**63) - 1, 1.0, "1", True],
    ),
    "n": ([1, 128, None], [0, -1, 129, 1.0, "1", True]),
    "ignore_eos": ([True, False, np.bool_(True), None], [1, "true"]),
    "user": (["someone", "", None], [3, b"x"]),
    "stream": ([True, False, np.bool_(False), None], [1, "true"]),
    "metadata": ([{}, {"a": "b"}, None], ["x", []]),
    "safety_identifier": (["x", None], [3]),
    "prompt_cache_key": (["x", None], [3]),
    "timeout": ([30, 0.5, np.float32(1), Timeout(3), Timeout(None), None], [0, -1, "1", True, math.nan, math.inf, [1]]),
    "extra_headers": ([{}, {"X-A": "b"}, None], [3, "x"]),
    "extra_query": ([{}, {"a": "b"}, None], [3, []]),
    "tool_choice": (["none", "auto", None], ["required", 3]),
    "tools": ([[], None], [3, "f"]),
    "extra_body": ([{}, {"top_k": 3}, None], [[], "x", {1: 2}]),
    "response_format": ([{"type": "text"}, {"type": "json_object"}, None], ["text", 3, [{"type": "text"}]]),
    "regex": (["[0-9]+", "", None], ["(", "(?=a)", 3, ["a"]]),
    "grammar": (['start: "a"', None], ["", "start: a", 3, {"start": "a"}]),
    "choice": ([["a", "b"], ("a",), [""], None], [[], "ab", [1], {"a": 1}]),
}
CHAT = {
    "chat_template": (["rag", None], [3, b"x", {}]),
    "parallel_tool_calls": ([True, False, None], [1, "no"]),
    "reasoning_effort": (["none", "low", "medium", "high", "xhigh", "max", None], ["minimal", "", 3]),
    "reasoning_enabled": ([True, False, None], [1, "yes"]),
    "reasoning_max_tokens": ([1, 10**6, None], [0, -1, 1.5, True]),
    "top_logprobs": ([0, None], [-1, 21, 5, 1.0, True]),  # 5 without `logprobs`
    "logprobs": ([True, False, np.bool_(True), None], [0, 5, "no"]),
    "functions": ([[], None], [[{}]]),
    "function_call": (["none", "auto", None], [{"name": "f"}]),
    "store": ([False, None], [True, 0]),
    "modalities": ([["text"], None], [["audio"], ["text", "audio"], "text", [np.array(["text", "x"])]]),
    "service_tier": (["auto", "default", None], ["flex"]),
    "audio": ([None], [{}]),
    "prediction": ([None], [{}]),
    "web_search_options": ([None], [{}]),
    "verbosity": (["medium", None], ["low"]),
    "prompt_cache_retention": ([None], ["24h"]),
    "moderation": ([None], [{}]),
}
COMPLETIONS = {
    "tools": ([[], None], [[{"type": "function", "function": {"name": "f"}}], "f"]),
    "tool_choice": (["none", "auto", None], ["required", {"type": "function"}, 3]),
    "echo": ([True, False, None], [1, "yes"]),
    "suffix": (["", "x", None], [3, b"x", ["x"]]),
    "best_of": ([1, 2, 128, None], [0, 129, True, 1.0]),
    "logprobs": ([0, 5, np.int64(3), None], [-1, 6, True, False, 1.0, "1"]),
}
TABLES = [(chat, {**SHARED, **CHAT}), (completions, {**SHARED, **COMPLETIONS})]


def cases(good):
    for endpoint, table in TABLES:
        for name, values in table.items():
            for value in values[0 if good else 1]:
                yield pytest.param(
                    endpoint, name, value, id=f"{endpoint.__name__.split('.')[-1]}-{name}-{shown(value, 40)}"
                )


@pytest.mark.parametrize(("endpoint", "name", "value"), list(cases(good=True)))
def test_accepted(endpoint, name, value):
    endpoint.parse({**REQUIRED[endpoint], name: value})


@pytest.mark.parametrize(("endpoint", "name", "value"), list(cases(good=False)))
def test_refused_by_name(endpoint, name, value):
    with pytest.raises(BadRequestError) as caught:
        endpoint.parse({**REQUIRED[endpoint], name: value})
    error = caught.value
    assert error.param == name and error.status_code == 400 and error.type == "invalid_request_error"
    assert f"'{name}'" in error.message and error.code
    assert error.body["error"]["param"] == name


@pytest.mark.parametrize("endpoint", [chat, completions])
def test_tables_cover_every_parameter(endpoint):
    """A parameter that is added must come with its cases."""
    table = dict(TABLES)[endpoint]
    params = {chat: chat.ChatParams, completions: completions.CompletionParams}[endpoint]
    assert set(params.__annotations__) - set(REQUIRED[endpoint]) - {"stream_options"} <= set(table)


@pytest.mark.parametrize("endpoint", [chat, completions])
@pytest.mark.parametrize(
    ("name", "hint"), [("tempurature", "temperature"), ("max_token", "max_tokens"), ("qqqq", None), ("best", None)]
)
def test_unknown(endpoint, name, hint):
    with pytest.raises(BadRequestError) as caught:
        endpoint.parse({**REQUIRED[endpoint], name: 1})
    assert (caught.value.param, caught.value.code) == (name, "unknown_parameter")
    if hint:
        assert f"'{hint}'" in caught.value.message


@pytest.mark.parametrize(("endpoint", "name"), [(chat, "prompt"), (chat, "suffix"), (chat, "echo"),
                                                (completions, "messages"), (completions, "reasoning_effort")])  # fmt: skip
def test_parameters_of_the_other_endpoint_are_unknown(endpoint, name):
    with pytest.raises(BadRequestError) as caught:
        endpoint.parse({**REQUIRED[endpoint], name: "x"})
    assert (caught.value.param, caught.value.code) == (name, "unknown_parameter")


@pytest.mark.parametrize(("endpoint", "name"), [(chat, "messages"), (completions, "prompt")])
@pytest.mark.parametrize("params", [{}, {"messages": None, "prompt": None}])
def test_required(endpoint, name, params):
    with pytest.raises(BadRequestError) as caught:
        endpoint.parse({key: value for key, value in params.items() if key == name})
    assert (caught.value.param, caught.value.code) == (name, "missing_required_parameter")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {}, "stream": False}, "stream_options"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
        ({"stream_options": {"other": True}, "stream": True}, "stream_options.other"),
        ({"stream_options": True, "stream": True}, "stream_options"),
    ],
)
def test_stream_options(options, param):
    with pytest.raises(BadRequestError) as caught:
        chat.parse({**REQUIRED[chat], **options})
    assert caught.value.param == param


def test_openai_sentinels_mean_not_given():
    request = chat.parse({**REQUIRED[chat], "temperature": NOT_GIVEN, "tools": omit, "unknown": NOT_GIVEN})
    assert dict(request.params) == {}


def test_extra_body_is_merged_and_checked():
    assert chat.parse({**REQUIRED[chat], "extra_body": {"top_k": 3}}).params["top_k"] == 3
    for extra, param in [({"top_k": -2}, "top_k"), ({"unknown": 1}, "unknown"), ({"tools": [1]}, "tools[0]")]:
        with pytest.raises(BadRequestError) as caught:
            chat.parse({**REQUIRED[chat], "extra_body": extra})
        assert caught.value.param == param
    with pytest.raises(BadRequestError) as caught:
        chat.parse({**REQUIRED[chat], "temperature": 1, "extra_body": {"temperature": 0}})
    assert caught.value.param == "temperature"


def test_nothing_loads_for_a_bad_request(client, factory):
    for options in [{"temperature": 3}, {"messages": []}, {"nope": 1}]:
        with pytest.raises(BadRequestError):
            client.chat.completions.create(**{**REQUIRED[chat], **options})
    assert factory.opened == []


def test_choice_seeds():
    assert choice_seed(7, 0) == 7 and choice_seed(None, 3) is None
    seeds = {choice_seed(seed, index) for seed in range(-50, 50) for index in range(128)}
    assert len(seeds) == 100 * 128 and all(-(2**63) <= seed < 2**63 for seed in seeds)
