"""The Responses API on a real model: the same text as chat's, as a stream and over turns, and JSON under a schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cai_runtime import Client

pytestmark = pytest.mark.slow
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def client(smollm2_dir: Path) -> Iterator[Client]:
    with Client(smollm2_dir, max_context=2048) as client:
        yield client


def test_text_is_that_of_chat(client: Client) -> None:
    chat = client.chat.completions.create(
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=30,
    )
    params = {"input": QUESTION, "instructions": "Be brief.", "temperature": 0, "max_output_tokens": 30}
    whole = client.responses.create(**params)
    events = list(client.responses.create(**params, stream=True))
    assert whole.output_text == chat.choices[0].message.content and "Paris" in whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    assert whole.usage.output_tokens == chat.usage.completion_tokens


def test_a_conversation_goes_on(client: Client) -> None:
    first = client.responses.create(input=QUESTION, temperature=0, max_output_tokens=30, store=True)
    second = client.responses.create(
        input="And of Italy?", previous_response_id=first.id, temperature=0, max_output_tokens=30
    )
    items = [{"role": "user", "content": QUESTION}, *first.output, {"role": "user", "content": "And of Italy?"}]
    by_hand = client.responses.create(input=items, temperature=0, max_output_tokens=30)
    assert second.output_text == by_hand.output_text
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens // 2


def test_json_schema(client: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "capital": {"type": "boolean"}},
        "required": ["city", "capital"],
        "additionalProperties": False,
    }
    response = client.responses.create(
        input="Paris",
        text={"format": {"type": "json_schema", "name": "city", "schema": schema}},
        temperature=0,
        max_output_tokens=60,
    )
    reply = json.loads(response.output_text)
    assert set(reply) == {"city", "capital"} and isinstance(reply["capital"], bool)


def test_truncation(client: Client, wikipedia_texts: list[str]) -> None:
    items = []
    for text in wikipedia_texts[:6]:
        items += [{"role": "user", "content": text[:3000]}, {"role": "assistant", "content": "I see."}]
    items.append({"role": "user", "content": QUESTION})
    response = client.responses.create(input=items, truncation="auto", temperature=0, max_output_tokens=30)
    context = client.engine().max_context
    assert context // 2 < response.usage.input_tokens <= context - 30
