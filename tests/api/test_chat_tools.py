"""Replies and streams of answers with thoughts and tool calls, over a format that makes them of the alphabet."""

import json
import string
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from cai_runtime import BadRequestError
from cai_runtime.api.chat import ChatReply
from cai_runtime.api.usage import ReplyHead
from cai_runtime.engine.request import Delta, Finished
from cai_runtime.formats.conversation import Prepared
from cai_runtime.formats.events import (
    ArgumentsEvent,
    EndEvent,
    MarkerEvent,
    ReasoningEvent,
    TextEvent,
    ToolCallEvent,
)
from cai_runtime.formats.rendering import render_conversation

TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }}{{ t.function.description }}{{ t.function.parameters|tojson }}"
    "{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content }}{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments|tojson }}{% endfor %};{% endfor %}"
)
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
# What the letters are, in their order; the end of the text follows the z.
PARTS = [("abc", "thought"), ("d", "marker"), ("efg", "text"), ("h", "call"), ("ijk", "arguments"), ("l", "marker"),
         ("m", "call"), ("no", "arguments"), ("pqrstuvwxyz", "text")]  # fmt: skip


class AlphabetOutput:
    """abc is a thought, efg content, h and m begin calls, whose arguments follow; the rest is content again."""

    def __init__(self, letters, spec):
        self.letters, self.spec, self.calls = letters, spec, -1

    def feed(self, token_ids):
        events = []
        for count, token in enumerate(token_ids, 1):
            if token in self.spec.ends:
                events.append(EndEvent("tool_calls" if self.calls >= 0 else "stop", (token,)))
                return Delta(tuple(events), tuple(token_ids[:count]), events[-1].finish_reason)
            events.append(self._event(chr(97 + self.letters.index(token)), token))
        return Delta(tuple(events), tuple(token_ids))

    def finish(self):
        return Delta((EndEvent("length", ()),), (), "length")

    def _event(self, letter, token):
        part = next(kind for letters, kind in PARTS if letter in letters)
        if part == "call":
            self.calls += 1
            return ToolCallEvent(self.calls, f"call_{letter}", "look", (token,))
        if part == "arguments":
            return ArgumentsEvent(self.calls, letter, (token,))
        if part == "marker":
            return MarkerEvent((token,))
        return (ReasoningEvent if part == "thought" else TextEvent)(letter, (token,))


@dataclass
class AlphabetFormat:
    """A format of answers as above. Keeps what it was asked."""

    tokenizer: object
    grammar: str | None = None
    asked: list = field(default_factory=list)
    name = "alphabet"

    def prepare(self, conversation):
        self.asked.append(conversation)
        rendered = render_conversation(self.tokenizer, conversation)
        letters = self.tokenizer.convert_tokens_to_ids(list(string.ascii_lowercase))
        return Prepared(rendered.prompt_ids, partial(AlphabetOutput, letters), self.grammar)


@pytest.fixture
def opened(client, tokenizer):
    tokenizer.chat_template = TEMPLATE
    opened = client._host.open(client._host.resolve("abc"))
    opened.__dict__["format"] = AlphabetFormat(opened.tokenizer)
    return opened


def test_reply(client, ask, opened, valid):
    reply = client.chat.completions.create(**ask, tools=[LOOK])
    valid(reply, ChatCompletion)
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.model_dump(exclude={"refusal", "annotations", "audio", "function_call"}) == {
        "role": "assistant",
        "content": "efgpqrstuvwxyz",
        "reasoning_content": "abc",
        "tool_calls": [
            {"id": "call_h", "type": "function", "function": {"name": "look", "arguments": "ijk"}},
            {"id": "call_m", "type": "function", "function": {"name": "look", "arguments": "no"}},
        ],
    }
    assert reply.usage.completion_tokens_details.reasoning_tokens == 3
    assert reply.usage.completion_tokens == 27


# The reference's examples of a reply and of a chunk, key by key.
REPLY_KEYS = {
    "": {"id", "object", "created", "model", "choices", "usage"},
    "choices": {"message", "finish_reason", "index"},
    "message": {"role", "content"},
    "usage": {"prompt_tokens", "completion_tokens", "total_tokens"},
}
CHUNK_KEYS = {"": {"id", "object", "created", "model", "choices"}, "choices": {"delta", "index", "finish_reason"}}


@pytest.mark.parametrize(
    "options", [{}, {"tools": [LOOK]}, {"n": 2}, {"max_tokens": 2}, {"logit_bias": {}, "stop": "g"}]
)
def test_replies_and_chunks_have_the_references_keys(client, ask, opened, valid, options):
    reply = client.chat.completions.create(**ask, **options)
    valid(reply, ChatCompletion)
    dumped = reply.model_dump()
    objects = [("", dumped), ("usage", dumped["usage"])]
    objects += [
        (key, one) for choice in dumped["choices"] for key, one in (("choices", choice), ("message", choice["message"]))
    ]
    for name, value in objects:
        assert value.keys() >= REPLY_KEYS[name]
    usage = {"include_usage": True}
    *chunks, last = client.chat.completions.create(**ask, **options, stream=True, stream_options=usage)
    for chunk in chunks:
        valid(chunk, ChatCompletionChunk)
        (choice,) = chunk.model_dump()["choices"]
        assert chunk.model_dump().keys() >= CHUNK_KEYS[""] and choice.keys() >= CHUNK_KEYS["choices"]
    whole, streamed = reply.usage.model_dump(), last.usage.model_dump()
    for counts in (whole, streamed):
        counts["prompt_tokens_details"].pop("cached_tokens")  # the second finds the first's prompt
    assert whole == streamed


def test_chunks_are_as_openai_streams_them(client, ask, opened, valid):
    chunks = list(client.chat.completions.create(**ask, tools=[LOOK], stream=True))
    for chunk in chunks:
        valid(chunk, ChatCompletionChunk)
    deltas = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks]
    assert deltas[:4] == [{"role": "assistant"}, *({"reasoning_content": letter} for letter in "abc")]
    assert deltas[4:7] == [{"content": letter} for letter in "efg"]
    function = {"name": "look", "arguments": ""}
    assert deltas[7] == {"tool_calls": [{"index": 0, "id": "call_h", "type": "function", "function": function}]}
    assert deltas[8] == {"tool_calls": [{"index": 0, "function": {"arguments": "i"}}]}
    assert deltas[11]["tool_calls"][0]["index"] == 1 and deltas[-1] == {}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert len(chunks) == 1 + 26 - 2 + 1  # none for the markers


def test_only_calls_have_no_content():
    events = (ToolCallEvent(0, "c", "look"), ArgumentsEvent(0, "{}"), EndEvent("tool_calls"))
    assert folded([events]).choices[0].message.content is None
    assert folded([(ReasoningEvent("Hm"), EndEvent("length"))]).choices[0].message.content is None
    assert folded([(EndEvent("stop"),)]).choices[0].message.content == ""


def test_a_reply_that_ends_inside_a_thought(client, ask, opened):
    reply = client.chat.completions.create(**ask, max_tokens=2)
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content, message.tool_calls) == (None, "ab", None)
    assert reply.choices[0].finish_reason == "length"
    again = client.chat.completions.create(messages=[*ask["messages"], message, *ask["messages"]], max_tokens=1)
    assert again.usage.prompt_tokens > reply.usage.prompt_tokens


def test_a_reply_goes_back_into_the_conversation(client, ask, opened):
    message = client.chat.completions.create(**ask, tools=[LOOK]).choices[0].message
    for call in message.tool_calls:
        call.function.arguments = "{}"  # the alphabet is no JSON
    results = [{"role": "tool", "tool_call_id": call.id, "content": "seen"} for call in message.tool_calls]
    for put_back in (message, message.model_dump()):
        client.chat.completions.create(messages=[*ask["messages"], put_back, *results], max_tokens=1)
        again = opened.format.asked[-1].messages
        assert [call.id for call in again[1].calls] == ["call_h", "call_m"] and again[1].reasoning == "abc"


def test_the_format_is_told_of_tools_and_reasoning(client, ask, opened, tokenizer):
    tokenizer.chat_template += "{{ 'on' if enable_thinking }}"
    client.chat.completions.create(
        **ask, tools=[LOOK], tool_choice={"type": "function", "function": {"name": "look"}}, parallel_tool_calls=False,
        reasoning_enabled=True, reasoning_max_tokens=7, response_format={"type": "json_object"}, max_tokens=1,
    )  # fmt: skip
    asked = opened.format.asked[-1]
    assert asked.tools == (asked.tool_choice,) and not asked.parallel_tool_calls and asked.answer is not None
    assert (asked.reasoning.enabled, asked.reasoning.max_tokens) == (True, 7)


def test_a_grammar_masks(client, ask, opened):
    opened.format.grammar = 'start: "ppp"'
    assert client.chat.completions.create(**ask).choices[0].message.content == "ppp"


def test_a_thought_is_closed_when_its_tokens_are_used_up(client, ask, tokenizer):
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = "{{ messages[0].content }}{{ '<think>' }}"
    for options, content in [({}, string.ascii_lowercase), ({"choice": ["pq", "r"]}, "pq")]:
        reply = client.chat.completions.create(**ask, reasoning_max_tokens=4, **options)
        message = reply.choices[0].message
        assert (message.reasoning_content, message.content) == ("abcd", content)
        assert reply.usage.completion_tokens_details.reasoning_tokens == 4
        assert reply.choices[0].finish_reason == "stop"
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**ask, reasoning_enabled=False)
    assert caught.value.param == "reasoning_enabled"


def test_a_format_that_is_named(new_client, model_dir, ask, tokenizer):
    tokenizer.chat_template = TEMPLATE
    for name in ("plain", "hermes"):
        client = new_client(models={"abc": model_dir}, model="abc", format=name)
        assert client._host.open(client._host.resolve("abc")).format.name == name
    with pytest.raises(BadRequestError, match="has no tool calls") as caught:
        new_client(str(model_dir), format="plain").chat.completions.create(**ask, tools=[LOOK])
    assert (caught.value.param, caught.value.code) == ("tools", "tools_not_supported")


def test_refusals_name_the_parameter(client, ask):
    for options, param, code in [
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "custom_tools_not_supported"),
        ({"tools": [LOOK], "tool_choice": "any"}, "tool_choice", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tools": [{**LOOK, "color": "red"}]}, "tools[0].color", "unknown_parameter"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": "hi", "color": "red"}]}, "messages[0].color", "unknown_parameter"),
        ({"reasoning_enabled": True}, "reasoning_enabled", "reasoning_not_supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "reasoning_not_supported"),
        ({"functions": [LOOK["function"]]}, "functions", "unsupported_parameter"),
        ({"function_call": {"name": "look"}}, "function_call", "unsupported_parameter"),
    ]:
        with pytest.raises(BadRequestError) as caught:
            client.chat.completions.create(**{**ask, **options})
        assert (caught.value.param, caught.value.code) == (param, code)


class Query(BaseModel):
    text: str


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [Query]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": Query}]}, "tools[0]"),
        ({"tools": [LOOK], "tool_choice": Query}, "tool_choice"),
    ],
)
def test_a_class_is_no_object(client, ask, options, param):
    """A Pydantic model in the place of what `openai.pydantic_function_tool` makes of it."""
    for call in (client.chat.completions.create, client.chat.completions.parse):
        with pytest.raises(BadRequestError) as caught:
            call(**ask, **options)
        assert caught.value.param.startswith(param)
    flat = {**options, "tools": [{"type": "function", **LOOK["function"]}] if param == "tool_choice" else [Query]}
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(input="hi", **flat)
    assert caught.value.param == param


def test_a_model_without_reasoning_can_be_told_not_to_reason(client, ask):
    for options in ({"reasoning_effort": "none"}, {"reasoning_enabled": False}):
        for model in ("abc", "abc-r"):
            assert client.chat.completions.create(**ask, **options, model=model).choices[0].message.content
            own = {"reasoning": {"effort": "none"}} if "reasoning_effort" in options else options
            response = client.responses.create(input="hi", temperature=0, **own, model=model)
            assert response.output_text and response.reasoning.effort == own.get("reasoning", {}).get("effort")


HEAD = ReplyHead("chatcmpl-x", 1, "abc", "fp")
TEXTS = st.text(min_size=1, max_size=12)
ANSWERS = st.lists(
    st.one_of(
        st.tuples(st.just("thought"), TEXTS),
        st.tuples(st.just("text"), TEXTS),
        st.tuples(st.just("marker"), st.just("")),
        st.tuples(st.just("call"), st.text(max_size=12)),
    ),
    max_size=6,
)


def finished(events):
    tokens = tuple(token for event in events for token in event.token_ids)
    return Finished(tuple(events), tokens, events[-1].finish_reason, prompt_tokens=5, cached_tokens=4)


def folded(choices):
    return ChatReply(HEAD, len(choices), True, decoder=None).fold([finished(events) for events in choices])


def cut_up(data, answer):
    """The events of an answer, its texts cut at random. Each has one token, a character's, so that counts stay."""
    events, calls = [], -1
    for kind, text in answer:
        if kind == "marker":
            events.append(MarkerEvent((0,)))
            continue
        if kind == "call":
            calls += 1
            events.append(ToolCallEvent(calls, f"call_{calls}", "look", (1,)))
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=3)))
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            if piece := text[start:end]:
                tokens = tuple(map(ord, piece))
                made = {"thought": ReasoningEvent, "text": TextEvent}.get(kind)
                events.append(made(piece, tokens) if made else ArgumentsEvent(calls, piece, tokens))
    return [*events, EndEvent("tool_calls" if calls >= 0 else "stop", (2,))]


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_reply_is_the_fold_of_the_stream(data):
    """By the openai package's own accumulator, ids and usage included."""
    answers = data.draw(st.lists(ANSWERS, min_size=1, max_size=2))
    choices = [cut_up(data, answer) for answer in answers]
    reply = folded(choices)
    stream = ChatReply(HEAD, len(choices), True, decoder=None)
    chunks = stream.opening()
    waiting = [list(events) for events in choices]
    while any(waiting):
        index = data.draw(st.sampled_from([i for i, events in enumerate(waiting) if events]))
        chunks += stream.chunks(index, waiting[index].pop(0))
    chunks += stream.closing([finished(events) for events in choices])
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk.model_dump(exclude_unset=True)))
    found = json.loads(state.current_completion_snapshot.model_dump_json())
    want = json.loads(reply.model_dump_json())
    assert without_empty(found) == without_empty(want)
    # However it was cut, the reply is the same.
    assert want == json.loads(folded([cut_up(data, answer) for answer in answers]).model_dump_json())


def without_empty(value):
    """A call's index and fields that are null: the accumulator keeps the one and leaves out some of the others."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if item is not None}
        if "function" in kept:
            kept.pop("index", None)
        return {key: without_empty(item) for key, item in kept.items()}
    return [without_empty(item) for item in value] if isinstance(value, list) else value
