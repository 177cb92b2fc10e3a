"""/completions: prompts of every form, echo, and that the whole reply is the fold of the stream."""

import pytest
from openai.types import Completion

from cai_runtime import BadRequestError


def texts(reply):
    return [choice.text for choice in reply.choices]


def test_whole_reply(client, valid):
    reply = client.completions.create(prompt="w", temperature=0)
    valid(reply, Completion)
    assert reply.id.startswith("cmpl-") and reply.object == "text_completion" and reply.model == "abc"
    assert (reply.choices[0].text, reply.choices[0].finish_reason, reply.choices[0].index) == ("xyz", "stop", 0)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (1, 4, 5)


def test_default_length_is_16(client):
    reply = client.completions.create(prompt="a", temperature=0)
    assert texts(reply) == ["bcdefghijklmnopq"] and reply.choices[0].finish_reason == "length"


def test_default_length_is_cut_to_the_context(client):
    reply = client.completions.create(prompt="a" * 195, temperature=0)
    assert texts(reply) == ["bcdef"]


def test_prompt_forms(client, tokenizer):
    w, hi = tokenizer.encode("w"), tokenizer.encode("hi")
    for prompt, expected in [
        ("w", ["xyz"]),
        (["w"], ["xyz"]),
        (["w", "hi"], ["xyz", "jklmnopqrstuvwxy"]),
        (w, ["xyz"]),
        ([w, hi], ["xyz", "jklmnopqrstuvwxy"]),
        (hi, ["jklmnopqrstuvwxy"]),
    ]:
        assert texts(client.completions.create(prompt=prompt, temperature=0)) == expected


def test_several_prompts_with_several_choices(client):
    request = {"temperature": 1, "seed": 4, "ignore_eos": True, "n": 3}
    together = client.completions.create(prompt=["w", "a"], **request)
    alone = [client.completions.create(prompt=prompt, **request) for prompt in ("w", "a")]
    assert texts(together) == texts(alone[0]) + texts(alone[1])
    assert [choice.index for choice in together.choices] == list(range(6))
    assert len(set(texts(together))) > 3
    assert together.usage.prompt_tokens == 2 and together.usage.completion_tokens == 6 * 16


@pytest.mark.parametrize("prompt", ["hello w", ["hello w", "v"], "tokens"])
@pytest.mark.parametrize("n", [1, 2])
def test_echo(client, tokenizer, prompt, n):
    prompt = tokenizer.encode("hello w") if prompt == "tokens" else prompt
    plain = client.completions.create(prompt=prompt, temperature=0, n=n)
    echoed = client.completions.create(prompt=prompt, temperature=0, n=n, echo=True)
    starts = ["hello w"] * n + (["v"] * n if isinstance(prompt, list) and prompt[-1] == "v" else [])
    assert texts(echoed) == [start + text for start, text in zip(starts, texts(plain), strict=True)]
    assert echoed.usage.completion_tokens == plain.usage.completion_tokens


@pytest.mark.parametrize("echo", [False, True])
def test_whole_reply_is_fold_of_stream(client, valid, echo):
    request = {"prompt": ["w", "a"], "n": 2, "echo": echo, "temperature": 1, "seed": 9}
    whole = client.completions.create(**request)
    *chunks, last = client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    folded = [["", None] for _ in range(4)]
    for chunk in chunks:
        (choice,) = chunk.choices
        folded[choice.index][0] += choice.text
        folded[choice.index][1] = choice.finish_reason or folded[choice.index][1]
    assert [tuple(f) for f in folded] == [(c.text, c.finish_reason) for c in whole.choices]
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in [*chunks, last]}) == 1
    valid(last, Completion)


def test_chunks_are_valid(client, valid):
    chunks = list(client.completions.create(prompt="w", temperature=0, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["x", "y", "z", ""]
    valid(chunks[-1], Completion)
    for chunk in chunks[:-1]:
        # OpenAI streams null here until the end, against its own type: nothing else may deviate.
        assert chunk.choices[0].finish_reason is None
        assert type(chunk).model_validate(chunk.model_dump(), strict=True) == chunk
        chunk.choices[0].finish_reason = "stop"
        valid(chunk, Completion)


@pytest.mark.parametrize(
    "prompt",
    [3, [], [""], "", [[]], [1, "a"], [[1], "a"], [True], [-1], [[1, -1]], {"a": 1}, [1.5], b"w", [10**9], [258, 1]],
    ids=repr,
)
def test_bad_prompts(client, prompt):
    # This tokenizer has <bos>, so an empty text is a text that starts; the others have no such way out.
    if prompt in ("", [""]):
        assert client.completions.create(prompt=prompt, temperature=0).usage.prompt_tokens == 1
        return
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(prompt=prompt)
    assert caught.value.param == "prompt"


def test_empty_prompt_without_start_token(new_client, factory, model_dir, tokenizer):
    tokenizer.bos_token = None
    with pytest.raises(BadRequestError) as caught:
        new_client(str(model_dir)).completions.create(prompt="")
    assert caught.value.param == "prompt" and "empty" in caught.value.message


def test_prompt_longer_than_context(client):
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(prompt=["fits", "a" * 200])
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


def test_one_bad_prompt_runs_none(client, factory):
    with pytest.raises(BadRequestError):
        client.completions.create(prompt=["fits", "a" * 200])
    assert factory.engines[0].stats().finished == 0


def test_stop_by_special_token_and_by_id(client, factory, tokenizer):
    """The alphabet's end of text is special. Its text as a stop string means the token, even where eos is ignored."""
    ask = {"prompt": "w", "temperature": 0, "ignore_eos": True, "max_tokens": 20}
    assert len(client.completions.create(**ask).choices[0].text) > 4
    for stop in ({"stop": ["<eos>"]}, {"stop_token_ids": [tokenizer.eos_token_id]}):
        (choice,) = client.completions.create(**ask, **stop).choices
        assert (choice.text, choice.finish_reason) == ("xyz", "stop")
    letter = tokenizer.convert_tokens_to_ids("y")
    assert client.completions.create(**ask, stop_token_ids=[letter]).choices[0].text == "x"
    with pytest.raises(BadRequestError, match="names token 999999"):
        client.completions.create(**ask, stop_token_ids=[999_999])


def test_echo_and_answer_join_in_a_sentencepiece_vocabulary(client, factory):
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = {token: i for i, token in enumerate(["<unk>", "<eos>", *letters, *("\u2581" + c for c in letters)])}
    merges = [("\u2581", c) for c in letters]
    inner = Tokenizer(models.BPE(vocab={**vocab, "\u2581": len(vocab)}, merges=merges, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    factory.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")

    def say_words(runner):
        runner.next_token[:] = vocab["\u2581a"]

    factory.prepare = say_words
    for prompt in ("once", [vocab["\u2581o"], vocab["n"]]):
        for echo in (False, True):
            ask = {"prompt": prompt, "temperature": 0, "max_tokens": 2, "echo": echo}
            text = client.completions.create(**ask).choices[0].text
            assert text == ("" if not echo else prompt if isinstance(prompt, str) else "on") + " a a"
            assert "".join(c.choices[0].text for c in client.completions.create(**ask, stream=True)) == text


def add_infill_tokens(tokenizer):
    tokenizer.add_tokens(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"])


@pytest.mark.parametrize("tokens", [False, True])
def test_suffix(client, factory, tokenizer, tokens):
    *triple, pad = add_infill_tokens(tokenizer)
    fed = []

    def prepare(runner):
        run = runner.run
        runner.run = lambda step: fed.extend(list(s.token_ids) for s in step) or run(step)
        runner.next_token[tokenizer.convert_tokens_to_ids("c")] = pad

    factory.prepare = prepare
    prompt = tokenizer.encode("ab") if tokens else "ab"
    told = client.completions.create(prompt=[prompt], suffix="<|fim_middle|>d", temperature=0)
    assert (told.choices[0].text, told.choices[0].finish_reason) == ("abc", "stop"), "until the model is done"
    spelled = [tokenizer.convert_tokens_to_ids(character) for character in "<|fim_middle|>d"]
    first = [triple[0], *tokenizer.encode("ab"), triple[1], *spelled, triple[2]]
    assert [token for part in fed for token in part][: len(first)] == first
    assert told.usage.prompt_tokens == len(first)
    on = client.completions.create(prompt=prompt, suffix="d", temperature=0, ignore_eos=True, max_tokens=5)
    assert on.usage.completion_tokens == 5


def test_suffix_is_refused(client, tokenizer):
    with pytest.raises(BadRequestError, match="no infill tokens") as caught:
        client.completions.create(prompt="a", suffix="b")
    assert (caught.value.param, caught.value.code) == ("suffix", "unsupported_parameter")
    with pytest.raises(BadRequestError, match="echo") as caught:
        client.completions.create(prompt="a", suffix="b", echo=True)
    assert caught.value.param == "suffix"
    assert client.completions.create(prompt="w", suffix="", temperature=0).choices[0].text == "xyz"
