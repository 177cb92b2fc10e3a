"""Grammars, logprobs, echoes, stop strings, penalties, biases and seeds in one request: the same alone, in a batch with
prompts in chunks, and as the fold of a stream."""

import random
from concurrent.futures import ThreadPoolExecutor

from cai_runtime import Client

SCHEMA = {
    "type": "object", "required": ["a", "b"], "additionalProperties": False,
    "properties": {"a": {"type": "string", "maxLength": 6}, "b": {"type": "array", "items": {"enum": [1, "é€"]}}},
}  # fmt: skip
ANSWERS = [
    {}, {"regex": "[a-f]{4,9}(gh)?€*"}, {"choice": ["yes", "yesterday", "", "no é"]},
    {"grammar": 'start: "(" x ")"\nx: /[a-z]*/ | "(" x ")"'},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA}}},
]  # fmt: skip


def random_request(seed):
    rng = random.Random(seed)
    optional = {
        "logprobs": rng.randint(0, 3), "stop": rng.sample(["a", "e", '"b', "gh", "é", "))"], 2), "presence_penalty": 1.0,
        "repetition_penalty": 1.3, "logit_bias": {97: 3.0, 98: -100}, "echo": True, "n": 2,
    }  # fmt: skip
    return {
        "prompt": "x" * rng.randint(1, 40) + "ab" * rng.randint(0, 20), "seed": seed, "max_tokens": rng.randint(5, 60),
        "temperature": rng.choice([0, 1.0, 1.3]), **rng.choice(ANSWERS),
        **{name: value for name, value in optional.items() if rng.random() < 0.35},
    }  # fmt: skip


def outcome(choices, usage):
    return [(text, reason, lists) for text, reason, lists in choices], usage.completion_tokens


def whole(client, request):
    reply = client.completions.create(**request)
    choices = [(c.text, c.finish_reason, c.logprobs.model_dump() if c.logprobs else {}) for c in reply.choices]
    return outcome(choices, reply.usage)


def folded(client, request):
    found = {}
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            text, reason, lists = found.get(choice.index, ("", None, {}))
            for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                lists.setdefault(name, []).extend(values)
            found[choice.index] = (text + choice.text, choice.finish_reason or reason, lists)
    return outcome([found[i] for i in sorted(found)], usage)


def test_everything_together(tiny_dir):
    requests = [random_request(seed) for seed in range(50)]
    with Client(str(tiny_dir), max_batch=1) as client:
        alone = [whole(client, request) for request in requests]
    options = {"max_batch": 16, "prefill_chunk": 8, "kv_cache": "300KiB"}
    with Client(str(tiny_dir), **options) as client, ThreadPoolExecutor(30) as threads:
        together = list(threads.map(lambda request: whole(client, request), requests))
        streamed = list(threads.map(lambda request: folded(client, request), requests))
    assert together == streamed == alone
    assert sum(choice[1] == "stop" for choices, _ in alone for choice in choices) > 20
