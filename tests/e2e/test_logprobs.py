"""Logprobs of real models: transformers' log softmax, and the same to the last bit however they were computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import cai_runtime
from cai_runtime.engine.open import load_tokenizer, open_engine
from cai_runtime.engine.request import Finished, Request, SamplingParams

pytestmark = pytest.mark.slow

TEXTS = [
    "The capital of France is Paris, and the capital of Italy is",
    "def quicksort(xs):\n    if len(xs) < 2:\n        return xs\n",
    "Once upon a time there was a 🙂 who lived by the sea. " * 8,
]


def outcome(done: Finished) -> tuple[object, ...]:
    return done.token_ids, done.logprobs, done.prompt_logprobs


def test_they_are_transformers_and_equal_in_every_way(smollm2_dir: Path):
    tokenizer = load_tokenizer(smollm2_dir)
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=4, logprobs=5, prompt_logprobs=1)
    requests = [Request(tokenizer.encode(text), params) for text in TEXTS]
    with open_engine(smollm2_dir, kv_cache="64MiB", progress=False) as engine:
        alone = [engine.submit(request).result(timeout=300) for request in requests]
        again = [handle.result(timeout=300) for handle in engine.submit_all(requests)]
        assert list(map(outcome, again)) == list(map(outcome, alone)), "together"
        hit = Request(requests[2].prompt_ids, SamplingParams(max_tokens=12, temperature=0.8, seed=4, logprobs=5))
        found = engine.submit(hit).result(timeout=300)
        assert found.cached_tokens > 0 and found.logprobs == alone[2].logprobs, "after a prefix hit"
    with open_engine(smollm2_dir, kv_cache="64MiB", prefill_chunk=7, progress=False) as engine:
        chunked = [handle.result(timeout=300) for handle in engine.submit_all(requests)]
    assert list(map(outcome, chunked)) == list(map(outcome, alone)), "in chunks"
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    for request, done in zip(requests, alone, strict=True):
        ids = [*request.prompt_ids, *done.token_ids]
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert done.prompt_logprobs is not None and done.logprobs is not None
        ours = torch.tensor([each.logprob for each in (*done.prompt_logprobs, *done.logprobs) if each is not None])
        theirs = expected[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_the_answer_knows_its_suffix(qwen_dir: Path):
    """A model that has infill tokens computes what the text behind it names."""
    asked = {"prompt": "def area(width, height):\n    ", "temperature": 0, "max_tokens": 24}
    with cai_runtime.Client(model=str(qwen_dir), kv_cache="64MiB") as client:
        told = client.completions.create(**asked, suffix="\n    return product\n")
        spelled = client.completions.create(**asked, suffix="<|fim_middle|>", logprobs=1)
    assert told.choices[0].text.startswith("product = width * height")
    assert spelled.usage is not None and spelled.choices[0].logprobs is not None
    assert spelled.choices[0].logprobs.tokens is not None
    assert "<|fim" not in "".join(spelled.choices[0].logprobs.tokens)
