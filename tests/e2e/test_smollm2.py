"""A real model through the whole engine: the same greedy text as transformers', whatever the batch, chunks or cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cai_runtime.engine.engine import Engine
from cai_runtime.engine.open import load_tokenizer, open_engine
from cai_runtime.engine.request import Request, SamplingParams

TOKENS = 20
PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours.",
    "How do plants make food?",
    "Translate 'good morning' into Spanish.",
    "What is 12 times 7?",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "Explain gravity to a child.",
    "What is a neural network?",
    "List two mammals that live in water.",
    "Why is the sky blue?",
    "Write a haiku about autumn.",
    "What does a compiler do?",
    "How many days are in a leap year?",
    "What is the boiling point of water?",
    "Describe a cat in five words.",
    "What is the opposite of 'ancient'?",
    "Tell me a fact about the moon.",
    "How do I tie my shoes?",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prompt_ids(smollm2_dir: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(smollm2_dir)
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, return_dict=False)
        for p in PROMPTS
    ]


def greedy(engine: Engine, prompts: list[list[int]], together: bool) -> list[tuple[int, ...]]:
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    if together:
        handles = [engine.submit(Request(list(p), params)) for p in prompts]
        return [h.result().token_ids for h in handles]
    return [engine.submit(Request(list(p), params)).result().token_ids for p in prompts]


def opened(path: Path, **options: Any) -> Engine:
    return open_engine(path, kv_cache="256MiB", progress=False, **options)


@pytest.fixture(scope="module")
def one_by_one(smollm2_dir: Path, prompt_ids: list[list[int]]) -> Iterator[list[tuple[int, ...]]]:
    """Each prompt alone, no prefix reuse, prompts in one chunk: what every other way is held against."""
    with opened(smollm2_dir, prefix_cache=False) as engine:
        yield greedy(engine, prompt_ids, together=False)
        engine.check_integrity()


def test_same_text_as_transformers(smollm2_dir: Path, prompt_ids: list[list[int]], one_by_one: list[tuple[int, ...]]):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    for prompt, ours in zip(prompt_ids, one_by_one, strict=True):
        with torch.inference_mode():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=2)
        assert list(ours) == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_cache": False},
        {"prefix_cache": True},
        {"prefix_cache": False, "prefill_chunk": 7},
        {"prefix_cache": True, "prefill_chunk": 16, "max_batch": 3},
    ],
    ids=["batch", "prefix", "chunks", "prefix and chunks"],
)
def test_batch_chunks_and_prefix_reuse_change_nothing(
    smollm2_dir: Path, prompt_ids: list[list[int]], one_by_one: list[tuple[int, ...]], options: dict[str, Any]
):
    with opened(smollm2_dir, **options) as engine:
        assert greedy(engine, prompt_ids, together=True) == one_by_one
        if options["prefix_cache"]:
            assert greedy(engine, prompt_ids, together=True) == one_by_one
            assert engine.stats().prefix_hit_tokens > 0
        engine.check_integrity()


def test_a_small_cache_preempts_and_changes_nothing(
    smollm2_dir: Path, prompt_ids: list[list[int]], one_by_one: list[tuple[int, ...]]
):
    longest = max(map(len, prompt_ids)) + TOKENS
    page_bytes = 30 * 3 * 64 * 2 * 4 * 16
    with open_engine(smollm2_dir, kv_cache=page_bytes * (3 * -(-longest // 16)), progress=False) as engine:
        assert greedy(engine, prompt_ids, together=True) == one_by_one
        assert engine.stats().preemptions > 0
        engine.check_integrity()
