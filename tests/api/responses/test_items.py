"""What items are taken, what they become for the model, and what is refused by which name."""

import pytest
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

from cai_runtime import BadRequestError
from cai_runtime.api.errors import as_api_errors
from cai_runtime.api.responses.items import check_calls, parse_input
from cai_runtime.api.responses.messages import Turns

ITEM = TypeAdapter(ResponseItem)
USER = {"role": "user", "content": "q"}


def call(call_id="c", name="f", arguments="{}"):
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def output(call_id="c", text="r"):
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def said(text, role="assistant"):
    return {"role": role, "content": text}


def thought(*texts, key="content", kind="reasoning_text"):
    return {"type": "reasoning", "summary": [], key: [{"type": kind, "text": text} for text in texts]}


def parsed(value, find=lambda item_id: None):
    with as_api_errors():
        items = parse_input(value, find)
        check_calls(items, len(items))
        return items


def messages_of(value, instructions=None):
    items = parsed(value)
    turns = Turns(instructions, items, len(items))
    turns.parsed()  # they are taken
    return turns.messages


def tool_call(call_id="c", name="f"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("hi", [{"role": "user", "content": "hi"}]),
        ([{"role": "developer", "content": "d"}, USER], [{"role": "developer", "content": "d"}, USER]),
        ([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"},
                                                          {"type": "input_text", "text": "b"}]}],
         [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
        ([USER, {"role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []},
                                                  {"type": "refusal", "refusal": "no"}]}, USER],
         [USER, {"role": "assistant", "content": "ano"}, USER]),
        # One turn of the assistant is one message, whatever the order of its items.
        ([USER, thought("t1", "t2"), said("a"), call(), said("b"), call("d", "g"), output(), output("d")],
         [USER, {"role": "assistant", "reasoning_content": "t1t2", "content": "ab",
                 "tool_calls": [tool_call(), tool_call("d", "g")]},
          {"role": "tool", "tool_call_id": "c", "content": "r"}, {"role": "tool", "tool_call_id": "d", "content": "r"}]),
        # Calls one after the other are turns of their own; an id may come again once it was answered.
        ([USER, call(), output(), call(), output()],
         [USER, {"role": "assistant", "content": None, "tool_calls": [tool_call()]},
          {"role": "tool", "tool_call_id": "c", "content": "r"},
          {"role": "assistant", "content": None, "tool_calls": [tool_call()]},
          {"role": "tool", "tool_call_id": "c", "content": "r"}]),
        # Text after text, and a thought after text, begin a message.
        ([USER, said("a"), said("b"), thought("t"), said("c")],
         [USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"},
          {"role": "assistant", "reasoning_content": "t", "content": "c"}]),
        # A thought that was cut off, and one of which there is only a summary.
        ([USER, thought("t"), USER], [USER, {"role": "assistant", "reasoning_content": "t", "content": ""}, USER]),
        ([USER, thought("s", key="summary", kind="summary_text"), said("a")],
         [USER, {"role": "assistant", "reasoning_content": "s", "content": "a"}]),
        ([USER, call(), {**output(), "output": [{"type": "input_text", "text": "p"}]}],
         [USER, {"role": "assistant", "content": None, "tool_calls": [tool_call()]},
          {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "p"}]}]),
    ],
)  # fmt: skip
def test_messages(value, expected):
    assert messages_of(value) == expected
    assert messages_of(value, "be brief") == [{"role": "system", "content": "be brief"}, *expected]


def test_items_have_the_shape_of_the_openai_types():
    items = parsed([USER, thought("t"), said("a"), call(), output(), {"role": "system", "content": "s"}])
    for item in items:
        assert ITEM.validate_python(item, strict=True).model_dump(exclude_unset=True) == item
    assert len({item["id"] for item in items}) == len(items)
    again = parsed(items)
    assert again == items  # a listing goes in as it came out


def image(kind="input_image", role="user", **fields):
    part = {"type": kind, **({} if fields else {"image_url": "x"}), **fields}
    return [{"role": role, "content": [{"type": "input_text", "text": "a"}, part]}]


@pytest.mark.parametrize(
    ("value", "param", "code"),
    [
        ([], "input", "invalid_value"),
        (3, "input", "invalid_type"),
        ({"role": "user", "content": "q"}, "input", "invalid_type"),
        ([3], "input[0]", "invalid_type"),
        ([{}], "input[0]", "invalid_value"),
        ([USER, {"type": "message", "role": "user"}], "input[1].content", "missing_required_parameter"),
        ([{"type": "message", "content": "a"}], "input[0].role", "missing_required_parameter"),
        ([{"role": "tool", "content": "a"}], "input[0].role", "invalid_value"),
        ([{"role": "user", "content": []}], "input[0].content", "invalid_value"),
        ([{"role": "user", "content": 3}], "input[0].content", "invalid_type"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text", "missing_required_parameter"),
        ([{"role": "user", "content": [{"type": "x", "text": "a"}]}], "input[0].content[0].type", "invalid_value"),
        ([{"role": "user", "content": "a", "phase": "commentary"}], "input[0].phase", "invalid_value"),
        ([{**said("a"), "phase": "x"}], "input[0].phase", "invalid_value"),
        ([{**USER, "extra": 1}], "input[0].extra", "unknown_parameter"),
        ([{**said("a"), "status": "done"}], "input[0].status", "invalid_value"),
        ([{**USER, "status": "done"}], "input[0].status", "invalid_value"),
        ([{**USER, "id": 3}], "input[0].id", "invalid_type"),
        (image(role="system"), "input[0].content[1]", "invalid_value"),
        (image("input_audio", role="assistant"), "input[0].content[1]", "invalid_value"),
        (image(file_id="f"), "input[0].content[1].file_id", "unsupported_parameter"),
        (image(detail="low"), "input[0].content[1].image_url", "missing_required_parameter"),
        (image(more=1, image_url="x"), "input[0].content[1].more", "unknown_parameter"),
        (image("input_file"), "input[0].content[1]", "file_not_supported"),
        ([{"type": "web_search_call", "id": "w"}], "input[0].type", "unsupported_parameter"),
        ([{"type": "item_reference", "id": "msg_1"}], "input[0].id", "item_not_found"),
        ([{"type": "reasoning", "summary": [], "encrypted_content": "x"}], "input[0].encrypted_content",
         "unsupported_parameter"),
        ([{"type": "reasoning", "content": [{"type": "text", "text": "a"}]}], "input[0].content[0].type", "invalid_value"),
        ([USER, {"type": "function_call", "call_id": "c", "name": "f"}], "input[1].arguments", "missing_required_parameter"),
        ([USER, {"type": "function_call_output", "call_id": "c"}], "input[1].output", "missing_required_parameter"),
        ([USER, output()], "input[1].call_id", "invalid_value"),
        ([USER, call(), output(), output()], "input[3].call_id", "invalid_value"),
        ([USER, call(), call(), output()], "input[2].call_id", "invalid_value"),
        ([USER, call()], "input", "invalid_value"),
        ([USER, call(), USER], "input", "invalid_value"),
        ([{"role": "user", "content": "\ud800"}], "input[0].content", "invalid_value"),
    ],
)  # fmt: skip
def test_refused_by_name(client, factory, value, param, code):
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(input=value)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert factory.opened == []  # before anything is loaded


def test_invalid_arguments_of_a_call_name_the_item(client):
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(input=[USER, call(arguments="{"), output()])
    assert caught.value.param.startswith("input[1]") and "messages" not in caught.value.message
