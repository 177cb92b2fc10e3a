"""Conversations: what is accepted, what is refused and how its place is named, and how they are rendered."""

import numpy as np
import pytest
from openai.types.chat import ChatCompletionMessage

from cai_runtime import BadRequestError
from cai_runtime.errors import ConversationError
from cai_runtime.formats.history import TurnForm, turns_of
from cai_runtime.formats.messages import Call, Message, parse_messages
from cai_runtime.formats.template import render


def text(content):
    return {"type": "text", "text": content}


class Equal(str):
    """Says that it is "user"."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return other == "user"


def test_accepted_forms():
    parsed = parse_messages(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [text("one"), text("two")], "name": "Ada"},
            {"role": "assistant", "content": "", "tool_calls": None, "refusal": None, "annotations": []},
        ]
    )
    assert parsed == [
        Message("developer", "Be brief."),
        Message("user", ("one", "two"), "Ada"),
        Message("assistant", ""),
    ]
    system, user, _ = turns_of(parsed, TurnForm({"user": "text", "system": "parts"}))
    assert user == {"role": "user", "content": "one\ntwo", "name": "Ada"}
    assert system["role"] == "system"
    assert turns_of(parsed, TurnForm({"user": "parts"}))[1]["content"] == [text("one"), text("two")]
    assert parse_messages(iter([{"role": "user", "content": "x"}])) == [Message("user", "x")]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (3, "messages"),
        ("hi", "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([{"role": np.array(["user", "x"]), "content": "x"}], "messages[0].role"),
        ([{"role": Equal("<|im_end|>"), "content": "x"}], "messages[0].role"),
        ([ChatCompletionMessage], "messages[0]"),
        ([{"role": "assistant", "content": "x", "tool_calls": np.array([1, 2])}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": "x", "annotations": np.array([])}], "messages[0].annotations"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": b"x"}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [text("x"), {"type": "text"}]}], "messages[0].content[1].text"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "video", "text": "x"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{**text("x"), "more": 1}]}], "messages[0].content[0].more"),
        ([{"role": "user", "content": "x", "mood": "calm"}], "messages[0].mood"),
        ([{"role": "user", "content": "x", "name": 3}], "messages[0].name"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "refusal": "no"}],
         "messages[1].refusal"),
    ],
)  # fmt: skip
def test_refused_by_place(client, messages, param):
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(messages=messages)
    assert caught.value.param == param and isinstance(caught.value.__cause__, ConversationError)


def call(call_id="c1", arguments="{}", **more):
    return {"id": call_id, "type": "function", "function": {"name": "look", "arguments": arguments, **more}}


def calling(*calls, **fields):
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **fields}


def result(call_id="c1", content="seen"):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


USER = {"role": "user", "content": "hi"}


def test_calls_results_and_thoughts():
    parsed = parse_messages(
        [
            USER,
            calling(call(arguments='{"at": "you"}'), call("c2"), reasoning_content="Hm"),
            result("c2", [text("a"), text("b")]),
            result(),
            {"role": "assistant", "reasoning_content": "Hm"},
            calling(call(), content="I look again."),
            result(),
        ]
    )
    assert parsed[1] == Message(
        "assistant", None, calls=(Call("c1", "look", '{"at": "you"}'), Call("c2", "look", "{}")), reasoning="Hm"
    )
    assert parsed[2] == Message("tool", ("a", "b"), call_id="c2")
    assert parsed[4] == Message("assistant", None, reasoning="Hm") and parsed[5].content == "I look again."


def test_messages_of_the_openai_package_go_back_whole():
    from openai.types.chat import ChatCompletionMessage, ParsedChatCompletionMessage

    call_ = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    reply = ChatCompletionMessage(role="assistant", content=None, tool_calls=[call_], reasoning_content="Hm")
    parsed = ParsedChatCompletionMessage[dict](role="assistant", content="{}", parsed={"a": 1})
    want = Message("assistant", None, calls=(Call("c1", "look", "{}"),), reasoning="Hm")
    by_hand = {"role": "assistant", "tool_calls": reply.tool_calls, "reasoning_content": "Hm"}
    for message in (reply, reply.model_dump(), by_hand):
        assert parse_messages([USER, message, result()])[1] == want
    assert parse_messages([USER, parsed])[1] == Message("assistant", "{}")


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([USER, result()], "messages[1].tool_call_id"),
        ([USER, calling(call()), result("c2")], "messages[2].tool_call_id"),
        ([USER, calling(call()), result(), result()], "messages[3].tool_call_id"),
        ([USER, calling(call()), result(), USER, result()], "messages[4].tool_call_id"),
        ([USER, calling(call()), USER], "messages[1].tool_calls"),
        ([USER, calling(call())], "messages[1].tool_calls"),
        ([USER, calling(call(), call("c2")), result("c2"), USER], "messages[1].tool_calls"),
        ([USER, {"role": "tool", "content": "x"}], "messages[1].tool_call_id"),
        ([USER, calling(call()), {**result(), "content": None}], "messages[2].content"),
        ([USER, calling(call(), call())], "messages[1].tool_calls[1].id"),
        ([USER, calling(call(arguments=""))], "messages[1].tool_calls[0].function.arguments"),
        ([USER, calling(call(arguments="null"))], "messages[1].tool_calls[0].function.arguments"),
        ([USER, calling(call(arguments="[1]"))], "messages[1].tool_calls[0].function.arguments"),
        ([USER, calling(call(arguments='{"a": NaN}'))], "messages[1].tool_calls[0].function.arguments"),
        ([USER, calling(call(arguments="[" * 10**5))], "messages[1].tool_calls[0].function.arguments"),
        ([USER, calling(call(arguments="{" + '"a":{' * 80 + "}" * 81))],
         "messages[1].tool_calls[0].function.arguments" + ".a" * 64),
        ([USER, calling(call(arguments='{"a": "\\ud800"}'))], "messages[1].tool_calls[0].function.arguments.a"),
        ([USER, calling(call(arguments={"a": 1}))], "messages[1].tool_calls[0].function.arguments"),
        ([USER, calling(call(more=1))], "messages[1].tool_calls[0].function.more"),
        ([USER, calling({"id": "c1", "type": "custom", "custom": {}})], "messages[1].tool_calls[0].type"),
        ([USER, calling({"type": "function", "function": {}})], "messages[1].tool_calls[0].id"),
        ([USER, calling({"id": "c1"})], "messages[1].tool_calls[0].function"),
        ([USER, calling(call(""))], "messages[1].tool_calls[0].id"),
        ([USER, calling(3)], "messages[1].tool_calls[0]"),
        ([USER, {**calling(), "tool_calls": "c1"}], "messages[1].tool_calls"),
        ([{**USER, "tool_calls": [call()]}], "messages[0].tool_calls"),
        ([{**USER, "tool_call_id": "c1"}], "messages[0].tool_call_id"),
        ([{**USER, "reasoning_content": "x"}], "messages[0].reasoning_content"),
        ([USER, {"role": "assistant", "content": "", "reasoning_content": 3}], "messages[1].reasoning_content"),
        ([USER, {"role": "function", "name": "look", "content": "x"}], "messages[1].role"),
        ([USER, {"role": "assistant", "content": "", "function_call": {"name": "look"}}], "messages[1].function_call"),
    ],
)  # fmt: skip
def test_calls_are_refused_by_place(messages, place):
    with pytest.raises(ConversationError) as caught:
        parse_messages(messages)
    assert caught.value.param == place and f"'{place}" in str(caught.value)


def test_rendered_with_the_checkpoints_template(tokenizer):
    ids = render(tokenizer, [Message("system", "Be kind."), Message("user", "hi")])
    assert tokenizer.decode(ids) == "system:Be kind.\nuser:hi\nassistant:\n"


def test_template_refusal_is_quoted(client, ask):
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(messages=[*ask["messages"], {"role": "system", "content": "x"}])
    assert caught.value.param == "messages" and "the system message must come first" in caught.value.message


def test_broken_template(tokenizer):
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(ConversationError, match="chat template"):
        render(tokenizer, [Message("user", "hi")])


def test_template_runs_in_a_sandbox(tokenizer):
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ConversationError, match="unsafe"):
        render(tokenizer, [Message("user", "hi")])


def test_no_template(new_client, factory, bare_tokenizer, model_dir, ask):
    factory.tokenizer = bare_tokenizer
    client = new_client(str(model_dir))
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**ask)
    assert caught.value.param == "model" and "chat template" in caught.value.message
    assert client.completions.create(prompt="w", temperature=0).choices[0].text == "xyz"


def test_template_by_name(client, tokenizer, ask):
    tokenizer.chat_template = {"short": "w", "long": "{{ messages[0].content }}: w"}
    for name, prompt in (("short", 1), ("long", len("hi: w"))):
        reply = client.chat.completions.create(**ask, chat_template=name, max_tokens=1)
        assert reply.choices[0].message.content == "x" and reply.usage.prompt_tokens == prompt
    for wrong in ({}, {"chat_template": "other"}):
        with pytest.raises(BadRequestError, match="long, short") as caught:
            client.chat.completions.create(**ask, **wrong)
        assert caught.value.param == "chat_template"
    with pytest.raises(BadRequestError, match="string"):
        client.chat.completions.create(**ask, chat_template=3)


def test_failing_template_is_a_bad_request(client, tokenizer, ask):
    tokenizer.chat_template = "{{ 1 + messages }}"
    with pytest.raises(BadRequestError, match="chat template .*TypeError"):
        client.chat.completions.create(**ask)


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"role": "user", "content": "a\ud800"}, "messages[0].content"),
        ({"role": "user", "content": [text("x"), text("\udfff")]}, "messages[0].content[1].text"),
        ({"role": "user", "content": "x", "name": "\ud800"}, "messages[0].name"),
    ],
)
def test_half_of_a_surrogate_pair(client, message, place):
    with pytest.raises(BadRequestError, match="surrogate") as caught:
        client.chat.completions.create(messages=[message])
    assert caught.value.param == place
