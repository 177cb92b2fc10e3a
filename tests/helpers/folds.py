"""Folds of streams, mostly by the openai package's own accumulators, in a form that can be compared with whole replies."""

from openai import omit
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from cai_runtime.api.completions import CompletionChunk

STREAM_EVENT = TypeAdapter(ResponseStreamEvent)
MADE_UP = ("call_", "rs_", "msg_", "fc_", "resp_")  # beginnings of random ids
LAST = {"response.completed", "response.incomplete", "response.failed"}


def bare(reply):
    """A reply as a dict, without what differs from call to call; ids that were made up are numbered in their order."""
    dumped = reply.model_dump()
    for name in ("created", "created_at", "completed_at"):
        dumped.pop(name, None)
    if "choices" in dumped:
        del dumped["id"]
    return without_empty(dumped, {})


def without_empty(value, names):
    """Without null fields and the index of a call: accumulators keep or leave them as they like."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if item is not None}
        if "function" in kept:
            kept.pop("index", None)
            kept["function"].pop("parsed_arguments", None)
        return {key: without_empty(item, names) for key, item in kept.items()}
    if isinstance(value, list):
        return [without_empty(item, names) for item in value]
    if isinstance(value, str) and value.startswith(MADE_UP) and len(value) > 24:
        return names.setdefault(value, f"id {len(names)}")
    return value


def fold_chat(chunks, usage=True):
    """The reply of a chat's chunks. usage: whether they end with the usage."""
    one_reply(chunks, ChatCompletionChunk, usage)
    ids, roles = [], []
    state = ChatCompletionStreamState()
    for chunk in chunks:
        for choice in chunk.choices:
            roles += [choice.index] * (choice.delta.role is not None)
            for call in choice.delta.tool_calls or ():
                ids += [call.id] * (call.id is not None)
                assert (call.id is None) == (call.function.name is None) == (call.type is None)
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk.model_dump(exclude_unset=True)))
    assert len(set(ids)) == len(ids) and len(set(roles)) == len(roles) == len({*roles})
    return state.current_completion_snapshot


def one_reply(chunks, of_type, usage):
    """Every chunk says the same of the reply; each choice ends once, with its last chunk; the usage comes last, alone."""
    ended = set()
    for chunk in chunks:
        dumped = chunk.model_dump()
        assert of_type.model_validate(dumped, strict=True).model_dump() == dumped
        assert [getattr(chunk, name) for name in HEAD] == [getattr(chunks[0], name) for name in HEAD]
        for choice in chunk.choices:
            assert choice.index not in ended
            ended |= {choice.index} if choice.finish_reason is not None else set()
    assert ended == {choice.index for chunk in chunks for choice in chunk.choices}
    assert [chunk.choices == [] for chunk in chunks] == [False] * (len(chunks) - usage) + [True] * usage
    assert [chunk.usage is not None for chunk in chunks] == [chunk.choices == [] for chunk in chunks]


HEAD = ("id", "object", "created", "model", "system_fingerprint")


def fold_completion(chunks, usage=True):
    """The reply of a text completion's chunks as a dict; that package has no accumulator of them."""
    one_reply(chunks, CompletionChunk, usage)
    found = {}
    for chunk in chunks:
        for choice in chunk.choices:
            kept = found.setdefault(choice.index, {"index": choice.index, "text": ""})
            kept["text"] += choice.text
            if choice.finish_reason is not None:
                kept["finish_reason"] = choice.finish_reason
            for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                kept.setdefault("logprobs", {}).setdefault(name, []).extend(values)
    head = {name: getattr(chunks[0], name) for name in HEAD if name not in ("id", "created")}
    usages = {"usage": chunks[-1].usage.model_dump()} if usage else {}
    return without_empty({**head, "choices": [found[index] for index in sorted(found)], **usages}, {})


def fold_response(events):
    """The response of a stream's events: what they say piece by piece is what the last one says, ids included."""
    check_order(events)
    state, snapshots = ResponseStreamState(input_tools=omit, text_format=omit), {}
    logprobs, pieces = {}, {}
    for event in events:
        dumped = event.model_dump(by_alias=True)  # a schema is called so in JSON, and otherwise in Python
        assert STREAM_EVENT.validate_python(dumped, strict=True).model_dump(by_alias=True) == dumped
        if event.type.endswith(".delta"):
            pieces[event.item_id] = pieces.get(event.item_id, "") + event.delta
            logprobs[event.item_id] = logprobs.get(event.item_id, []) + dumped.get("logprobs", [])
        for seen in state.handle_event(event):
            if hasattr(seen, "snapshot"):
                snapshots[seen.item_id] = seen.snapshot
    last = events[-1].response
    done = [event.item for event in events if event.type == "response.output_item.done"]
    added = [event.item.id for event in events if event.type == "response.output_item.added"]
    assert last.output == done and [item.id for item in done] == added and len({*added}) == len(added)
    assert {event.response.id for event in events if hasattr(event, "response")} == {last.id}
    for item in done:
        text = item.arguments if item.type == "function_call" else item.content[0].text
        assert pieces.get(item.id, "") == text
        assert item.type == "reasoning" or snapshots.get(item.id, "") == text
        if item.type == "message":
            assert [each.model_dump() for each in item.content[0].logprobs] == logprobs.get(item.id, [])
    if last.status == "completed":
        accumulated = state._completed_response
        assert (accumulated.id, accumulated.output_text) == (last.id, last.output_text)
        assert bare(accumulated) == bare(last)
    return last


def check_order(stream):
    """Numbers from 0, items in order and one at a time, each opened part and item closed under its own id."""
    assert [event.sequence_number for event in stream] == list(range(len(stream)))
    assert [event.type for event in stream[:2]] == ["response.created", "response.in_progress"]
    assert stream[-1].type in LAST
    item, part, index = None, None, -1
    for event in stream[2:-1]:
        match event.type:
            case "response.output_item.added":
                assert item is None and event.output_index == index + 1 and event.item.status == "in_progress"
                item, index, text = event.item, event.output_index, ""
            case "response.content_part.added":
                assert part is None and event.part.text == ""
                part = event.part
            case "response.content_part.done":
                assert part is not None and event.part.text == text
                part = None
            case "response.output_item.done":
                assert part is None and event.item.id == item.id and event.item.status != "in_progress"
                item = None
            case kind if kind.endswith(".delta"):
                assert event.delta
                text += event.delta
            case _:
                assert (event.arguments if item.type == "function_call" else event.text) == text
        if hasattr(event, "item_id"):
            assert item is not None and event.item_id == item.id
        assert event.output_index == index
    assert item is None and part is None


def difference(one, other, place=""):
    """Where two replies first differ, and in what; "" where they are equal. (pytest takes minutes over long lists.)"""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return next((d for key in one if (d := difference(one[key], other[key], f"{place}.{key}"))), "")
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return next((d for i in range(len(one)) if (d := difference(one[i], other[i], f"{place}[{i}]"))), "")
    return "" if one == other else f"{place or 'all'}: {one!r:.300} and {other!r:.300}"
