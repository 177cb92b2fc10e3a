"""Logprobs of both endpoints: of the visible text's tokens, the same in reply and stream, and of prompts by echo."""

import asyncio
import math
import random

import numpy as np
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cai_runtime import BadRequestError

# The alphabet's next letter has the logit 2, each other letter 0, every other token -20.
LIKELY, OTHER = (value - math.log(math.exp(2) + 25 + 233 * math.exp(-20)) for value in (2.0, 0.0))


def near(value):
    return pytest.approx(value, abs=1e-5)


def same_usage(last, whole):
    """But for what the prefix cache had by then."""
    return all(getattr(last.usage, f"{kind}_tokens") == getattr(whole.usage, f"{kind}_tokens") for kind in KINDS)


KINDS = ("prompt", "completion", "total")


def dump(entries):
    return [entry.model_dump() for entry in entries]


def test_chat_reply(client, valid, ask):
    reply = client.chat.completions.create(**ask, max_tokens=3, logprobs=True, top_logprobs=2)
    valid(reply, ChatCompletion)
    (choice,) = reply.choices
    assert choice.message.content == "abc" and choice.logprobs.refusal is None
    for letter, entry in zip("abc", choice.logprobs.content, strict=True):
        assert (entry.token, entry.bytes, entry.logprob) == (letter, [ord(letter)], near(LIKELY))
        first, second = entry.top_logprobs
        assert (first.token, first.logprob) == (letter, entry.logprob)
        assert second.logprob == near(OTHER) and second.token == ("a" if letter != "a" else "b")


def test_chat_without_and_with_none(client, ask):
    assert client.chat.completions.create(**ask, max_tokens=2).choices[0].logprobs is None
    assert client.chat.completions.create(**ask, max_tokens=2, logprobs=False).choices[0].logprobs is None
    (first, _) = client.chat.completions.create(**ask, max_tokens=2, logprobs=True).choices[0].logprobs.content
    assert first.top_logprobs == [] and first.logprob == near(LIKELY)


def test_they_are_of_the_raw_distribution(client, tokenizer, ask):
    """Before temperature, penalties, bias and a grammar's mask: a token that was forced has its own probability."""
    q = tokenizer.convert_tokens_to_ids("q")
    for forced in ({"logit_bias": {q: 100}}, {"choice": ["q"]}):
        reply = client.chat.completions.create(**ask, max_tokens=1, logprobs=True, top_logprobs=1, **forced)
        (entry,) = reply.choices[0].logprobs.content
        assert (entry.token, entry.logprob) == ("q", near(OTHER))
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == ("a", near(LIKELY))
    hot = {"messages": ask["messages"], "temperature": 2, "frequency_penalty": 2, "seed": 3}
    for entry in client.chat.completions.create(**hot, max_tokens=9, logprobs=True).choices[0].logprobs.content:
        assert entry.logprob in (near(LIKELY), near(OTHER))


def test_tokens_without_visible_text_are_not_listed(client, ask):
    """The end of text, and a stop string that was cut."""
    ended = client.chat.completions.create(**ask, logprobs=True)
    assert ended.choices[0].finish_reason == "stop" and ended.usage.completion_tokens == 27
    assert len(ended.choices[0].logprobs.content) == 26
    cut = client.chat.completions.create(**ask, logprobs=True, stop=["def"])
    assert [entry.token for entry in cut.choices[0].logprobs.content] == ["a", "b", "c"]
    assert cut.usage.completion_tokens == 6
    nothing = client.chat.completions.create(**ask, logprobs=True, stop=["a"])
    assert nothing.choices[0].message.content == "" and nothing.choices[0].logprobs.content == []


def test_held_back_tokens_come_with_their_piece(client, ask):
    chunks = client.chat.completions.create(**ask, max_tokens=6, logprobs=True, stop=["cdx"], stream=True)
    pieces = [chunk.choices[0] for chunk in chunks]
    shown = [(c.delta.content, [e.token for e in c.logprobs.content]) for c in pieces if c.logprobs]
    assert shown == [("a", ["a"]), ("b", ["b"]), ("cde", ["c", "d", "e"]), ("f", ["f"])]
    assert [c.logprobs for c in pieces if c.delta.content is None] == [None, None]  # the role, the end


def test_tokens_that_are_parts_of_characters(client, factory, tokenizer):
    def prepare(runner):
        """Behind "!", each byte of a text is likeliest behind the one before."""
        ids = tokenizer.encode("!é€🙂")
        runner.next_token[ids[:-1]] = ids[1:]

    factory.prepare = prepare
    asked = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, "max_tokens": 1, "logprobs": True}
    first = tokenizer.encode("é")[0]
    reply = client.chat.completions.create(**asked, logit_bias={first: 100})
    (entry,) = reply.choices[0].logprobs.content
    assert reply.choices[0].message.content == "\ufffd" and (entry.token, entry.bytes) == ("\\xc3", [0xC3])
    told = client.completions.create(prompt="!", temperature=0, max_tokens=9, logprobs=0)
    lists = told.choices[0].logprobs
    assert told.choices[0].text == "é€🙂"
    assert lists.tokens[:2] == ["bytes:\\xc3", "bytes:\\xa9"] and lists.text_offset == [0, 0, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("n", [1, 3])
def test_chat_reply_is_fold_of_stream(client, valid, n):
    """At random stop strings, lengths and seeds: entries, usage and reasons."""
    rng = random.Random(n)
    for seed in range(25):
        stop = ["".join(rng.choice("abcdefg") for _ in range(rng.randint(1, 3))) for _ in range(2)]
        request = {
            "messages": [{"role": "user", "content": "hi"}], "n": n, "temperature": 1.2, "seed": seed, "stop": stop,
            "max_tokens": rng.randint(1, 30), "logprobs": True, "top_logprobs": rng.randint(0, 3),
        }  # fmt: skip
        if seed == 0:  # no token is shown
            request |= {"stop": ["a", "b"], "choice": ["a", "b"]}
        whole = client.chat.completions.create(**request)
        valid(whole, ChatCompletion)
        *chunks, last = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
        text, entries = [""] * n, [None] * n
        for chunk in chunks:
            valid(chunk, ChatCompletionChunk)
            (choice,) = chunk.choices
            text[choice.index] += choice.delta.content or ""
            if choice.logprobs:
                entries[choice.index] = (entries[choice.index] or []) + dump(choice.logprobs.content)
        assert text == [choice.message.content for choice in whole.choices]
        assert entries == [dump(choice.logprobs.content) for choice in whole.choices]
        assert same_usage(last, whole) and len({chunk.id for chunk in [*chunks, last]}) == 1
        for choice, found in zip(whole.choices, entries, strict=True):
            listed = b"".join(bytes(entry["bytes"]) for entry in found).decode()
            assert listed.startswith(choice.message.content)


def test_top_logprobs_need_logprobs(client, ask):
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**ask, top_logprobs=1)
    assert caught.value.param == "top_logprobs" and "'logprobs'" in caught.value.message


def test_completion_reply(client, valid):
    reply = client.completions.create(prompt="w", temperature=0, logprobs=1)
    valid(reply, Completion)
    (choice,) = reply.choices
    assert choice.text == "xyz" and choice.logprobs.tokens == ["x", "y", "z"]
    assert choice.logprobs.token_logprobs == near([LIKELY] * 3) and choice.logprobs.text_offset == [0, 1, 2]
    assert choice.logprobs.top_logprobs == [{letter: near(LIKELY)} for letter in "xyz"]
    assert client.completions.create(prompt="w", temperature=0).choices[0].logprobs is None


def test_completion_lists_the_token_beside_the_likeliest(client, tokenizer):
    q = tokenizer.convert_tokens_to_ids("q")
    for k, likeliest in ((0, {}), (2, {"b": LIKELY, "a": OTHER})):
        reply = client.completions.create(prompt="a", temperature=0, max_tokens=1, logit_bias={q: 100}, logprobs=k)
        assert reply.choices[0].logprobs.top_logprobs == [{t: near(v) for t, v in {**likeliest, "q": OTHER}.items()}]


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_echo_has_the_prompts_logprobs(client, tokenizer, n, tokens):
    prompts = ["abd", "é"]
    asked = [tokenizer.encode(prompt) for prompt in prompts] if tokens else prompts
    reply = client.completions.create(prompt=asked, temperature=0, max_tokens=2, logprobs=1, echo=True, n=n)
    assert [choice.text for choice in reply.choices] == ["abdef"] * n + ["éab"] * n
    for choice in reply.choices[:n]:
        lists = choice.logprobs
        assert lists.tokens == list("abdef") and lists.text_offset == [0, 1, 2, 3, 4]
        assert lists.token_logprobs[0] is None and lists.top_logprobs[0] is None
        assert lists.token_logprobs[1:] == near([LIKELY, OTHER, LIKELY, LIKELY])
        assert lists.top_logprobs[2] == {"c": near(LIKELY), "d": near(OTHER)}
    lists = reply.choices[-1].logprobs
    assert lists.tokens == ["bytes:\\xc3", "bytes:\\xa9", "a", "b"] and lists.text_offset == [0, 0, 1, 2]
    assert type(reply).model_validate(reply.model_dump(), strict=True) == reply
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_a_start_token_of_the_tokenizers_own_has_no_place_in_the_text(new_client, factory, model_dir, tokenizer):
    from tokenizers.processors import TemplateProcessing

    start = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[start])
    client = new_client(str(model_dir))
    told = client.completions.create(prompt="ab<eos>c", temperature=0, max_tokens=1, logprobs=0, echo=True).choices[0]
    assert told.text == "ab<eos>cd"
    assert told.logprobs.tokens == ["<bos>", "a", "b", "<eos>", "c", "d"]
    assert told.logprobs.text_offset == [0, 0, 1, 2, 7, 8]


def test_scoring_a_prompt_generates_nothing(client, valid):
    asked = {"prompt": ["abc", "a" * 200], "echo": True, "max_tokens": 0, "temperature": 0}
    scored = client.completions.create(**asked, logprobs=0)
    assert [choice.text for choice in scored.choices] == asked["prompt"], "the second fills the context"
    assert [choice.finish_reason for choice in scored.choices] == ["length"] * 2
    assert scored.choices[0].logprobs.token_logprobs == [None, near(LIKELY), near(LIKELY)]
    assert (scored.usage.prompt_tokens, scored.usage.completion_tokens) == (203, 0)
    plain = client.completions.create(**asked)
    valid(plain, Completion)
    assert [choice.text for choice in plain.choices] == asked["prompt"] and plain.choices[0].logprobs is None
    (chunk,) = client.completions.create(**{**asked, "prompt": "abc"}, logprobs=0, stream=True)
    assert (chunk.choices[0].text, chunk.choices[0].finish_reason) == ("abc", "length")
    assert chunk.choices[0].logprobs == scored.choices[0].logprobs
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(prompt="a", max_tokens=0)
    assert caught.value.param == "max_tokens" and "'echo'" in caught.value.message


@pytest.mark.parametrize("echo", [False, True])
def test_completion_is_fold_of_stream(client, echo):
    rng = random.Random(echo)
    for seed in range(25):
        request = {
            "prompt": ["abc", "é"], "n": 2, "temperature": 1.2, "seed": seed, "max_tokens": rng.randint(1, 20),
            "stop": ["".join(rng.choice("abcdefg") for _ in range(rng.randint(1, 3)))], "logprobs": rng.randint(0, 3),
            "echo": echo,
        }  # fmt: skip
        whole = client.completions.create(**request)
        *chunks, last = client.completions.create(**request, stream=True, stream_options={"include_usage": True})
        found = [{"text": "", "finish_reason": None, "logprobs": {}} for _ in range(4)]
        for chunk in chunks:
            (choice,) = chunk.choices
            mine = found[choice.index]
            mine["text"] += choice.text
            mine["finish_reason"] = choice.finish_reason or mine["finish_reason"]
            for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                mine["logprobs"].setdefault(name, []).extend(values)
        for mine, choice in zip(found, whole.choices, strict=True):
            lists = choice.logprobs.model_dump()
            assert mine == {"text": choice.text, "finish_reason": choice.finish_reason, "logprobs": lists}
            for token, at in zip(lists["tokens"], lists["text_offset"], strict=True):
                assert token.startswith("bytes:") or choice.text.startswith(token, at)
        assert same_usage(last, whole)


def test_best_of_gives_the_likeliest(client):
    request = {"prompt": ["a", "k"], "temperature": 1.5, "seed": 5, "max_tokens": 8, "logprobs": 0, "ignore_eos": True}
    every = client.completions.create(**request, n=6)
    best = client.completions.create(**request, n=2, best_of=6)
    for prompt in range(2):
        candidates = every.choices[6 * prompt : 6 * prompt + 6]
        order = sorted(candidates, key=lambda choice: -np.mean(choice.logprobs.token_logprobs))
        kept = best.choices[2 * prompt : 2 * prompt + 2]
        assert [choice.text for choice in kept] == [choice.text for choice in order[:2]]
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3] and best.usage == every.usage
    del request["logprobs"]
    silent = client.completions.create(**request, n=2, best_of=6, echo=True)
    assert [choice.text for choice in silent.choices] == [
        prompt + choice.text for prompt, choice in zip("aakk", best.choices, strict=True)
    ]
    assert all(choice.logprobs is None for choice in silent.choices)


@pytest.mark.parametrize("asked", [{"best_of": 2, "stream": True}, {"best_of": 2, "n": 3}])
def test_best_of_is_refused(client, asked):
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(prompt="a", **asked)
    assert caught.value.param == "best_of"


def test_asynchronous_replies_have_them(async_client, client, ask):
    request = {**ask, "logprobs": True, "top_logprobs": 1}

    async def run():
        reply = await async_client.chat.completions.create(**request)
        stream = await async_client.chat.completions.create(**request, stream=True)
        return reply, [chunk.choices[0].logprobs async for chunk in stream]

    reply, found = asyncio.run(run())
    expected = dump(client.chat.completions.create(**request).choices[0].logprobs.content)
    assert dump(reply.choices[0].logprobs.content) == expected
    assert [entry for part in found if part for entry in dump(part.content)] == expected


def test_a_grammar_binds_no_token_of_the_prompt(client):
    asked = {"prompt": ["abd", "w"], "echo": True, "logprobs": 1, "temperature": 0}
    free = client.completions.create(**asked, max_tokens=1)
    held = client.completions.create(**asked, max_tokens=9, choice=["q"])
    for one, other in zip(free.choices, held.choices, strict=True):
        size = len(one.text) - 1
        assert other.text == one.text[:-1] + "q"
        assert other.logprobs.token_logprobs[:size] == one.logprobs.token_logprobs[:size]
        assert other.logprobs.token_logprobs[size] == near(OTHER)
    scored = client.completions.create(**{**asked, "max_tokens": 0}, choice=["q"])
    assert [choice.text for choice in scored.choices] == ["abd", "w"]
