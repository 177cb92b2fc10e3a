"""What a request may say of tools, and how the place of a fault is named."""

import pytest

from cai_runtime.errors import ConversationError
from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.tools import parse_tools

LOOK = {"type": "function", "function": {"name": "look", "description": "Looks.", "strict": True, "parameters":
        {"type": "object", "properties": {"at": {"type": "string"}}}}}  # fmt: skip
HEAR = {"type": "function", "function": {"name": "hear"}}
DEEP = {"a": 1}
for _ in range(70):
    DEEP = {"a": DEEP}


def function(**fields):
    return [{"type": "function", "function": fields}]


def named(name):
    return {"type": "function", "function": {"name": name}}


def allowed(*names, mode="auto"):
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


def test_tools_and_choices():
    look = Tool("look", "Looks.", LOOK["function"]["parameters"], strict=True)
    hear = Tool("hear")
    assert parse_tools() == {"tools": (), "tool_choice": "none", "parallel_tool_calls": True}
    assert parse_tools([LOOK, HEAR]) == {"tools": (look, hear), "tool_choice": "auto", "parallel_tool_calls": True}
    assert parse_tools(iter([HEAR]), "required", False) == {
        "tools": (hear,), "tool_choice": "required", "parallel_tool_calls": False,
    }  # fmt: skip
    assert parse_tools([LOOK, HEAR], named("hear"))["tool_choice"] == hear
    assert parse_tools([LOOK, HEAR], "none")["tools"] == (look, hear)
    narrowed = parse_tools([LOOK, HEAR], allowed("hear", mode="required"))
    assert (narrowed["tools"], narrowed["tool_choice"]) == ((hear,), "required")


def test_tools_of_the_openai_package():
    from openai import pydantic_function_tool
    from pydantic import BaseModel

    class Query(BaseModel):
        """Asks."""

        text: str

    (tool,) = parse_tools([pydantic_function_tool(Query)])["tools"]
    assert (tool.name, tool.description, tool.strict) == ("Query", "Asks.", True)
    assert tool.parameters["required"] == ["text"]


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        (3, "tools"),
        ("look", "tools"),
        (LOOK, "tools"),
        (["look"], "tools[0]"),
        ([{}], "tools[0].type"),
        ([{"type": "custom", "custom": {"name": "x"}}], "tools[0].type"),
        ([{"type": "web_search"}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"type": "function", "function": "look"}], "tools[0].function"),
        ([{**HEAR, "more": 1}], "tools[0].more"),
        (function(), "tools[0].function.name"),
        (function(name=""), "tools[0].function.name"),
        (function(name="a b"), "tools[0].function.name"),
        (function(name="a" * 65), "tools[0].function.name"),
        (function(name="look\n"), "tools[0].function.name"),
        (function(name=3), "tools[0].function.name"),
        (function(name="f", more=1), "tools[0].function.more"),
        (function(name="f", description=3), "tools[0].function.description"),
        (function(name="f", description="\ud800"), "tools[0].function.description"),
        (function(name="f", strict="yes"), "tools[0].function.strict"),
        (function(name="f", parameters=[]), "tools[0].function.parameters"),
        (function(name="f", parameters={"type": "string"}), "tools[0].function.parameters.type"),
        (
            function(name="f", parameters={"type": "object", "properties": []}),
            "tools[0].function.parameters.properties",
        ),
        (function(name="f", parameters={"type": "object", "x": {1: 2}}), "tools[0].function.parameters.x"),
        (function(name="f", parameters={"type": "object", "x": [b"y"]}), "tools[0].function.parameters.x[0]"),
        (function(name="f", parameters={"type": "object", "x": float("nan")}), "tools[0].function.parameters.x"),
        (function(name="f", parameters={"type": "object", "\udfff": 1}), "tools[0].function.parameters"),
        ([HEAR, LOOK, HEAR], "tools[2].function.name"),
    ],
)
def test_tools_are_refused_by_place(tools, param):
    with pytest.raises(ConversationError, match="'") as caught:
        parse_tools(tools)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        (3, "tool_choice"),
        ("any", "tool_choice"),
        ({}, "tool_choice.type"),
        ({"type": "custom", "custom": {"name": "x"}}, "tool_choice.type"),
        ({"type": "function"}, "tool_choice.function"),
        ({"type": "function", "function": {}}, "tool_choice.function.name"),
        (named("smell"), "tool_choice.function.name"),
        ({**named("look"), "more": 1}, "tool_choice.more"),
        ({"type": "function", "function": {"name": "look", "more": 1}}, "tool_choice.function.more"),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        (allowed("look", mode="never"), "tool_choice.allowed_tools.mode"),
        (allowed(), "tool_choice.allowed_tools.tools"),
        (allowed("look", "smell"), "tool_choice.allowed_tools.tools[1].function.name"),
    ],
)
def test_choices_are_refused_by_place(choice, param):
    with pytest.raises(ConversationError, match="'") as caught:
        parse_tools([LOOK, HEAR], choice)
    assert caught.value.param == param


@pytest.mark.parametrize("tools", [None, []])
def test_required_needs_tools(tools):
    with pytest.raises(ConversationError, match="no 'tools'") as caught:
        parse_tools(tools, "required")
    assert caught.value.param == "tool_choice"


def test_a_schema_that_nests_too_deeply():
    with pytest.raises(ConversationError, match="nests more than 64 levels"):
        parse_tools(function(name="f", parameters={"type": "object", "x": DEEP}))
