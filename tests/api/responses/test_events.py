"""The state machine: whatever a format says, the stream is well formed and its fold is the response."""

import pytest
from folds import check_order, fold_response
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response

from cai_runtime.api.errors import InternalServerError
from cai_runtime.api.responses.events import ResponseMachine, merged
from cai_runtime.api.responses.reply import ResponseReply
from cai_runtime.engine.request import Finished
from cai_runtime.formats.events import (
    ArgumentsEvent,
    EndEvent,
    MarkerEvent,
    ReasoningEvent,
    TextEvent,
    ToolCallEvent,
)


def in_progress():
    return Response(
        id="resp_1",
        object="response",
        created_at=0.0,
        status="in_progress",
        model="abc",
        output=[],
        parallel_tool_calls=True,
        tool_choice="auto",
        tools=[],
    )


def reply():
    return ResponseReply(ResponseMachine(in_progress(), max_tokens=10**6), decoder=None)


@st.composite
def answers(draw):
    """The events of one answer: thoughts, texts, calls and markers in any order, in pieces."""
    events, calls = [], 0
    token = st.lists(st.integers(0, 99), max_size=2).map(tuple)
    pieces = st.lists(st.text('ab{}"\\ é\n🙂', min_size=1, max_size=5), max_size=4)
    for kind in draw(st.lists(st.sampled_from(["text", "thought", "call", "marker"]), max_size=7)):
        if kind == "marker":
            events.append(MarkerEvent(draw(token)))
        elif kind == "call":
            events.append(ToolCallEvent(calls, f"call_{calls}", "f", draw(token)))
            events += [ArgumentsEvent(calls, text, draw(token)) for text in draw(pieces)]
            calls += 1
        else:
            of = TextEvent if kind == "text" else ReasoningEvent
            events += [of(text, draw(token)) for text in draw(pieces)]
    reason = draw(st.sampled_from(["stop", "length"] + ["tool_calls"] * (calls > 0)))
    return [*events, EndEvent(reason, draw(token))]


def finished(events):
    tokens = tuple(token for event in events for token in event.token_ids)
    return Finished(tuple(events), tokens, events[-1].finish_reason, prompt_tokens=7, cached_tokens=4)


def stream_of(events, format):
    chunks = [*format.opening()]
    for event in events:
        chunks += format.chunks(0, event)
    return chunks + format.closing([finished(events)])


def without_ids(response):
    dumped = response.model_dump(exclude={"completed_at"})
    for item in dumped["output"]:
        item.pop("id")
    return dumped


@settings(max_examples=200)
@given(answers())
def test_fold_of_the_stream_is_the_response(events):
    """By the openai package's own accumulator."""
    last = fold_response(stream_of(events, reply()))
    assert without_ids(last) == without_ids(reply().fold([finished(events)]))


@given(answers())
def test_text_thoughts_and_calls_are_kept(events):
    whole = reply().fold([finished(events)])
    of = {"message": "", "reasoning": "", "function_call": ""}
    for item in whole.output:
        of[item.type] += item.arguments if item.type == "function_call" else item.content[0].text
    for kind, event_type in (("message", TextEvent), ("reasoning", ReasoningEvent), ("function_call", ArgumentsEvent)):
        assert of[kind] == "".join(event.text for event in events if isinstance(event, event_type))
    calls = [item.call_id for item in whole.output if item.type == "function_call"]
    assert calls == [event.call_id for event in events if isinstance(event, ToolCallEvent)]
    assert [event.text for event in merged(events) if isinstance(event, TextEvent)] == [
        item.content[0].text for item in whole.output if item.type == "message" and item.content[0].text
    ]


@given(answers())
def test_usage_counts_every_token_once(events):
    usage = stream_of(events, reply())[-1].response.usage
    assert usage == reply().fold([finished(events)]).usage
    assert usage.output_tokens == sum(len(event.token_ids) for event in events)
    thought = sum(len(event.token_ids) for event in events if isinstance(event, ReasoningEvent))
    assert usage.output_tokens_details.reasoning_tokens == thought
    assert (usage.input_tokens, usage.input_tokens_details.cached_tokens) == (7, 4)
    assert usage.total_tokens == 7 + usage.output_tokens


@given(answers(), st.data())
def test_a_failure_closes_what_is_open(events, data):
    format = reply()
    stream = [*format.opening()]
    for event in events[: data.draw(st.integers(0, len(events) - 1))]:
        stream += format.chunks(0, event)
    stream += format.failing(InternalServerError("the device is on fire"))
    check_order(stream)
    response = stream[-1].response
    assert (stream[-1].type, response.status, response.error.code) == ("response.failed", "failed", "server_error")
    assert response.error.message == "the device is on fire" and response.completed_at is None
    assert format.failing(InternalServerError("again")) == []


@given(answers(), st.data())
def test_a_cancelled_stream_closes_what_is_open_and_shows_nothing_more(events, data):
    format = reply()
    cut = data.draw(st.integers(0, len(events) - 1))
    stream = [*format.opening()]
    for event in events[:cut]:
        stream += format.chunks(0, event)
    assert format.machine.cancel() and not format.machine.cancel()
    for event in events[cut:]:
        assert format.chunks(0, event) == []
    stream += format.failing(InternalServerError("aborted", code="request_aborted"))
    assert format.closing([finished(events)]) == []
    check_order([*stream, _terminal(format, stream)])
    assert format.machine.snapshot().status == "cancelled"


def _terminal(format, stream):
    """There is no event for a cancelled response: one in its place, for check_order."""
    return type(stream[0]).model_construct(
        type="response.incomplete", sequence_number=len(stream), response=format.machine.snapshot()
    )


@pytest.mark.parametrize(
    ("events", "status", "reason", "items"),
    [
        ([TextEvent("a"), EndEvent("stop")], "completed", None, ["completed"]),
        ([EndEvent("stop")], "completed", None, ["completed"]),
        ([TextEvent("a"), EndEvent("length", (1,) * 10**6)], "incomplete", "max_output_tokens", ["incomplete"]),
        ([ReasoningEvent("t"), TextEvent("a"), EndEvent("length", (1,) * 10**6)], "incomplete", "max_output_tokens",
         ["completed", "incomplete"]),
        # The model ended inside its thought, with tokens left.
        ([ReasoningEvent("t"), EndEvent("length")], "incomplete", None, ["incomplete"]),
        ([ReasoningEvent("t"), EndEvent("stop")], "incomplete", None, ["incomplete"]),
        ([ToolCallEvent(0, "c", "f"), ArgumentsEvent(0, "{}"), EndEvent("tool_calls")], "completed", None, ["completed"]),
    ],
)  # fmt: skip
def test_states(events, status, reason, items):
    response = reply().fold([finished(events)])
    assert response.status == status and [item.status for item in response.output] == items
    assert (response.incomplete_details is None) == (status == "completed")
    if response.incomplete_details:
        assert response.incomplete_details.reason == reason
    assert (response.completed_at is not None) == (status == "completed")


def test_kinds_of_events():
    events = [ReasoningEvent("hm"), MarkerEvent((1,)), TextEvent("a"), TextEvent("b"), ToolCallEvent(0, "c", "f"),
              ArgumentsEvent(0, "{}"), EndEvent("tool_calls")]  # fmt: skip
    kinds = [event.type.removeprefix("response.") for event in stream_of(events, reply())]
    assert kinds == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip


def test_snapshot_shows_the_open_item():
    format = reply()
    format.opening()
    format.chunks(0, TextEvent("half a "))
    snapshot = format.machine.snapshot()
    assert (snapshot.status, snapshot.output[0].status) == ("in_progress", "in_progress")
    assert snapshot.output_text == "half a "
    snapshot.output.clear()
    assert format.machine.snapshot().output_text == "half a "


def test_arguments_outside_their_call_are_a_fault_of_the_format():
    with pytest.raises(AssertionError, match="outside its call"):
        reply().chunks(0, ArgumentsEvent(0, "{}"))
