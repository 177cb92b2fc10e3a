"""Every parameter of the openai client's methods, and of the CompactifAI API, is served or refused by name, and has a row
in docs/api.md. A new version of that package that adds one makes this fail."""

import asyncio
import inspect
import json
import re
import typing
from pathlib import Path

import openai
import pytest
from pydantic import BaseModel

from cai_runtime import AsyncClient, BadRequestError, Client
from cai_runtime.api.chat import ChatParams
from cai_runtime.api.completions import CompletionParams
from cai_runtime.api.embeddings import EmbeddingParams
from cai_runtime.api.responses.params import ResponseParams
from cai_runtime.api.transcriptions.params import SpeechParams

DOC = Path(__file__).parents[2] / "docs" / "api.md"
# Two switches for thoughts, so that every level of reasoning has one.
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + (m.content or '') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ reasoning_effort or '' }}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


class Yes(BaseModel):
    ok: bool


class Refused:
    """An example of what is refused. param: what the error names, if not the parameter itself."""

    def __init__(self, value, param=None):
        self.value, self.param = value, param


class Served:
    """An example, and what it needs beside it."""

    def __init__(self, value, **more):
        self.value, self.more = value, more


SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}
FLAT = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "yes", "schema": Yes.model_json_schema()}}
EVERY = {
    "timeout": 30,
    "extra_headers": {"X-A": "b"},
    "extra_query": {"a": "b"},
    "extra_body": Refused({"nothing": 1}, "nothing"),
}
LABELS = {"user": "me", "safety_identifier": "me", "prompt_cache_key": "me"}
NOT_LOCAL = {"moderation": {}, "prompt_cache_options": {}, "prompt_cache_retention": "24h", "service_tier": "flex"}
NOT_LOCAL = {name: Refused(value) for name, value in NOT_LOCAL.items()}
TEXT = {
    **EVERY,
    "model": "abc",
    "temperature": 0.5,
    "top_p": 0.9,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"5": 1},
    "seed": 1,
    "stop": ["x"],
    "n": 2,
    "max_tokens": 3,
    "user": "me",
}
CHAT = {
    **TEXT,
    **LABELS,
    **NOT_LOCAL,
    "messages": [{"role": "user", "content": "hi"}],
    "max_completion_tokens": 3,
    "metadata": {"a": "b"},
    "logprobs": True,
    "top_logprobs": Served(2, logprobs=True),
    "tools": [TOOL],
    "tool_choice": Served("none", tools=[TOOL]),
    "parallel_tool_calls": Served(False, tools=[TOOL]),
    "reasoning_effort": "low",
    "response_format": JSON_FORMAT,
    "audio": Refused({"voice": "alloy", "format": "wav"}),
    "function_call": Refused({"name": "f"}),
    "functions": Refused([{"name": "f"}]),
    "modalities": Refused(["text", "audio"]),
    "prediction": Refused({"type": "content", "content": "x"}),
    "store": Refused(True),
    "verbosity": Refused("low"),
    "web_search_options": Refused({}),
    # beyond the openai client's
    "min_tokens": 2,
    "reasoning_enabled": True,
}
STREAMING = {"stream": True, "stream_options": Served({"include_usage": True}, stream=True)}
RESPONSE = {
    **EVERY,
    **LABELS,
    **NOT_LOCAL,
    "model": "abc",
    "input": "hi",
    "instructions": "Be brief.",
    "include": ["message.output_text.logprobs"],
    "top_logprobs": Served(2, include=["message.output_text.logprobs"]),
    "max_output_tokens": 5,
    "metadata": {"a": "b"},
    "parallel_tool_calls": False,
    "previous_response_id": Served("STORED"),
    "reasoning": {"effort": "low"},
    "store": True,
    "temperature": 0.5,
    "text": {"format": {"type": "text"}},
    "tools": [FLAT],
    "tool_choice": Served("none", tools=[FLAT]),
    "top_p": 0.9,
    "truncation": "auto",
    "access_programs": Refused({}),
    "background": Refused(True),
    "background_options": Refused({}),
    "context_management": Refused([{"type": "compaction"}]),
    "conversation": Refused("conv_1"),
    "image": Refused({}),
    "max_tool_calls": Refused(3),
    "prompt": Refused({"id": "p"}),
}
RESPONSE_STREAMING = {"stream": True, "stream_options": Served({"include_obfuscation": False}, stream=True)}
SPEECH = {
    **EVERY,
    "file": b"wx",
    "model": "whisper",
    "prompt": "Names: Ada.",
    "temperature": 0.2,
    "language": "de",
    "response_format": "srt",
    # beyond the openai client's, of translations or of both
    "languages": ["en", "de"],
    "keywords": ["Ada"],
    "timestamp_granularities": ["word", "segment"],
    "chunking_strategy": {"type": "server_vad", "threshold": 0.5},
    "beam_size": 2,
    "vad": True,
}
STORED = {**EVERY, "response_id": "STORED"}
CASES = {
    "chat.completions.create": {**CHAT, **STREAMING},
    "chat.completions.parse": {**CHAT, "response_format": Served(Yes, reasoning_enabled=False),
                               "stream_options": Refused({"include_usage": True})},
    "chat.completions.stream": {**CHAT, "response_format": Served(Yes, reasoning_enabled=False),
                                "stream_options": {"include_usage": True}},
    "completions.create": {
        **TEXT, **STREAMING, "prompt": "hi", "best_of": 2, "echo": True, "logprobs": 2, "suffix": "x",
        "min_tokens": 2, "tools": Refused([TOOL]), "tool_choice": Refused("required"),
    },
    "responses.create": {**RESPONSE, **RESPONSE_STREAMING},
    "responses.parse": {
        **RESPONSE, "text_format": Yes, "parse_as": Served(Yes, text_format=Yes), "stream": Refused(True),
        "stream_options": Refused({"include_obfuscation": False}), "verbosity": Refused("low"),
    },
    "responses.stream": {
        **RESPONSE, "text_format": Yes, "stream_options": {"include_obfuscation": False},
        "response_id": Refused("resp_1"), "starting_after": Refused(1),
    },
    "responses.retrieve": {
        **STORED, "include": ["message.output_text.logprobs"], "include_obfuscation": Refused(True),
        "starting_after": Refused(1), "stream": Refused(True),
    },
    "responses.delete": STORED,
    "responses.cancel": STORED,
    "responses.input_items.list": {
        **STORED, "after": Served("ITEM"), "include": ["message.output_text.logprobs"], "limit": 3, "order": "asc",
    },
    "embeddings.create": {
        **EVERY, "input": ["a b", "c"], "model": "default", "dimensions": 8, "encoding_format": "base64", "user": "me",
        "prompt_name": "query",
    },
    "audio.transcriptions.create": {
        **SPEECH, "stream": True, "include": Refused(["logprobs"]), "known_speaker_names": Refused(["me"]),
        "known_speaker_references": Refused(["data:audio/wav;base64,AAAA"]),
    },
    "audio.translations.create": {**SPEECH, "stream": True},
    "models.list": EVERY,
    "models.retrieve": {**EVERY, "model": "abc"},
}  # fmt: skip
REQUIRED = {
    "chat": "messages", "completions": "prompt", "embeddings": "input", "models.retrieve": "model", "audio": "file",
}  # fmt: skip
FIXTURES = {"embeddings": "embedding", "audio": "hearing"}  # the client of an endpoint, if not "everything"
# Where the rows of a method are; the first level of headings is that of the endpoint.
SECTIONS = {
    "chat": ("Every method", "Chat and text completions", "Chat alone", "Tools and reasoning", "Structured output",
             "Logprobs, echo, suffix", "`parse` and `stream`"),
    "completions": ("Every method", "Chat and text completions", "Text completions alone", "Structured output",
                    "Logprobs, echo, suffix"),
    "responses": ("Every method", "Responses", "`parse` and `stream`", "Stored responses and models"),
    "embeddings": ("Every method", "Embeddings"),
    "models": ("Every method", "Stored responses and models"),
    "audio": ("Every method", "Audio"),
}  # fmt: skip
# The reference's own tables.
REFERENCE = {
    "chat": "model messages temperature max_tokens max_completion_tokens min_tokens stop frequency_penalty n stream user "
    "tools tool_choice reasoning_effort reasoning_enabled",
    "responses": "model input store instructions parallel_tool_calls temperature top_p max_output_tokens truncation text "
    "reasoning metadata stream",
    "completions": "model prompt temperature max_tokens min_tokens top_p stop user tools tool_choice",
    "embeddings": "",
    "models": "model",
    "audio": "file model prompt temperature language response_format stream include timestamp_granularities "
    "chunking_strategy",
}
# Methods of these resources that a local client has no use for; docs/api.md says so.
LACKING = {
    "chat.completions": {"retrieve", "update", "list", "delete", "messages"},
    "responses": {"compact", "connect", "input_tokens"},
    "models": {"delete"},
    "audio": {"speech", "voices", "voice_consents"},
}
OF_HTTP = {"with_raw_response", "with_streaming_response"}


def at(client, path):
    for part in path.split("."):
        client = getattr(client, part)
    return client


def theirs():
    return openai.OpenAI(api_key="none")


@pytest.fixture
def everything(client, factory, tokenizer):
    """A client whose model has all that its parameters ask for: thoughts, infill tokens, room for tools."""
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"], special_tokens=True)
    factory.prepare = lambda runner: setattr(runner, "max_context", 1000)
    return client


@pytest.fixture
def embedding(make_tiny):
    """A client whose model makes embeddings."""
    path = make_tiny()
    steps = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    kinds = [{"idx": i, "path": folder, "type": f"x.{kind}"} for i, (kind, folder) in enumerate(steps)]
    (path / "modules.json").write_text(json.dumps(kinds))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (path / "config_sentence_transformers.json").write_text('{"prompts": {"query": "find "}}')
    with Client("default", models={"default": path}, kv_cache="8MiB", progress=False) as client:
        yield client


def call(client, path, params):
    """Call a method and read its reply to the end."""
    if path.startswith("responses."):
        first = client.responses.create(input="hi", store=True, max_output_tokens=3)
        named = {"STORED": first.id, "ITEM": client.responses.input_items.list(first.id).data[0].id}
        params = {name: named.get(value, value) if isinstance(value, str) else value for name, value in params.items()}
    reply = at(client, path)(**params)
    if path.endswith(".stream"):
        with reply as stream:
            return list(stream)
    return list(reply) if params.get("stream") else reply


def all_cases():
    for path, cases in CASES.items():
        for name, case in cases.items():
            yield pytest.param(path, name, case, id=f"{path}-{name}")


@pytest.mark.parametrize(("path", "name", "case"), list(all_cases()))
def test_every_parameter_is_served_or_refused(request, path, name, case):
    everything = request.getfixturevalue(FIXTURES.get(path.split(".")[0], "everything"))
    cases = CASES[path]
    required = REQUIRED.get(path) or REQUIRED.get(path.split(".")[0])
    params = {required: cases[required]} if required else {}
    if path.startswith("responses."):
        stored = path.split(".")[1] in ("retrieve", "delete", "cancel", "input_items")
        params = {"response_id": "STORED"} if stored else {"input": "hi"}
    if path.startswith("chat") and not path.endswith("create"):
        params["temperature"] = 0
    if isinstance(case, Refused):
        with pytest.raises(BadRequestError) as caught:
            call(everything, path, {**params, name: case.value})
        assert caught.value.param == (case.param or name) and (case.param or name) in caught.value.message
        return
    more = case.more if isinstance(case, Served) else {}
    value = case.value if isinstance(case, Served) else case
    if path.endswith("chat.completions.parse") and name in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(openai.LengthFinishReasonError):  # it was served: the package can't parse half an answer
            call(everything, path, {**params, **more, name: value})
        return
    call(everything, path, {**params, **more, name: value})


@pytest.mark.parametrize("path", CASES)
def test_no_parameter_of_the_openai_client_is_missing(path):
    known = set(inspect.signature(at(theirs(), path)).parameters)
    if new := known - set(CASES[path]):
        pytest.fail(
            f"openai {openai.__version__} has parameters of {path} that this library does not know: {sorted(new)}. Serve "
            "them or refuse them by name (UNSUPPORTED in api/params.py and api/responses/params.py), add an example to "
            "CASES here, and a row to docs/api.md."
        )


def rows():
    """Heading -> the names in the first columns of its tables."""
    found, heading = {}, ""
    for line in DOC.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            found.setdefault(heading, set()).update(re.findall(r"`(\w+)", line.split("|")[1]))
    return found


@pytest.mark.parametrize("endpoint", SECTIONS)
def test_every_parameter_has_a_row(endpoint):
    table = rows()
    there = set().union(*(table[heading] for heading in SECTIONS[endpoint]))
    wanted = set(REFERENCE[endpoint].split())
    for path, cases in CASES.items():
        if path.startswith(f"{endpoint}."):
            wanted |= set(cases)
    ours = {
        "chat": ChatParams,
        "completions": CompletionParams,
        "responses": ResponseParams,
        "embeddings": EmbeddingParams,
        "audio": SpeechParams,
    }.get(endpoint)
    wanted |= set(ours.__annotations__ if ours else ())
    assert wanted - there == set(), "docs/api.md has no row"


@pytest.mark.parametrize(
    ("endpoint", "ours"),
    [("chat", "chat.completions"), ("completions", "completions"), ("responses", "responses"),
     ("audio", "audio.transcriptions")],
)  # fmt: skip
def test_the_references_parameters_are_ours(endpoint, ours):
    assert set(REFERENCE[endpoint].split()) <= set(CASES[f"{ours}.create"])


@pytest.mark.parametrize(
    "path",
    [
        "chat.completions",
        "completions",
        "embeddings",
        "responses",
        "responses.input_items",
        "models",
        "audio",
        "audio.transcriptions",
        "audio.translations",
    ],
)
def test_methods_that_the_openai_client_has_beside(path):
    def names(one):
        return {name for name in dir(at(one, path)) if not name.startswith("_")}

    lacking = LACKING.get(path, set())
    with Client() as ours:
        assert names(theirs()) - names(ours) - OF_HTTP <= lacking, (
            "serve the new method, or list it here and in the docs"
        )
    text = DOC.read_text()
    for name in lacking | OF_HTTP:
        assert f"`{name}`" in text or f"`{path}.{name}`" in text


def methods(kind, path=""):
    """Path -> function, of a client's public methods and those of its resources."""
    with_resources = kind if not inspect.isclass(kind) else kind()
    found = {}
    for name in dir(type(with_resources)):
        if name.startswith("_"):
            continue
        value = getattr(with_resources, name)
        if inspect.isroutine(value):
            found[path + name] = value
        elif type(value).__module__.startswith("cai_runtime"):
            found.update(methods(value, f"{path}{name}."))
    return found


def without_async(annotation):
    """`input_items.list` of an AsyncClient returns what can be awaited or iterated for a page."""
    annotation = str(annotation).replace(" | AsyncRequests", "")  # what `batch` takes beside
    annotation = re.sub(r"Coroutine\[Any, Any, (\w+)\]", r"\1", annotation)
    return re.sub(r"\b(Async|Sync)", "", annotation).replace("AsyncItems", "Items").replace("ItemPage", "Items")


def test_async_client_has_every_method_of_client_with_the_same_signature():
    sync, asynchronous = methods(Client), methods(AsyncClient)
    assert set(sync) == set(asynchronous) and {"chat.completions.parse", "responses.input_items.list"} <= set(sync)
    not_coroutines = set()
    for path, function in sync.items():
        twin = asynchronous[path]
        pairs = [(function, twin), *zip(typing.get_overloads(function), typing.get_overloads(twin), strict=True)]
        for one, other in pairs:
            ours, others = inspect.signature(one), inspect.signature(other)
            for parameter, counterpart in zip(ours.parameters.values(), others.parameters.values(), strict=True):
                counterpart = counterpart.replace(annotation=without_async(counterpart.annotation))
                assert parameter.replace(annotation=without_async(parameter.annotation)) == counterpart, path
            assert without_async(ours.return_annotation) == without_async(others.return_annotation), path
        if not inspect.iscoroutinefunction(twin):
            not_coroutines.add(path)
    # Their values are awaited, entered or iterated.
    assert not_coroutines == {
        "batch", "chat.completions.stream", "responses.stream", "responses.input_items.list", "with_options",
    }  # fmt: skip


def test_async_methods_of_stored_responses_and_models(async_client):
    async def run():
        first = await async_client.responses.create(input="hi", store=True)
        for read in (async_client.responses.retrieve, async_client.responses.cancel):
            assert (await read(first.id, timeout=3)).output_text == first.output_text
        assert [item.type async for item in async_client.responses.input_items.list(first.id, timeout=3)] == ["message"]
        assert (await async_client.responses.input_items.list(first.id, order="asc")).data
        await async_client.responses.delete(first.id)
        assert (await async_client.models.retrieve("abc", timeout=3)).id in [
            model.id async for model in await async_client.models.list(extra_headers={})
        ]
        for wrong, param in (({"timeout": "x"}, "timeout"), ({"extra_body": {"x": 1}}, "x"), ({"x": 1}, "x")):
            with pytest.raises(BadRequestError) as caught:
                await async_client.models.list(**wrong)
            assert caught.value.param == param
        await async_client.close()

    asyncio.run(run())
