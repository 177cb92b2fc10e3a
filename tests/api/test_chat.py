"""/chat/completions: what a reply holds, and that the whole reply is the fold of the stream."""

import string

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cai_runtime import BadRequestError

ALPHABET = string.ascii_lowercase


def fold(chunks):
    """What a consumer of the stream makes of it: (role, text, finish reason) of every choice."""
    choices = {}
    for chunk in chunks:
        for choice in chunk.choices:
            folded = choices.setdefault(choice.index, [None, "", None])
            folded[0] = choice.delta.role or folded[0]
            folded[1] += choice.delta.content or ""
            folded[2] = choice.finish_reason or folded[2]
    return [tuple(choices[i]) for i in sorted(choices)]


def flatten(reply):
    return [(c.message.role, c.message.content, c.finish_reason) for c in reply.choices]


def test_whole_reply(client, ask, valid):
    reply = client.chat.completions.create(**ask)
    valid(reply, ChatCompletion)
    assert reply.id.startswith("chatcmpl-") and reply.object == "chat.completion" and reply.model == "abc"
    assert flatten(reply) == [("assistant", ALPHABET, "stop")]
    assert reply.choices[0].index == 0
    prompt = "user:hi\nassistant:\n"
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == 27  # the alphabet and the end of the text
    assert reply.usage.total_tokens == len(prompt) + 27
    assert reply.usage.prompt_tokens_details.cached_tokens == 0
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0


def test_cached_tokens_are_reported(client, ask):
    client.chat.completions.create(**ask)
    again = client.chat.completions.create(**ask)
    assert again.usage.prompt_tokens_details.cached_tokens == 16  # whole pages of the 19 tokens


def test_stream(client, ask, valid):
    chunks = list(client.chat.completions.create(**ask, stream=True))
    for chunk in chunks:
        valid(chunk, ChatCompletionChunk)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    assert len(chunks) == 1 + 26 + 1  # as they come: a chunk for each letter


def test_include_usage_adds_one_chunk(client, ask, valid):
    *chunks, last = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    valid(last, ChatCompletionChunk)
    assert last.choices == [] and last.id == chunks[0].id
    assert last.usage.completion_tokens == 27 and last.usage.total_tokens == 46
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1, "seed": 1},
        {"temperature": 1, "seed": 2, "n": 4, "max_tokens": 40},
        {"temperature": 2, "seed": 3, "n": 2, "max_completion_tokens": 30, "ignore_eos": True},
        {"temperature": 0, "stop": ["ghi", "xyz"]},
        {"temperature": 0, "stop": "lmn", "min_tokens": 20},
        {"temperature": 1, "seed": -7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "frequency_penalty": 0.5},
    ],
)
def test_whole_reply_is_fold_of_stream(client, ask, options):
    request = {**ask, **options}
    whole = client.chat.completions.create(**request)
    *chunks, usage = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    assert fold(chunks) == flatten(whole)
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    assert usage.usage.prompt_tokens == whole.usage.prompt_tokens


def test_stop_string_is_left_out(client, ask):
    reply = client.chat.completions.create(**ask, stop=["ghi", "xyz"])
    assert flatten(reply) == [("assistant", "abcdef", "stop")]


def test_choices_are_sampled_on_their_own(client, ask):
    request = {**ask, "temperature": 1, "seed": 11, "max_tokens": 30, "ignore_eos": True}
    several = client.chat.completions.create(**request, n=4)
    texts = [choice.message.content for choice in several.choices]
    assert len(set(texts)) == 4
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage.prompt_tokens == 19  # once, not four times
    assert several.usage.completion_tokens == 120
    # A seed repeats all of them, and asking for fewer leaves the first as they were.
    assert [c.message.content for c in client.chat.completions.create(**request, n=2).choices] == texts[:2]
    assert client.chat.completions.create(**request).choices[0].message.content == texts[0]
    assert client.chat.completions.create(**{**request, "seed": 12}).choices[0].message.content != texts[0]


def test_stream_interleaves_choices(client, ask):
    chunks = list(client.chat.completions.create(**ask, n=3, max_tokens=4, stream=True))
    content = [(c.choices[0].index, c.choices[0].delta.content) for c in chunks if c.choices[0].delta.content]
    assert sorted(content) == [(i, letter) for i in range(3) for letter in "abcd"]
    assert content.index((2, "a")) < content.index((0, "d")), "the choices run side by side"
    assert [c.choices[0].index for c in chunks[:3]] == [0, 1, 2]
    assert all(c.choices[0].delta.role == "assistant" for c in chunks[:3])


def test_unseeded_requests_differ(client, ask):
    request = {**ask, "temperature": 1, "max_tokens": 40, "ignore_eos": True}
    texts = {client.chat.completions.create(**request).choices[0].message.content for _ in range(3)}
    assert len(texts) == 3


def test_explicit_zero_top_p_is_unset(client, ask):
    request = {**ask, "temperature": 1, "seed": 5, "max_tokens": 30, "ignore_eos": True}
    plain = client.chat.completions.create(**request)
    assert flatten(client.chat.completions.create(**request, top_p=0)) == flatten(plain)
    assert flatten(client.chat.completions.create(**request, top_p=0.01)) != flatten(plain)


def test_max_completion_tokens_wins(client, ask):
    reply = client.chat.completions.create(**ask, max_tokens=10, max_completion_tokens=3)
    assert flatten(reply) == [("assistant", "abc", "length")]


def test_default_length_is_rest_of_context(client, ask):
    reply = client.chat.completions.create(**ask, ignore_eos=True)
    assert reply.usage.total_tokens == 200 and reply.choices[0].finish_reason == "length"


def test_min_tokens(client, ask):
    bias = {client._host.open(client._host.resolve("abc")).tokenizer.eos_token_id: 100}
    assert client.chat.completions.create(**ask, logit_bias=bias).choices[0].message.content == ""
    reply = client.chat.completions.create(**ask, logit_bias=bias, min_tokens=5)
    assert reply.choices[0].message.content == "abcde"


@pytest.mark.parametrize(
    ("content", "options", "param"),
    [("x" * 300, {}, "messages"), ("hi", {"max_tokens": 182}, "max_tokens"),
     ("hi", {"max_completion_tokens": 182}, "max_completion_tokens")],
)  # fmt: skip
def test_context_length(client, content, options, param):
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": content}], **options)
    assert (caught.value.param, caught.value.code) == (param, "context_length_exceeded")
    assert "200" in caught.value.message


def test_largest_length_that_fits(client, ask):
    assert client.chat.completions.create(**ask, max_tokens=181).choices[0].finish_reason == "stop"


def test_min_tokens_above_the_limit(client, ask):
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**ask, min_tokens=11, max_tokens=10)
    assert caught.value.param == "min_tokens"


@pytest.mark.parametrize("token", [258, 10**9])
def test_logit_bias_outside_vocabulary(client, ask, token):
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**ask, logit_bias={str(token): 1})
    assert caught.value.param == "logit_bias"


def test_logit_bias_keys_may_be_strings_or_integers(client, ask, tokenizer):
    token = tokenizer.convert_tokens_to_ids("q")
    for key in (token, str(token)):
        assert (
            client.chat.completions.create(**ask, logit_bias={key: 100}, max_tokens=3).choices[0].message.content
            == "qqq"
        )


def test_reply_goes_back_into_the_conversation(client, ask):
    first = client.chat.completions.create(**ask).choices[0].message
    for message in (first, first.model_dump()):
        messages = [*ask["messages"], message, {"role": "user", "content": "go on"}]
        reply = client.chat.completions.create(messages=messages, temperature=0)
        assert reply.usage.prompt_tokens == len(f"user:hi\nassistant:{ALPHABET}\nuser:go on\nassistant:\n")
