"""Embeddings of tiny random models against transformers' hidden states, pooled in fp64; and what is refused."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from openai.types import CreateEmbeddingResponse
from transformers import AutoConfig, AutoModel

import cai_runtime
from cai_runtime import AsyncClient, BadRequestError, Client, functions
from cai_runtime.engine.request import Request, SamplingParams

TEXTS = ["w1 w2 w3", "w3 w3 w1 w42 w7 " * 9, "w2", "w1 w3 w50 " * 25]
FAMILIES = {
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True},
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 20},
}
PAGE_BYTES = 2 * 2 * 16 * 2 * 24 * 4  # of the qwen3: layers, keys and values, positions, heads, their size, fp32
OPTIONS = {"kv_cache": "16MiB", "progress": False}


def name_pooling(path, mode="mean_tokens", normalize=True, **config):
    """Write the files of sentence-transformers."""
    steps = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")][: 3 if normalize else 2]
    modules = [{"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"}
               for i, (k, p) in enumerate(steps)]  # fmt: skip
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    flags = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **flags, **config}))


def save_headless(path, seed=0, **options):
    torch.manual_seed(seed)
    base = {
        "vocab_size": 62, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    AutoModel.from_config(AutoConfig.for_model(**{**base, **options})).eval().save_pretrained(path)


@pytest.fixture(scope="session")
def headless(tmp_path_factory, add_tokenizer):
    """The directory of a family's model without a head, with pooling files."""
    made = {}

    def make(family="llama", mode="mean_tokens"):
        if (family, mode) not in made:
            path = tmp_path_factory.mktemp("headless")
            save_headless(path, **FAMILIES[family])
            add_tokenizer(path)
            name_pooling(path, mode)
            made[family, mode] = path
        return made[family, mode]

    return make


@pytest.fixture
def copy(headless, tmp_path):
    """A model's directory to change."""
    return shutil.copytree(headless(), tmp_path / "copy")


def expected(path, ids, mode="mean_tokens", size=None, normalize=True):
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(path, dtype=torch.float32)(torch.tensor([ids])).last_hidden_state[0].double()
    vector = (hidden.mean(0) if mode == "mean_tokens" else hidden[-1])[:size]
    return (vector / vector.norm() if normalize else vector).float().numpy()


def vectors(reply):
    return np.array([entry.embedding for entry in reply.data], np.float32)


def tokenized(client, texts=TEXTS):
    tokenizer = client.engine().tokenizer
    return [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("mode", ["mean_tokens", "lasttoken"])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_transformers(headless, family, mode):
    path = headless(family, mode)
    with Client(path, **OPTIONS) as client:
        reply = client.embeddings.create(input=TEXTS)
        ids = tokenized(client)
        assert [entry.index for entry in reply.data] == [0, 1, 2, 3]
        np.testing.assert_allclose(vectors(reply), [expected(path, i, mode) for i in ids], rtol=0, atol=1e-4)
        assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(map(len, ids))
        client.engine().check_integrity()


@pytest.mark.parametrize("mode", ["mean_tokens", "lasttoken"])
def test_the_same_bits_however_they_are_computed(headless, mode):
    path = headless("qwen3", mode)
    with Client(path, **OPTIONS) as client:
        alone = np.concatenate([vectors(client.embeddings.create(input=text)) for text in TEXTS])
        after_hits = vectors(client.embeddings.create(input=TEXTS))
        from_ids = vectors(client.embeddings.create(input=tokenized(client)))
    with Client(path, prefill_chunk=7, prefix_cache=False, **OPTIONS) as client:
        chunked = vectors(client.embeddings.create(input=TEXTS))
    with Client(
        path, prefill_chunk=5, max_batch=2, max_context=160, kv_cache=2 * 160 * 2 * 2 * 48 * 4, progress=False
    ) as client:
        crowded = vectors(client.embeddings.create(input=TEXTS * 3))
    for other in (after_hits, from_ids, chunked, *np.split(crowded, 3)):
        assert other.tobytes() == alone.tobytes()


def test_last_token_pooling_takes_its_prefix_from_the_cache(headless):
    for mode, found in (("lasttoken", 64), ("mean_tokens", 0)):  # of 75 tokens, in pages of 16
        with Client(headless("llama", mode), **OPTIONS) as client:
            for _ in range(2):
                client.embeddings.create(input=TEXTS[3])
            assert client.engine().stats().prefix_hit_tokens == found


@pytest.fixture
def chatty(make_tiny):
    """A model with a head and pooling files."""
    path = make_tiny()
    name_pooling(path)
    return path


def test_beside_text_completions(chatty):
    asked = {"prompt": "w1 w2 w3", "max_tokens": 30, "temperature": 0, "logprobs": 2}
    with Client(chatty, prefill_chunk=8, **OPTIONS) as client:
        alone = client.completions.create(**asked).choices[0]
        embedded = vectors(client.embeddings.create(input=TEXTS))
        ids = tokenized(client)
    np.testing.assert_allclose(embedded, [expected(chatty, i) for i in ids], rtol=0, atol=1e-4)

    async def both():
        async with AsyncClient(chatty, prefill_chunk=8, **OPTIONS) as client:
            calls = [client.completions.create(**asked), client.embeddings.create(input=TEXTS)] * 3
            return await asyncio.gather(*calls)

    texts, others = (found := asyncio.run(both()))[::2], found[1::2]
    assert all(text.choices[0] == alone for text in texts)
    assert all(vectors(other).tobytes() == embedded.tobytes() for other in others)


def test_shape_dimensions_and_base64(headless, valid):
    path = headless()
    with Client(path, **OPTIONS) as client:
        whole = client.embeddings.create(input=TEXTS[0], model=path, user="u")
        valid(whole, CreateEmbeddingResponse)
        short = client.embeddings.create(input=[TEXTS[0]], dimensions=16)
        ids = tokenized(client)[0]
        np.testing.assert_allclose(vectors(short)[0], expected(path, ids, size=16), rtol=0, atol=1e-4)
        text = client.embeddings.create(input=np.array(ids), dimensions=16, encoding_format="base64").data[0].embedding
        assert base64.b64decode(text) == vectors(short).tobytes()


def test_as_the_files_say(copy):
    name_pooling(copy, mode="lasttoken", normalize=False)
    (copy / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "w1 w1 w2 "}, "default_prompt_name": "query"})
    )
    with Client(copy, **OPTIONS) as client:
        assert client.models.retrieve(str(copy)).capabilities["supports_embeddings"] is True
        plain = vectors(client.embeddings.create(input="w3 w2"))
        ids = tokenized(client, ["w3 w2"])[0]
        np.testing.assert_allclose(plain[0], expected(copy, ids, "lasttoken", normalize=False), rtol=0, atol=1e-4)
        asked = vectors(client.embeddings.create(input="w3 w2", prompt_name="query"))
        assert (asked == vectors(client.embeddings.create(input="w1 w1 w2 w3 w2"))).all()
        for wrong in ({"prompt_name": "document"}, {"prompt_name": "query", "input": [1, 2]}):
            with pytest.raises(BadRequestError) as caught:
                client.embeddings.create(**{"input": "w3 w2", **wrong})
            assert caught.value.param == "prompt_name"


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 3]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": None}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": [[1], [62]]}, "input[1]"),
        ({"input": ["a", "b", "c", "w1 w2 " * 200]}, "input[3]"),
        ({"input": [[1], [1] * 257]}, "input[1]"),
        ({"input": "a" * 1_000_000}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 65}, "dimensions"),
        ({"input": "a", "dimensions": True}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "stream": True}, "stream"),
        ({"input": "\ud800"}, "input"),
    ],
)  # fmt: skip
def test_hostile_inputs_are_named(headless, params, param):
    with Client(headless(), **OPTIONS) as client, pytest.raises(BadRequestError) as caught:
        client.embeddings.create(**params)
    assert caught.value.param == param


def test_thousands_of_inputs(headless):
    with Client(headless(), **OPTIONS) as client:
        reply = client.embeddings.create(input=[[i % 60 + 1] for i in range(5000)])
    found = vectors(reply)
    assert len(found) == 5000 and (found[:60] == found[60:120]).all()


def test_without_a_head_there_is_no_text(headless):
    with Client(headless(), **OPTIONS) as client:
        assert client.models.retrieve(str(headless())).capabilities["support_chat_completion"] is False
        for call in (
            lambda: client.chat.completions.create(messages=[{"role": "user", "content": "a"}]),
            lambda: client.completions.create(prompt="a"),
            lambda: client.responses.create(input="a"),
        ):
            with pytest.raises(BadRequestError, match="support_chat_completion") as caught:
                call()
            assert caught.value.code == "chat_not_supported"


def change(path, file, **fields):
    (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | fields))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "modules.json").unlink(), "name no pooling.*modules.json"),
        (lambda path: (path / "modules.json").write_text("{"), "not valid JSON"),
        (lambda path: (path / "modules.json").write_text("[3]"), "list of objects"),
        (lambda path: (path / "modules.json").write_text('[{"type": "x.Dense", "path": ""}]'), "the steps Dense"),
        (lambda path: (path / "1_Pooling/config.json").unlink(), "can't be read"),
        (lambda path: name_pooling(path, "cls_token"), "pooling of its files is cls"),
        (lambda path: name_pooling(path, pooling_mode_lasttoken=True), "mean and lasttoken"),
        (lambda path: name_pooling(path, "none"), "is none"),
        (lambda path: change(path, "config.json", is_causal=False), "both directions"),
        (lambda path: (path / "sentence_bert_config.json").write_text('{"do_lower_case": true}'), "lower case"),
    ],
)
def test_models_that_say_nothing_or_something_else_are_refused(copy, spoil, message):
    spoil(copy)
    with Client(copy, **OPTIONS) as client:
        with pytest.raises(BadRequestError, match=message) as caught:
            client.embeddings.create(input="a")
        assert (caught.value.param, caught.value.code) == ("model", "embeddings_not_supported")
        assert client.models.retrieve(str(copy)).capabilities["supports_embeddings"] is False


def test_declared_dimensions(copy):
    change(copy, "config.json", matryoshka_dimensions=[16, 32])
    with Client(copy, **OPTIONS) as client:
        assert [len(client.embeddings.create(input="a", dimensions=n).data[0].embedding) for n in (16, 64)] == [16, 64]
        with pytest.raises(BadRequestError, match="16, 32"):
            client.embeddings.create(input="a", dimensions=8)


def test_embed_uses_the_shared_client(headless):
    try:
        functions.configure(model=headless(), **OPTIONS)
        assert len(cai_runtime.embed("a").data) == 1
    finally:
        cai_runtime.close()


def test_slim(chatty, text_file, tmp_path):
    """The embeddings are those of the reconstructed weights; the files that say how to pool come along."""
    from cai_runtime.compressor import compress
    from cai_runtime.stock.load import slim_as_transformers

    target = tmp_path / "slim"
    compress(
        chatty, target, kind="interpolative", store="int8", keep=0.7, calibration=text_file, samples=4, sequence_length=16,
        rank_multiple=1, refine_epochs=0, heal_tokens=0, evaluate=False, progress=False,
    )  # fmt: skip
    with Client(target, activations="fp32", **OPTIONS) as client:
        found = vectors(client.embeddings.create(input=TEXTS))
        ids = tokenized(client)
    model = slim_as_transformers(target).model
    for vector, given in zip(found, ids, strict=True):
        with torch.inference_mode():
            mean = model(torch.tensor([given])).last_hidden_state[0].double().mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_preempted_prompt_goes_on_where_its_sum_was(chatty, pooling):
    text = Request([2, 3, 4], SamplingParams(max_tokens=70, ignore_eos=True, temperature=0))
    with Client(chatty, prefill_chunk=1, kv_cache=7 * 6144, progress=False) as client:  # pages of which the two need 10
        engine = client.engine()
        embedding = Request(tokenized(client)[3], SamplingParams(max_tokens=0), pooling=pooling)
        alone = engine.submit(embedding).result(60).embedding
        _, crowded = engine.submit_all([text, replace(embedding, cache_salt=b"another")])
        found = crowded.result(60).embedding
        assert engine.stats().preemptions > 0 and (found == alone).all()
        engine.check_integrity()


def test_a_slim_model_without_a_head(headless, text_file, tmp_path):
    from cai_runtime.compressor import compress

    compress(
        headless("qwen3"), tmp_path / "slim", kind="interpolative", store="fp32", keep=0.99, calibration=text_file,
        samples=4, sequence_length=16, rank_multiple=1, refine_epochs=0, heal_tokens=0, evaluate=False, progress=False,
    )  # fmt: skip
    with Client(tmp_path / "slim", **OPTIONS) as client:
        assert client.engine().has_head is False
        found, dense = vectors(client.embeddings.create(input=TEXTS)), headless("qwen3")
        similar = [vector @ expected(dense, ids) for vector, ids in zip(found, tokenized(client), strict=True)]
    assert min(similar) > 0.9


def test_in_a_batch(headless, tmp_path):
    with Client(headless(), **OPTIONS) as client:
        body = {"input": TEXTS}
        (result,) = client.batch([{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": body}])
        alone = client.embeddings.create(input=TEXTS)
    body = result["response"]["body"]
    assert [each["embedding"] for each in body["data"]] == [each.embedding for each in alone.data]
    assert body["usage"] == alone.usage.model_dump()
