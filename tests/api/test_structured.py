"""Structured output through the endpoints: what is asked for is what comes, and what can't be is refused by name."""

import json

import pytest

from cai_runtime.api import structured
from cai_runtime.api.errors import BadRequestError

SCHEMA = {
    "type": "object", "properties": {"abc": {"enum": ["abc", "xyz"]}, "n": {"type": "array", "maxItems": 2}},
    "required": ["abc"], "additionalProperties": False,
}  # fmt: skip
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}


def complete(client, **params):
    return client.completions.create(prompt="x", max_tokens=60, **params)


def chat(client, **params):
    return client.chat.completions.create(messages=[{"role": "user", "content": "x"}], max_tokens=60, **params)


def text_of(reply):
    choice = reply.choices[0]
    return choice.text if hasattr(choice, "text") else choice.message.content


@pytest.mark.parametrize("call", [complete, chat])
def test_answers_are_what_is_asked_for(client, call):
    for seed in range(4):
        reply = call(client, response_format=JSON_SCHEMA, temperature=1.0, seed=seed, logit_bias={})
        if reply.choices[0].finish_reason == "stop":
            assert json.loads(text_of(reply))["abc"] in ("abc", "xyz")
    assert text_of(call(client, choice=["abc", "xyz"], temperature=0)) == "abc"
    assert text_of(call(client, choice=["xyz"])) == "xyz"
    assert text_of(call(client, regex="[m-z]{3}b", temperature=0))[3] == "b"
    assert text_of(call(client, grammar='start: "(" inner ")"\ninner: "a" | "(" inner ")"', temperature=0)) == "(a)"
    plain = text_of(call(client, temperature=0))
    assert text_of(call(client, response_format={"type": "text"}, temperature=0)) == plain


def test_a_stream_folds_to_the_reply(client):
    params = {
        "prompt": ["x", "ab"],
        "n": 2,
        "seed": 5,
        "temperature": 1.0,
        "regex": "[a-f]{4,9}(gh)?",
        "max_tokens": 30,
    }
    whole = client.completions.create(**params)
    texts = [""] * 4
    for chunk in client.completions.create(stream=True, **params):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert all(choice.finish_reason == "stop" for choice in whole.choices)


def test_stop_strings_and_stop_tokens(client):
    assert complete(client, choice=["abcdef"], stop="d").choices[0].text == "abc", "the rest is missing, as asked for"
    with pytest.raises(BadRequestError, match="no token is allowed") as caught:
        complete(client, choice=["abc"], min_tokens=20)
    assert caught.value.param == "choice" and caught.value.code == "invalid_grammar"


@pytest.mark.parametrize(
    ("params", "param", "message"),
    [
        ({"regex": "a", "choice": ["a"]}, "choice", "give one of them"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos", "can't be used with 'regex'"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x", "Unknown parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "must be an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name",
         "Missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema",
         "Missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": 1}}},
         "response_format.json_schema.strict", "must be a boolean"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"items": {"not": {}}}}}},
         "response_format.json_schema.schema", "/items/not"),
        ({"grammar": "start: <|nothing|>"}, "grammar", "unknown special token"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("call", [complete, chat])
def test_refused(client, call, params, param, message):
    with pytest.raises(BadRequestError, match=message) as caught:
        call(client, **params)
    assert caught.value.param == param


def test_the_flat_form_of_responses():
    flat = {"type": "json_schema", "name": "thing", "schema": SCHEMA, "description": "d", "strict": None}
    nested = structured.answer_of({"response_format": JSON_SCHEMA})
    assert structured.answer_of_format(flat, "text.format", flat=True) == nested
    with pytest.raises(BadRequestError) as caught:
        structured.answer_of_format({"type": "json_schema", "schema": {}}, "text.format", flat=True)
    assert caught.value.param == "text.format.name"
    assert structured.answer_of({}) is None and structured.param_of({"regex": "a"}) == "regex"
