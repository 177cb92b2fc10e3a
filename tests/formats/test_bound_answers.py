"""What looks like a call where the request says what content must be."""

import json

import pytest
from families import FAMILIES, made, marker_texts
from transcripts import fold, play, spec_of, tokens_of, turn_of

from cai_runtime.formats.conversation import Answer
from cai_runtime.grammars import expressions

ANSWER = Answer(expressions.json_object())
JSON_CALL = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'
OBJECTS = [
    '{"name": "Bob", "parameters": {}}',  # no function of the request
    '{"name": "get_weather"}',
    '{"name": "get_weather", "arguments": {"city": "Oslo"}}',
    '{"parameters": {"city": "Oslo"}, "name": "get_weather"}',
    '{"type": "function", "name": "get_weather", "parameters": {}}',
    '{"name": "get_weather", "parameters": {"city": "Oslo"}, "id": 1}',
    '{"name": "get_weather", "parameters": "{}"}',
    '{"name": "get_weather", "parameters": null}',
    '{"name": 3, "parameters": {}}',
    '{"tools": [{"name": "get_weather", "parameters": {}}]}',
    "{}",
]


@pytest.fixture(scope="module", params=[family for family in FAMILIES if family.tokens or family.bare], ids=str)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def parts(family, make_byte_tokenizer):
    return made(family, make_byte_tokenizer)


def read(parts, text, *, end=True, **options):
    """The same whole, token by token and in pieces."""
    tokenizer, fmt = parts
    tokens = tokens_of(tokenizer, text, marker_texts(fmt)) + ([tokenizer.eos_token_id] if end else [])
    turn = turn_of(answer=ANSWER, **options)
    found = [
        fold(play(fmt.output(turn)(spec_of(tokenizer)), tokens, cuts)) for cuts in ([len(tokens)], None, [3, 5, 7])
    ]
    assert found[0] == found[1] == found[2]
    return found[0]


@pytest.mark.parametrize("text", OBJECTS)
def test_an_object_that_is_no_call_is_the_answer(family, parts, text):
    found = read(parts, family.final(text).removeprefix("<|start|>assistant"))
    assert (found.content, found.calls, found.reason) == (text, [], "stop")


def test_calls_of_the_grammars_form(family, parts):
    """What the grammar takes beside the answer is read as calls."""
    if family.write.__name__ in ("python_tag", "python_start"):
        pytest.skip("which grammars don't write")
    found = read(parts, family.write([("get_weather", {"city": "Oslo"}), ("get_time", {})]))
    assert [(name, json.loads(text)) for name, text in found.calls] == [
        ("get_weather", {"city": "Oslo"}),
        ("get_time", {}),
    ]
    assert (found.content, found.reason) == ("", "tool_calls")


def test_only_llama_3_calls_by_a_bare_object(family, parts):
    found = read(parts, family.final(JSON_CALL).removeprefix("<|start|>assistant"))
    if family.format == "llama3":
        assert (found.content, found.calls) == ("", [["get_weather", '{"city": "Oslo"}']])
    else:
        assert (found.content, found.calls) == (JSON_CALL, [])


def test_the_answer_is_not_told_as_a_call_before_it_is_complete(family, parts):
    for length in range(len(JSON_CALL)):
        text = family.final(JSON_CALL[:length]).removeprefix("<|start|>assistant")
        assert read(parts, text, end=False).calls == []


def test_where_a_call_must_come_there_is_no_other_answer(family, parts):
    """Then the arguments are told as they come."""
    if not family.bare or family.format != "llama3":
        pytest.skip("its calls are no bare objects")
    found = read(parts, JSON_CALL[:-5], end=False, tool_choice="required")
    assert found.calls == [["get_weather", '{"city": "Os']]
