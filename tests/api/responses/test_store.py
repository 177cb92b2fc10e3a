"""What a client remembers of its responses: conversations, listings, deletion, bounds."""

import gc

import pytest

from cai_runtime import BadRequestError, InternalServerError, NotFoundError
from cai_runtime.api.responses.store import ResponseStore
from cai_runtime.engine.outbox import TokenLog
from cai_runtime.formats.events import ArgumentsEvent, EndEvent, TextEvent, ToolCallEvent

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def ask(text="hi", **params):
    return {"input": text, "temperature": 0, "max_output_tokens": 3, **params}


def test_nothing_is_kept_by_default(client):
    response = client.responses.create(**ask())
    assert not response.store
    for method in (client.responses.retrieve, client.responses.delete, client.responses.cancel,
                   client.responses.input_items.list):  # fmt: skip
        with pytest.raises(NotFoundError) as caught:
            method(response.id)
        assert (caught.value.param, caught.value.code) == ("response_id", "response_not_found")
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(**ask(previous_response_id=response.id))
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


def test_retrieve_gives_an_equal_copy(client):
    response = client.responses.create(**ask(store=True, metadata={"a": "b"}))
    again = client.responses.retrieve(response.id, timeout=3, include=[])
    assert again == response and again.store
    again.output.clear()
    response.metadata["a"] = "changed"
    assert client.responses.retrieve(response.id).metadata == {"a": "b"}
    assert client.responses.retrieve(response.id).output_text == "abc"


@pytest.mark.parametrize(
    ("options", "param"),
    [({"stream": True}, "stream"), ({"starting_after": 3}, "starting_after"), ({"other": 1}, "other"),
     ({"include": ["reasoning.encrypted_content"]}, "include"), ({"include_obfuscation": True}, "include_obfuscation")],
)  # fmt: skip
def test_retrieve_refuses_by_name(client, options, param):
    response = client.responses.create(**ask(store=True))
    with pytest.raises(BadRequestError) as caught:
        client.responses.retrieve(response.id, **options)
    assert caught.value.param == param


def test_conversation(client, prompts):
    first = client.responses.create(**ask("one", store=True, instructions="be brief"))
    prompts()
    second = client.responses.create(**ask("two", store=True, previous_response_id=first.id))
    client.responses.create(**ask("three", previous_response_id=second.id, instructions="be long"))
    assert second.previous_response_id == first.id and second.instructions is None
    # Instructions are those of the request alone.
    assert prompts() == [
        "user:one\nassistant:abc\nuser:two\nassistant:\n",
        "system:be long\nuser:one\nassistant:abc\nuser:two\nassistant:abc\nuser:three\nassistant:\n",
    ]


def test_a_conversation_branches(client, prompts):
    first = client.responses.create(**ask("one", store=True))
    prompts()
    for text in ("two", "2"):
        client.responses.create(**ask(text, previous_response_id=first.id))
    assert [prompt.splitlines()[-2] for prompt in prompts()] == ["user:two", "user:2"]


def test_outputs_of_calls_go_to_a_stored_response(client, scripted):
    call = [ToolCallEvent(0, "call_1", "f"), ArgumentsEvent(0, "{}"), EndEvent("tool_calls")]
    cut_off = [TextEvent("a"), ToolCallEvent(0, "call_2", "f"), ArgumentsEvent(0, "{"), EndEvent("length")]
    answer = [TextEvent("done"), EndEvent("stop")]
    format = scripted(call, answer, cut_off, answer)
    tools = [{"type": "function", "name": "f", "parameters": None, "strict": False}]
    first = client.responses.create(input="go", tools=tools, store=True)
    output = {"type": "function_call_output", "call_id": "call_1", "output": "r"}
    with pytest.raises(BadRequestError, match="call_1"):
        client.responses.create(input="next", previous_response_id=first.id, tools=tools)
    second = client.responses.create(input=[output], previous_response_id=first.id, tools=tools, store=True)
    assert second.output_text == "done"
    assert [message.role for message in format.conversations[1].messages] == ["user", "assistant", "tool"]
    third = client.responses.create(input="go", tools=tools, store=True)
    assert [item.status for item in third.output] == ["completed", "incomplete"]
    fourth = client.responses.create(input="on", previous_response_id=third.id, tools=tools)
    assert fourth.output_text == "done"  # the call that was cut off is none
    assert [message.text for message in format.conversations[3].messages] == ["go", "a", "on"]


def test_only_a_response_that_ended_goes_on(client, factory):
    factory.pause_before_step(10)
    with client.responses.create(**ask(store=True, stream=True, max_output_tokens=50, ignore_eos=True)) as stream:
        response_id = next(stream).response.id
        with pytest.raises(BadRequestError, match="in_progress") as caught:
            client.responses.create(**ask(previous_response_id=response_id))
        assert caught.value.param == "previous_response_id"
    factory.resume()
    with pytest.raises(BadRequestError, match="cancelled"):
        client.responses.create(**ask(previous_response_id=response_id))


def test_input_items(client):
    first = client.responses.create(**ask([{"role": "user", "content": f"q{i}"} for i in range(3)], store=True))
    second = client.responses.create(**ask("q3", store=True, previous_response_id=first.id))
    page = client.responses.input_items.list(second.id, order="asc", limit=2)
    assert ([item.content[0].text for item in page.data], page.has_more) == (["q0", "q1"], True)
    assert (page.first_id, page.last_id, page.object) == (page.data[0].id, page.data[1].id, "list")
    texts = ["q0", "q1", "q2", "abc", "q3"]
    assert [item.content[0].text for item in page] == texts  # goes on to the pages after it
    assert [item.content[0].text for item in client.responses.input_items.list(second.id)] == texts[::-1]
    rest = client.responses.input_items.list(second.id, after=page.last_id, order="asc")
    assert [item.role for item in rest.data] == ["user", "assistant", "user"] and not rest.has_more
    body = {"after": page.first_id, "order": "asc", "limit": 1}
    listed = client.responses.input_items.list(second.id, extra_body=body, timeout=3)
    assert [item.content[0].text for item in listed] == texts[1:]
    for options, param in [({"limit": 0}, "limit"), ({"limit": 101}, "limit"), ({"order": "up"}, "order"),
                           ({"after": "msg_x"}, "after"), ({"before": "x"}, "before")]:  # fmt: skip
        with pytest.raises(BadRequestError) as caught:
            client.responses.input_items.list(second.id, **options)
        assert caught.value.param == param


def test_references_to_stored_items(client, prompts):
    first = client.responses.create(**ask("one", store=True))
    (asked,) = client.responses.input_items.list(first.id).data
    prompts()
    client.responses.create(**ask([{"type": "item_reference", "id": asked.id}, {"id": first.output[0].id},
                                   {"role": "user", "content": "two"}]))  # fmt: skip
    assert prompts() == ["user:one\nassistant:abc\nuser:two\nassistant:\n"]


def test_deletion(client, prompts):
    first = client.responses.create(**ask("one", store=True))
    second = client.responses.create(**ask("two", store=True, previous_response_id=first.id))
    assert client.responses.delete(first.id) is None
    for method in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(NotFoundError):
            method(first.id)
    prompts()
    client.responses.create(**ask("three", previous_response_id=second.id))
    assert prompts()[0].startswith("user:one\nassistant:abc\nuser:two")  # it keeps what it was made from


def test_deletion_stops_a_running_response(client, factory):
    factory.pause_before_step(10)
    stream = client.responses.create(**ask(store=True, stream=True, max_output_tokens=50, ignore_eos=True))
    client.responses.delete(next(stream).response.id)
    factory.resume()
    (engine,) = factory.engines
    engine.check_integrity()
    assert engine.stats().aborted == 1


def test_a_failed_whole_response_leaves_nothing(client, factory):
    client.responses.create(**ask())
    factory.runners[0].fail = RuntimeError("device on fire")
    with pytest.raises(InternalServerError):
        client.responses.create(**ask(store=True))
    assert len(client._responses) == 0 and client._responses.bytes == 0


def test_clients_of_other_options_share_it(client, new_client, model_dir):
    response = client.responses.create(**ask(store=True))
    assert client.with_options(timeout=30).responses.retrieve(response.id) == response
    with pytest.raises(NotFoundError):
        new_client(model=model_dir).responses.retrieve(response.id)


def test_a_closed_client_remembers_nothing(client):
    response = client.responses.create(**ask(store=True))
    client.close()
    with pytest.raises(NotFoundError):
        client.responses.retrieve(response.id)


@pytest.fixture
def bounded(client):
    def bound(**bounds):
        store = client._responses
        store.__init__(**bounds)
        return store

    return bound


def test_the_least_recently_used_go_first(client, bounded):
    store = bounded(max_responses=3)
    ids = [client.responses.create(**ask(store=True)).id for _ in range(3)]
    client.responses.retrieve(ids[0])
    ids.append(client.responses.create(**ask(store=True)).id)
    assert len(store) == 3
    with pytest.raises(NotFoundError, match="3 are kept"):
        client.responses.retrieve(ids[1])
    for i in (0, 2, 3):
        client.responses.retrieve(ids[i])


def test_bytes_are_bounded(client, bounded):
    store = bounded(max_bytes=8000)
    ids = [client.responses.create(**ask("q" * 100, store=True)).id for _ in range(9)]
    assert 2 <= len(store) < 9 and 4000 < store.bytes <= 8000
    client.responses.retrieve(ids[-1])
    for response_id in ids[-len(store) :]:
        client.responses.delete(response_id)
    assert (len(store), store.bytes, store._shares) == (0, 0, {})


def test_shared_items_count_once(client, bounded):
    store = bounded()
    first = client.responses.create(**ask("q" * 120, store=True))
    for _ in range(3):
        client.responses.create(**ask("x", store=True, previous_response_id=first.id))
    assert len(store._shares) == 1 + 1 + 3  # the first input, its output, three further inputs
    client.responses.delete(first.id)
    store.clear()
    assert (store.bytes, store._shares) == (0, {})


def test_what_can_not_be_kept_is_refused(client, factory, bounded):
    bounded(max_bytes=1000)
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(**ask("q" * 1000, store=True))
    assert (caught.value.param, caught.value.code) == ("store", "too_large_to_store")
    assert factory.opened == []


def test_a_dropped_stream_is_not_kept_alive_by_the_store(client, factory):
    factory.pause_before_step(10)
    stream = client.responses.create(**ask(store=True, stream=True, max_output_tokens=50, ignore_eos=True))
    response_id = next(stream).response.id
    del stream
    gc.collect()
    factory.resume()
    assert client.responses.retrieve(response_id).status == "cancelled"
    factory.engines[0].check_integrity()
    assert factory.engines[0].stats().aborted == 1


def test_a_response_that_is_done_keeps_none_of_its_tokens(client):
    """They take much more memory than the JSON that the store counts."""

    def logs():
        gc.collect()
        return {id(found) for found in gc.get_objects() if type(found) is TokenLog}

    asked, before = ask(store=True), logs()
    ids = [client.responses.create(**asked).id, list(client.responses.create(**asked, stream=True))[-1].response.id]
    assert logs() <= before
    assert [client.responses.cancel(response_id).output_text for response_id in ids] == ["abc", "abc"]


def test_an_interrupted_stream_is_cancelled(client, factory, monkeypatch):
    factory.pause_before_step(10)
    stream = client.responses.create(**ask(store=True, stream=True, max_output_tokens=50, ignore_eos=True))
    response_id = next(stream).response.id

    def interrupt(timeout):
        raise KeyboardInterrupt

    monkeypatch.setattr(stream._running._group, "next", interrupt)
    assert next(stream).type == "response.in_progress"
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert client.responses.retrieve(response_id).status == "cancelled", "the stream is still there"


def test_store_of_nothing():
    store = ResponseStore()
    assert (len(store), store.bytes, store.find_item("x")) == (0, 0, None)
    store.discard("x")
    store.clear()
