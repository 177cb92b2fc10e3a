"""Every example of the CompactifAI API's reference as a Python call, and the replies beside the reference's, key by key."""

import json

import pytest
from openai.types import Completion, Model
from openai.types.audio import TranscriptionVerbose
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from cai_runtime import Client

STREAM_EVENT = TypeAdapter(ResponseStreamEvent)
MODEL = "cai-llama-3-1-8b-slim"
QUESTION = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is artificial intelligence?"},
]
STEPS = [{"role": "user", "content": "Solve this step by step: What is 15% of 240?"}]
HELLO = "Say hello in one short sentence."

CHAT = json.loads(
    """{
"id": "chatcmpl-123XYZ", "object": "chat.completion", "created": 1749600000, "model": "cai-llama-3-1-8b-slim",
"choices": [{"message": {"role": "assistant", "content": "Artificial intelligence (AI) refers to the simulation of human
 intelligence in machines."}, "finish_reason": "stop", "index": 0}],
"usage": {"prompt_tokens": 29, "completion_tokens": 58, "total_tokens": 87}}""".replace("\n", "")
)
CHUNKS = [json.loads(line) for line in (
    '{"id":"chatcmpl-123","object":"chat.completion.chunk","created":1749600000,"model":"cai-llama-3-1-8b-slim",'
    '"choices":[{"delta":{"content":"Hello"},"index":0,"finish_reason":null}]}',
    '{"id":"chatcmpl-123","object":"chat.completion.chunk","created":1749600000,"model":"cai-llama-3-1-8b-slim",'
    '"choices":[{"delta":{"content":" there"},"index":0,"finish_reason":null}]}',
)]  # fmt: skip
TEXT = json.loads("""{
"id": "cmpl-uqkvlQyYK7bGYrRHQ0eXlWi7", "object": "text_completion", "created": 1749600000,
"model": "cai-llama-3-1-8b-slim", "choices": [{"text": "Silicon dreams in digital space,", "index": 0, "logprobs": null,
"finish_reason": "stop"}], "usage": {"prompt_tokens": 6, "completion_tokens": 101, "total_tokens": 107}}""")
ENTRY = json.loads("""{
"id": "cai-llama-3-1-8b-slim", "created": 1753892192, "object": "model", "owned_by": "multiverse_computing",
"parameters_number": "3.28B", "capabilities": {"supports_audio": false, "supports_image": false,
"supports_function_calling": true, "support_chat_completion": true, "supports_responses": false}}""")
TRANSCRIPT = json.loads("""{
"task": "transcribe", "language": "en", "duration": 12.6,
"text": "Welcome to the quarterly planning meeting. Let's review the agenda.",
"segments": [
{"id": 0, "start": 0.0, "end": 7.5, "text": "Welcome to the quarterly planning meeting.", "temperature": 0.0,
"avg_logprob": -0.12, "no_speech_prob": 0.01},
{"id": 1, "start": 7.5, "end": 12.6, "text": "Let's review the agenda.", "temperature": 0.0, "avg_logprob": -0.15,
"no_speech_prob": 0.02}]}""")
IDS = [
    "llama-4-scout", "cai-llama-4-scout-slim", "cai-llama-3-1-8b-slim", "llama-3-1-8b", "cai-llama-3-3-70b-slim",
    "llama-3-3-70b", "mistral-small-3-1", "cai-mistral-small-3-1-slim", "nemotron-3-nano-omni", "gpt-oss-20b",
    "gpt-oss-120b", "whisper-large-v3", "cai-whisper-large-v3-turbo-slim", "hypernova-60b", "blackstar-10b", "glm-5-1",
]  # fmt: skip
# A template with the switch and the levels that the reasoning examples ask for.
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + (m.content or '') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ reasoning_effort or '' }}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


@pytest.fixture
def client(factory, tokenizer, tmp_path):
    """The reference's names, registered for local models."""
    tokenizer.chat_template = TEMPLATE
    models = {}
    for name in (MODEL, "gpt-oss-20b"):
        models[name] = tmp_path / name
        models[name].mkdir()
        (models[name] / "config.json").write_text('{"model_type": "llama"}')
    with Client(models=models, _engine_factory=factory) as client:
        yield client


def differences(example, ours, place="reply"):
    """Keys of the example that are not there, and values of another type."""
    if isinstance(example, dict):
        if not isinstance(ours, dict):
            yield f"{place} is no object: {ours!r}"
            return
        for key, value in example.items():
            if key not in ours:
                yield f"{place}.{key} is missing"
            else:
                yield from differences(value, ours[key], f"{place}.{key}")
    elif isinstance(example, list):
        if not isinstance(ours, list) or not ours:
            yield f"{place} is no list with items: {ours!r}"
            return
        yield from differences(example[0], ours[0], f"{place}[0]")
    elif type(example) is not type(ours):
        yield f"{place}: {type(ours).__name__} instead of {type(example).__name__}"


def compare(example, reply):
    """As it would be on the wire."""
    assert list(differences(example, json.loads(reply.model_dump_json()))) == []


def test_a_difference_is_found():
    example = {"a": 1, "b": [{"c": "x"}], "d": None}
    assert list(differences(example, {"a": 2, "b": [{"c": "y"}], "d": None, "e": 0})) == []
    assert list(differences(example, {"a": "2", "b": [{}], "d": 1})) == [
        "reply.a: str instead of int", "reply.b[0].c is missing", "reply.d: int instead of NoneType",
    ]  # fmt: skip
    assert list(differences(example, {"a": 2, "b": [], "d": None})) == ["reply.b is no list with items: []"]


def test_models(client, valid):
    page = client.models.list()
    assert page.object == "list" and [model.id for model in page.data[: len(IDS)]] == IDS
    for model in page.data[: len(IDS)]:
        valid(model, Model)
        compare(ENTRY, model)
    assert page.data[IDS.index(MODEL)].model_dump(exclude_none=True) == ENTRY


def test_model(client, valid):
    model = client.models.retrieve(MODEL)
    valid(model, Model)
    assert model.model_dump(exclude_none=True) == ENTRY  # newer openai packages have fields beside


def test_chat(client, valid):
    reply = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0.7, max_tokens=100)
    valid(reply, ChatCompletion)
    compare(CHAT, reply)
    assert reply.id.startswith("chatcmpl-") and reply.model == MODEL
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


@pytest.mark.parametrize(
    "params", [{"model": MODEL, "reasoning_enabled": True}, {"model": "gpt-oss-20b", "reasoning_effort": "medium"}]
)
def test_chat_with_reasoning(client, valid, params):
    reply = client.chat.completions.create(messages=STEPS, temperature=0, **params)
    valid(reply, ChatCompletion)
    compare(CHAT, reply)
    assert reply.model == params["model"]


def test_chat_stream(client, valid):
    chunks = list(client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, temperature=0))
    for chunk in chunks:
        valid(chunk, ChatCompletionChunk)
    middle = chunks[1:-1]
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == "abcdefghijklmnopqrstuvwxyz"
    for chunk in middle:
        for example in CHUNKS:
            compare(example, chunk)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_responses(client, valid):
    response = client.responses.create(model="gpt-oss-20b", input=HELLO, temperature=0)
    valid(response, Response)
    assert response.status == "completed" and response.completed_at >= response.created_at
    assert response.output_text and response.model == "gpt-oss-20b"


def test_responses_stream(client):
    events = list(client.responses.create(model="gpt-oss-20b", input=HELLO, stream=True, temperature=0))
    for event in events:  # each is JSON with a type
        assert STREAM_EVENT.validate_json(event.model_dump_json(), strict=True).type == event.type
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert events[-1].response.usage.total_tokens > 0, "usage comes with the last event"


def test_completions(client, valid):
    reply = client.completions.create(
        model=MODEL, prompt="Write a poem about artificial intelligence", temperature=0.7, max_tokens=150
    )
    valid(reply, Completion)
    compare(TEXT, reply)
    assert reply.id.startswith("cmpl-") and reply.model == MODEL


def test_transcriptions(speech, speech_models, factory, valid, tmp_path):
    """`language="en"`, `temperature=0` and a path, as in the reference's example."""
    file = tmp_path / "meeting_minutes.mp3"
    file.write_bytes(b"wx")
    models = {"whisper-large-v3": speech_models["whisper"]}
    with Client(models=models, _engine_factory=factory) as client:
        model = client.models.retrieve("whisper-large-v3")
        assert model.owned_by == "openai" and model.capabilities["supports_audio"]
        with file.open("rb") as opened:
            reply = client.audio.transcriptions.create(
                file=opened, model="whisper-large-v3", language="en", temperature=0
            )
    valid(reply, TranscriptionVerbose)
    compare(TRANSCRIPT, reply)
    assert reply.text == "".join(segment.text for segment in reply.segments).strip()
