"""Replies of models through the engine: each that ended by itself is valid, in a batch as alone."""

import json
import random

import jsonschema
import pytest

from cai_runtime.engine.open import open_engine
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.grammars import Grammars, expressions
from cai_runtime.grammars.schema import SchemaError


@pytest.fixture(scope="module")
def schemas(schema_of):
    """200 that can be enforced, with their expressions."""
    found = []
    for seed in range(1000, 2000):
        schema = schema_of(random.Random(seed))
        try:
            found.append((schema, expressions.json_schema(schema)))
        except SchemaError:
            continue
        if len(found) == 200:
            return found
    raise AssertionError("too few")


def requests_of(schemas, engine, prompt_ids, max_tokens, bias):
    grammars = Grammars(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
    requests = []
    for i, (_, expression) in enumerate(schemas):
        sampling = SamplingParams(max_tokens=max_tokens, temperature=1.2, seed=i, logit_bias=bias)
        requests.append(Request(prompt_ids, sampling, mask=grammars.mask(f"start: {expression}")))
        if i % 5 == 0:
            requests.append(Request(prompt_ids, SamplingParams(max_tokens=8, temperature=1.0, seed=i)))
    return requests


def check(schemas, done):
    """How many ended by themselves; all of those are valid."""
    ended = 0
    for (schema, _), finished in zip(schemas, done, strict=True):
        if finished.finish_reason == "stop":
            ended += 1
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(finished.text))
    return ended


def test_200_schemas(tiny_dir, schemas):
    """A random model of bytes, which likes what ends things, so that most texts end."""
    with open_engine(tiny_dir, device="cpu", max_batch=48) as engine:
        bias = {engine.tokenizer.convert_tokens_to_ids(char): 4.0 for char in '"]}'}
        requests = requests_of(schemas, engine, [70, 71], 250, bias)
        done = [handle.result() for handle in engine.submit_all(requests)]
        masked = [finished for request, finished in zip(requests, done, strict=True) if request.mask is not None]
        assert check(schemas, masked) > 150
        for i in range(0, len(requests), 17):
            alone = engine.submit(requests[i]).result()
            assert (alone.token_ids, alone.text) == (done[i].token_ids, done[i].text), "alone as in a batch"


@pytest.mark.slow
def test_200_schemas_of_a_real_model(smollm2_dir, schemas):
    with open_engine(smollm2_dir, device="cpu", max_batch=32) as engine:
        prompt_ids = engine.tokenizer.encode("An example in JSON:\n")
        requests = [r for r in requests_of(schemas, engine, prompt_ids, 120, {}) if r.mask is not None]
        assert check(schemas, [handle.result() for handle in engine.submit_all(requests)]) > 120
