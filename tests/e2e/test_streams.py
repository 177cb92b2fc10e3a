"""Streams of real models: for each endpoint and feature, what the chunks fold to is the whole reply, usage included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from folds import bare, difference, fold_chat, fold_completion, fold_response
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from player import Player

from cai_runtime import BadRequestError, Client

pytestmark = pytest.mark.slow

CITY = {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip
FUNCTIONS = [
    {"name": f"get_{what}", "description": f"Get the {what} in a city.", "parameters": CITY}
    for what in ("weather", "time")
]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
STRICT = [{"type": "function", "function": {**function, "strict": True}} for function in FUNCTIONS]
PERSON = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "maximum": 99, "minimum": 1}},
}  # fmt: skip
SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
SEED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
ASK = [{"role": "user", "content": "What is the capital of France? Say it with an emoji 🙂."}]
CITIES = [{"role": "user", "content": "What is the weather in Oslo, and what is it in Rome?"}]
THINK = {"reasoning_max_tokens": 9, "max_tokens": 30, "logit_bias": {2: -50}}  # no end of text: it would end at once

# What chat and Responses take. Each with what its reply must show, so that no case is empty.
PLAIN = {
    "greedy": ({}, "text"),
    "seed": (SEED, "text"),
    "penalties": ({**SEED, "frequency_penalty": 1.5, "logit_bias": {11: -50}, "min_p": 0.02}, "text"),
    "stop string": ({"stop": ["is Par", " of"]}, "stop"),
    "stop string that does not come": ({"stop": ["is Parma", "🙂🙂🙂"]}, "text"),
    "cut off": ({"max_tokens": 3}, "length"),
    "logprobs": ({"logprobs": True, "top_logprobs": 3}, "text"),
    "logprobs, seed, stop": ({**SEED, "logprobs": True, "stop": ["a", "is"]}, "stop"),
    "json_object": ({"response_format": {"type": "json_object"}}, "text"),
    "json_schema": ({"response_format": SCHEMA}, "text"),
    "regex": ({"regex": "(ab|é🙂){2,5}!", **SEED}, "text"),
    "choice": ({"choice": ["Paris 🙂", "Lyon"]}, "text"),
    "grammar": ({"grammar": 'start: "(" x ")"\nx: /[a-z]{1,5}/ | "(" x ")"'}, "text"),
}
CALLS = {
    "required": ({"tools": TOOLS, "tool_choice": "required"}, "calls"),
    "required, seed, logprobs": ({"tools": TOOLS, "tool_choice": "required", "logprobs": True, **SEED}, "calls"),
    "one at a time": ({"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}, "calls"),
    "named": ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_time"}}}, "calls"),
    "cut off in a call": ({"tools": TOOLS, "tool_choice": "required", "max_tokens": 16}, "length"),
    "none": ({"tools": TOOLS, "tool_choice": "none"}, "text"),
    "auto, json_schema": ({"tools": TOOLS, "response_format": SCHEMA}, "calls"),
}
# For a model that calls tools by itself.
AUTO = {
    "auto": ({"tools": TOOLS, "max_tokens": 40}, "calls"),
    "auto, strict": ({"tools": STRICT, "max_tokens": 40}, "calls"),
    "required, parallel": ({"tools": TOOLS, "tool_choice": "required", "max_tokens": 50}, "two calls"),
}
THOUGHTS = {
    "thought": (THINK, "thought"),
    "thought, seed, logprobs": ({**THINK, **SEED, "logprobs": True}, "thought"),
    "thought, regex": ({**THINK, "regex": "[ab]{3,9}é"}, "thought"),
    "thought, json_schema": ({**THINK, "response_format": SCHEMA, "max_tokens": 40}, "thought"),
    "thought, stop string": ({**THINK, "stop": ["e", "."]}, "stop"),
    "thought, calls": ({**THINK, "tools": TOOLS, "tool_choice": "required", "max_tokens": 40}, "calls"),
    "cut off in a thought": ({**THINK, "max_tokens": 5}, "length"),
    "no thought": ({"reasoning_enabled": False, "logit_bias": {2: -50}}, "text"),
}
# Several choices, which Responses has not.
SEVERAL = {
    "n": ({"n": 3, **SEED}, "text"),
    "n, logprobs, stop": ({"n": 3, **SEED, "logprobs": True, "top_logprobs": 1, "stop": ["Paris", "e"]}, "text"),
    "n, calls": ({"n": 2, **SEED, "tools": TOOLS, "tool_choice": "required"}, "calls"),
}
TEXTS = {
    "greedy": ({}, "text"),
    "n, seed": ({"n": 3, **SEED}, "text"),
    "prompts": ({"prompt": ["One, two,", "def f(x):"], "n": 2, **SEED}, "text"),
    "token ids": ({"prompt": [[504, 2], [1, 504, 780]]}, "text"),
    "stop string": ({"stop": [" six", "x,"]}, "stop"),
    "logprobs": ({"logprobs": 3}, "text"),
    "echo": ({"echo": True, "stop": ["zz"]}, "text"),
    "echo, logprobs, prompts": ({"echo": True, "logprobs": 2, "prompt": ["One 🙂 two,", "é"], "n": 2, **SEED}, "text"),
    "scored": ({"echo": True, "logprobs": 1, "max_tokens": 0}, "length"),
    "json_schema": ({"response_format": SCHEMA}, "text"),
    "regex": ({"regex": "(ab|é🙂){2,5}!", "logprobs": 0, **SEED}, "text"),
    "nothing": ({"choice": ["no", "nothing"], "stop": ["no"], "logprobs": 1}, "stop"),
}


def chat(client: Client, given: dict[str, Any], stream: bool) -> Any:
    params = {"messages": CITIES if "tools" in given else ASK, "temperature": 0, "max_tokens": 28, **given}
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return client.chat.completions.create(**params, **more)


def completions(client: Client, given: dict[str, Any], stream: bool) -> Any:
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    params = {"prompt": "One, two, three,", "temperature": 0, "max_tokens": 20, **given}
    return client.completions.create(**params, **more)


def responses(client: Client, given: dict[str, Any], stream: bool) -> Any:
    params = {"input": CITIES if "tools" in given else ASK, "temperature": 0, **given}
    params["max_output_tokens"] = params.pop("max_tokens", 28)
    if params.pop("logprobs", False):
        params["include"] = ["message.output_text.logprobs"]
    if (form := params.pop("response_format", None)) is not None:
        params["text"] = {"format": {"type": form["type"], **form.get("json_schema", {})}}
    if "tools" in params:
        params["tools"] = [{"type": "function", "strict": False, **tool["function"]} for tool in params["tools"]]
    if isinstance(params.get("tool_choice"), dict):
        params["tool_choice"] = {"type": "function", **params["tool_choice"]["function"]}
    return client.responses.create(**params, stream=stream)


Endpoint = Callable[[Client, dict[str, Any], bool], Any]
FOLDS: dict[Endpoint, Callable[[Any], Any]] = {
    chat: lambda chunks: bare(fold_chat(chunks)),
    completions: fold_completion,
    responses: lambda events: bare(fold_response(events)),
}


@dataclass(frozen=True, eq=False)
class Case:
    endpoint: Endpoint
    params: dict[str, Any]
    shows: str
    name: str

    def __str__(self) -> str:
        return f"{self.endpoint.__name__}: {self.name}"

    def whole(self, client: Client) -> Any:
        return self.endpoint(client, self.params, False)

    def fold(self, client: Client) -> Any:
        return without_cached(FOLDS[self.endpoint](list(self.endpoint(client, self.params, True))))


def cases(endpoint: Endpoint, *groups: dict[str, Any]) -> list[Case]:
    return [Case(endpoint, *case, name) for group in groups for name, case in group.items()]


def without_cached(reply: dict[str, Any]) -> dict[str, Any]:
    """Who comes first finds less in the prefix cache."""
    del reply["usage"]["input_tokens_details" if "input_tokens" in reply["usage"] else "prompt_tokens_details"]
    return reply


def shown(reply: dict[str, Any]) -> set[str]:
    """What a reply has, and how it ended."""
    found = {{"completed": "stop", "incomplete": "length"}.get(reply.get("status"), "")}
    texts, calls = [], 0
    for choice in reply.get("choices", ()):
        message = choice.get("message", {})
        found |= {choice["finish_reason"], "thought" if message.get("reasoning_content") else ""}
        texts.append(choice.get("text") or message.get("content"))
        calls += len(message.get("tool_calls") or ())
    for item in reply.get("output", ()):
        found |= {"thought"} if item["type"] == "reasoning" else set()
        calls += item["type"] == "function_call"
        texts += [item["content"][0]["text"]] if item["type"] == "message" else []
    found |= {"text"} if any(texts) else set()
    return found | {"calls", "two calls"} if calls > 1 else found | {"calls"} if calls else found


CASES = {
    "small": [*cases(chat, PLAIN, CALLS, SEVERAL), *cases(completions, TEXTS), *cases(responses, PLAIN, CALLS)],
    "thinking": [*cases(chat, THOUGHTS), *cases(responses, THOUGHTS)],
    "calling": [*cases(chat, AUTO), *cases(responses, AUTO)],
}
each_case = pytest.mark.parametrize(
    ("model", "case"), [pytest.param(m, c, id=f"{m}, {c}") for m, of in CASES.items() for c in of], indirect=["model"]
)


class Model:
    """A model that answers all cases at once, each whole and as a stream, and then plays its whole replies again."""

    def __init__(self, client: Client, of: list[Case]):
        self.client = client
        engine, recorded = client.engine(), {}
        send = engine._loop.send_requests

        def keep(sequences: list[Any]) -> None:
            recorded.update({sequence.request.request_id: sequence for sequence in sequences})
            send(sequences)

        engine._loop.send_requests = keep
        for params in ({"messages": ASK}, {"messages": CITIES, "tools": TOOLS}):  # for the prefix cache
            client.chat.completions.create(**params, max_tokens=1)
        with ThreadPoolExecutor(2 * len(of)) as threads:
            whole = {case: threads.submit(case.whole, client) for case in of}
            folds = {case: threads.submit(case.fold, client) for case in of}
        self.folds = {case: future.result() for case, future in folds.items()}
        self.whole = {case: without_cached(bare(future.result())) for case, future in whole.items()}
        self._answers = {
            case: [recorded[key] for key in recorded if key.partition("/")[0] == future.result().id]
            for case, future in whole.items()
        }
        self._player = Player(engine)

    def play(self, case: Case, sizes: list[int]) -> None:
        """Have requests be answered as the whole reply was, in groups of tokens of these sizes."""
        self._player.answers, self._player.sizes = self._answers[case], sizes


@pytest.fixture(scope="module")
def models(smollm2_dir: Path, thinking_dir: Path, qwen_dir: Path) -> Iterator[Callable[[str], Model]]:
    """models(name) -> that model, made at the first call."""
    paths = {"small": smollm2_dir, "thinking": thinking_dir, "calling": qwen_dir}
    with ExitStack() as stack:

        @cache
        def made(name: str) -> Model:
            client = Client(paths[name], max_context=1024, kv_cache="256MiB")
            return Model(stack.enter_context(client), CASES[name])

        yield made


@pytest.fixture
def model(request: pytest.FixtureRequest, models: Callable[[str], Model]) -> Model:
    return models(request.param)


@pytest.fixture(scope="module")
def thinking_dir(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a template like Qwen3's: two of its special tokens, which it does not use, mark a thought."""
    path = tmp_path_factory.mktemp("thinking")
    for file in smollm2_dir.iterdir():
        (path / file.name).symlink_to(file)
    tokenizer = (path / "tokenizer.json").read_text()
    template = (path / "chat_template.jinja").read_text()
    for token, marker in (("<jupyter_start>", "<think>"), ("<jupyter_code>", "</think>")):
        assert token in tokenizer
        tokenizer = tokenizer.replace(token, marker)
    opened = (
        "{% if add_generation_prompt %}{% if enable_thinking is not defined or enable_thinking %}{{ '<think>\\n' }}"
        "{% else %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
    )
    for name, text in (("tokenizer.json", tokenizer), ("chat_template.jinja", template + opened)):
        (path / name).unlink()
        (path / name).write_text(text)
    return path


@each_case
def test_the_fold_of_the_stream_is_the_reply(model: Model, case: Case) -> None:
    assert not difference(model.folds[case], model.whole[case])
    assert case.shows in shown(model.whole[case])


@pytest.mark.parametrize(
    ("model", "endpoint"),
    [(name, endpoint) for name, of in CASES.items() for endpoint in dict.fromkeys(case.endpoint for case in of)],
    indirect=["model"],
    ids=lambda part: getattr(part, "__name__", part),
)
@settings(
    max_examples=200, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data(), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_in_random_groups_of_tokens(model: Model, endpoint: Endpoint, data: st.DataObject, sizes: list[int]) -> None:
    case = data.draw(st.sampled_from([case for case in model.whole if case.endpoint is endpoint]))
    model.play(case, sizes)
    assert not difference(case.fold(model.client), model.whole[case])


@pytest.mark.parametrize("model", ["small"], indirect=True)
def test_the_best_of_several_is_no_stream(model: Model) -> None:
    with pytest.raises(BadRequestError) as caught:
        model.client.completions.create(prompt="One, two,", best_of=2, stream=True)
    assert caught.value.param == "best_of"
