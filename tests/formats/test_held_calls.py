"""Whatever a model writes under the grammar of its calls, the format reads calls of it that are valid."""

import json
from itertools import islice

import jsonschema
import pytest
from families import FAMILIES, made, marker_texts
from random_texts import Writer
from transcripts import fold, play, spec_of, turn_of

from cai_runtime.errors import ConversationError
from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.parsing.grammar import answer_grammar, object_schema
from cai_runtime.grammars import Grammars

SIBLINGS = ("mistral_ids", "python_tag", "python_start")  # which grammars don't write


def schema(properties, required=None, **more):
    return {"type": "object", "properties": properties, "required": [*(required or properties)], **more}


DEFINITIONS = {
    "Unit": {"enum": ["C", "F"], "title": "Unit", "type": "string"},
    "Place": schema({"lat": {"type": "number"}}, additionalProperties=False),
}
SCHEMAS = {
    "none": None,
    "any": {"type": "object"},
    "texts": schema({"a": {"type": "string"}, "b": {"type": ["string", "null"]}}),
    "untyped": schema({"a": {}, "b": True}),
    "choices": schema({"a": {"type": "string", "enum": ["C", "F"]}, "b": {"const": "true"}, "c": {"enum": ["", None]}}),
    "hard choices": schema({"a": {"enum": ['a "b"', "</x>", "\\n", "C\n", "\nF", " x ", "<[3]> %json {}"]}}),
    "values": schema(
        {"a": {"type": "integer", "minimum": -5}, "b": {"type": "null"}, "c": {"enum": [1, 2, None]},
         "d": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
         "e": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}
    ),
    "optional": schema({name: {"type": "integer"} for name in "abc"}, ["b"], additionalProperties=False),
    "references": schema(
        {"a": {"$ref": "#/$defs/Unit"}, "b": {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}], "default": None},
         "c": {"$ref": "#/$defs/Place"}}, **{"$defs": DEFINITIONS}
    ),
    "names": schema({"user-id": {"type": "integer"}, "class": {"type": "string"}, "größe": {"type": "boolean"}, "a b": {}}),
}  # fmt: skip


@pytest.fixture(scope="module", params=[f for f in FAMILIES if f.write.__name__ not in SIBLINGS], ids=str)
def parts(request, make_byte_tokenizer):
    return made(request.param, make_byte_tokenizer)


@pytest.fixture(scope="module")
def writer(parts):
    tokenizer, fmt = parts
    return Writer(
        tokenizer, Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id]), [*marker_texts(fmt), "</parameter>"]
    )


def answers(parts, writer, count, **options):
    """The replies to random texts under the grammar of a turn."""
    tokenizer, fmt = parts
    turn = turn_of(**options)
    lark = answer_grammar(fmt, turn)
    texts = islice(filter(None, (writer.text(lark, seed) for seed in range(60))), count)
    replies = [fold(play(fmt.output(turn)(spec_of(tokenizer)), tokens)) for tokens in texts]
    assert len(replies) == count
    return replies


@pytest.mark.parametrize("name", SCHEMAS)
def test_calls_are_valid(parts, writer, name):
    tool = Tool("3d-view_x" if name == "names" else "find", parameters=SCHEMAS[name], strict=True)
    other = Tool("look", parameters={"type": "object", "properties": {"k": {"type": "integer"}}})
    for options in (
        {"tools": [tool], "tool_choice": "required"},
        {"tools": [tool, other], "tool_choice": tool},
        {"tools": [tool, other]},
        {"tools": [tool, other], "parallel_tool_calls": False},
    ):
        for reply in answers(parts, writer, 3, **options):
            must_call = "tool_choice" in options
            assert reply.reason == "tool_calls" if must_call or reply.calls else reply.reason == "stop"
            assert bool(reply.calls) > bool(reply.content) if must_call else True
            assert len(reply.calls) <= 1 or options.get("tool_choice") == "required" or len(options) == 1
            for called, arguments in reply.calls:
                value = json.loads(arguments)
                assert called == tool.name or (called == "look" and not must_call)
                if called == tool.name:
                    jsonschema.Draft202012Validator(object_schema(tool)).validate(value)


@pytest.mark.parametrize(
    ("given", "pointer"),
    [
        (schema({"a": {"$ref": "other.json"}}), "/properties/a/$ref"),
        (schema({"a": {"type": "string", "minLenght": 3}}), "/properties/a/minLenght"),
        (schema({"a": {"$ref": "#/$defs/A"}}, **{"$defs": {"A": {"minLenght": 3}}}), "/$defs/A/minLenght"),
        (schema({"a/b": {"type": "array", "contains": {}}}), "/properties/a~1b/contains"),
        (schema({"a": False}, ["a"]), "(/required/0)?"),
        ({"type": "object", "required": 5}, "(/required)?"),
    ],
)
def test_what_no_format_enforces_is_refused(parts, given, pointer):
    with pytest.raises(ConversationError, match=f"enforced at '{pointer.replace('$', '[$]')}'"):
        answer_grammar(parts[1], turn_of(tools=[Tool("find", parameters=given)], tool_choice="required"))


@pytest.mark.parametrize("name", ["", "a\n", " a", "<a>", "a=b"])
def test_names_that_a_format_can_not_write_are_refused(parts, writer, name):
    """Or they are read back."""
    tool = Tool("find", parameters=schema({name: {"type": "integer"}}))
    options = {"tools": [tool], "tool_choice": "required"}
    try:
        replies = answers(parts, writer, 2, **options)
    except ConversationError as error:
        assert "can't write an argument's name" in str(error)
    else:
        assert all(name in json.loads(arguments) for reply in replies for _, arguments in reply.calls)
