"""Whatever comes in, what comes out is a reply or one of our errors, which is openai's, names the parameter, and prints."""

import json
import math
from operator import attrgetter

import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cai_runtime
from cai_runtime import BadRequestError
from cai_runtime.api import chat, completions

REQUIRED = {chat: {"messages": [{"role": "user", "content": "hi"}]}, completions: {"prompt": "hi"}}
PARAMS = [(endpoint, name) for endpoint in REQUIRED for name in sorted(endpoint._NAMES)]
HUGE = [10**30, -(10**30), 10**400, 2**63, -(2**63) - 1, 2**31]
TEXTS = [
    "",
    "\ud800",
    "a\udfffb",
    "\0",
    "~nosuchuser/x",
    "x" * 5000,
    "9" * 5000,
    "none",
    "auto",
    "text",
    "\u0663",
    "-1",
]

numbers = st.one_of(
    st.integers(-3, 20),
    st.floats(),
    st.sampled_from([*HUGE, -0.0, 1e-300, 1e300, 1e-40, math.nan, math.inf]),
    st.sampled_from([np.int64(3), np.float32(0.5), np.bool_(True), np.uint8(1), np.float64("nan"), np.array(2),
                     np.array([1, 2]), np.array([[1], [2]]), np.array([]), np.array(["a"]), np.array([0.5])]),
)  # fmt: skip
texts = st.one_of(st.sampled_from(TEXTS), st.text(st.characters(codec=None), max_size=8))
scalars = st.one_of(st.none(), st.booleans(), numbers, texts, st.binary(max_size=3), st.just(object()))
keys = st.one_of(texts, st.integers(-2, 300), st.sampled_from([*HUGE, 1.5, None, True, ("a",)]),
                 st.sampled_from(["role", "content", "type", "text", "name", "include_usage"]))  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(lambda v: {"role": "user", "content": v}, inner),
        st.builds(lambda v: [{"role": "user", "content": v}], inner),
        st.builds(lambda v: {"type": "text", "text": v}, inner),
    ),
    max_leaves=6,
)
hostile = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def ids(case):
    return case if isinstance(case, str) else case.__name__.rpartition(".")[2]


def answer(client, endpoint, request):
    """A reply, or the error instead, which must be one of ours."""
    create = (client.chat.completions if endpoint is chat else client.completions).create
    try:
        reply = create(**request)
        return list(reply) if request.get("stream") is True else reply
    except openai.APIError as error:
        assert isinstance(error, cai_runtime.APIError)
        assert error.code and len(error.message) < 700
        str(error).encode()
        json.dumps(error.body, ensure_ascii=False).encode()
        return error


@pytest.mark.parametrize(("endpoint", "name"), PARAMS, ids=ids)
@hostile
@given(value=values)
def test_any_value_of_any_parameter(client, endpoint, name, value):
    stream = {"stream": True} if name == "stream_options" else {}
    error = answer(client, endpoint, {"max_tokens": 2, **REQUIRED[endpoint], **stream, name: value})
    if not isinstance(error, openai.APIError):
        return
    if name == "timeout" and isinstance(error, openai.APITimeoutError):
        return
    assert error.status_code == (404 if error.code == "model_not_found" else 400), error.message
    if name == "extra_body":  # it holds other parameters
        assert error.param is not None
    else:
        assert error.param.startswith((name, "max_tokens") if name == "min_tokens" else name), error.message


@pytest.mark.parametrize(("endpoint", "name"), PARAMS, ids=ids)
def test_integers_that_python_does_not_print(client, endpoint, name):
    huge = 10**5000
    for value in (huge, [huge], {"a": huge}, {huge: 1}, [[huge]], [{"role": "user", "content": huge}]):
        answer(client, endpoint, {"max_tokens": 2, **REQUIRED[endpoint], name: value})


@pytest.mark.parametrize("endpoint", REQUIRED, ids=ids)
@hostile
@given(params=st.dictionaries(st.one_of(texts, st.sampled_from([name for _, name in PARAMS])), values, max_size=5))
def test_any_call(client, endpoint, params):
    answer(client, endpoint, {"max_tokens": 2, **REQUIRED[endpoint], **params})


@hostile
@given(value=values)
def test_any_model_name(client, value):
    for call in (client.models.retrieve, client.models.unload):
        with pytest.raises(openai.APIStatusError) as caught:
            call(value)
        assert caught.value.status_code in (400, 404) and caught.value.param == "model"
        assert len(caught.value.message) < 700 and caught.value.message.encode()


@pytest.mark.parametrize("ask", [
    {"prompt": np.array([1, 2])}, {"prompt": [np.int64(1)]}, {"prompt": np.array([[1, 2], [3, 4]])},
    {"prompt": [np.array([1]), [2]]}, {"prompt": np.array(["a", "b"])}, {"prompt": ("a", "b")},
])  # fmt: skip
def test_prompts_of_arrays(client, ask):
    plain = json.loads(json.dumps(ask["prompt"], default=lambda value: value.tolist()))
    reply, expected = (client.completions.create(prompt=p, temperature=0) for p in (ask["prompt"], plain))
    assert [choice.text for choice in reply.choices] == [choice.text for choice in expected.choices]


@pytest.mark.parametrize(
    ("endpoint", "params", "param"),
    [
        (chat, {"messages": [{"role": "user", "content": "a\ud800b"}]}, "messages[0].content"),
        (chat, {"messages": iter([{"role": "user", "content": "a\ud800b"}])}, "messages[0].content"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
         "messages[0].content[0].text"),
        (chat, {"messages": [{"role": "user", "content": "a", "name": "\ud800"}]}, "messages[0].name"),
        (chat, {"logit_bias": {"x" * 5000: "\ud800"}}, "logit_bias." + "x" * 40),
        (chat, {"stop": ["a", "\ud800"]}, "stop[1]"),
        (completions, {"prompt": "a\ud800b"}, "prompt"),
        (completions, {"prompt": ["ok", "\udfff"]}, "prompt[1]"),
    ],
)  # fmt: skip
def test_half_a_character_is_refused_where_it_is(client, endpoint, params, param):
    error = answer(client, endpoint, {**REQUIRED[endpoint], **params})
    assert (error.status_code, error.param) == (400, param)


@pytest.mark.parametrize(("value", "taken"), [
    (np.array(1), False), (np.array([[1, 2]]), False), (np.array([0.5]), False), (np.array([1, 2]), True), ({1, 2}, True),
])  # fmt: skip
def test_token_ids_of_arrays(client, value, taken):
    error = answer(client, completions, {"prompt": "hi", "stop_token_ids": value})
    assert (
        not isinstance(error, openai.APIError) if taken else (error.status_code, error.param) == (400, "stop_token_ids")
    )


def test_numpy_flags(client):
    ask = {"prompt": "hi", "stream": np.True_, "stream_options": {"include_usage": np.True_}, "echo": np.False_}
    assert list(client.completions.create(**ask))[-1].usage is not None


def test_an_extra_body_in_an_extra_body_is_not_dropped(client):
    error = answer(client, completions, {"prompt": "hi", "extra_body": {"extra_body": {"top_k": 1}}})
    assert (error.status_code, error.param) == (400, "extra_body")


MEGABYTE = "word " * 200_000
HELLO = [{"role": "user", "content": "hi"}]
LONG_TOOL = {"name": "look", "description": MEGABYTE, "parameters": {}}


@pytest.mark.parametrize(("method", "request_", "param"), [
    ("completions", {"prompt": MEGABYTE}, "prompt"),
    ("chat.completions", {"messages": [{"role": "user", "content": MEGABYTE}]}, "messages"),
    ("chat.completions", {"messages": HELLO, "tools": [{"type": "function", "function": LONG_TOOL}]}, "messages"),
    ("responses", {"input": MEGABYTE}, "input"),
    ("responses", {"input": "hi", "tools": [{"type": "function", **LONG_TOOL}]}, "input"),
])  # fmt: skip
def test_megabytes_are_refused_by_their_characters(client, method, request_, param):
    """Before they are tokenized: that takes seconds, in which the model's other requests wait."""
    opened = client._host.open(client._host.resolve(None))
    with opened.tokenizer_lock, pytest.raises(BadRequestError, match="has 10000.. characters") as caught:
        attrgetter(method)(client).create(**request_)  # whoever waits for the lock waits for ever
    assert (caught.value.param, caught.value.code) == (param, "context_length_exceeded")
    if "tools" in request_:  # a prompt without them fits
        attrgetter(method)(client).create(**request_, tool_choice="none", temperature=0)


def test_a_long_prompt_makes_no_noise(client, tokenizer, capfd, caplog):
    tokenizer.model_max_length = 5
    answer(client, completions, {"prompt": "a" * 250})
    answer(client, completions, {"prompt": "a" * 50})
    assert capfd.readouterr().err == "" and caplog.text == ""
