"""Real input that several packages' tests share: fetched once, cached; a failed fetch fails the test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests run in as many processes as there are processors: each, and what it starts, takes one of them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CAI_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory (fp32, from its Q4_1 GGUF where that is at hand)."""
    from cai_runtime.convert.sources import pull

    return pull("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def wikipedia_texts() -> list[str]:
    """Plain text of about a hundred English Wikipedia articles, in file order."""
    from cai_runtime.convert.texts import wikipedia_articles

    return wikipedia_articles()


TEMPLATE = "{% for m in messages %}{{ m.role + ':' + m.content + '\\n' }}{% endfor %}assistant:\n"


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of 258 tokens (bytes, <bos>, <eos>) with a chat template, fp32."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("chat") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=65536,  # an answer that lasts until it is stopped
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


WORDS = [f"w{k}" for k in range(60)]


def save_tokenizer(path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: k for k, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(path)


def tiny_llama(path, *, tied=True, bias=False, seed=0, **overrides):
    """A random llama of two blocks with grouped queries, saved with a tokenizer; returns its directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 62,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        **{**sizes, **overrides},
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """2,000 words with some structure: each is likely to be followed by one of three others."""
    import torch

    g = torch.Generator().manual_seed(0)
    words, at = [], 0
    for step in torch.randint(1, 4, (2000,), generator=g).tolist():
        at = (at * 7 + step) % len(WORDS)
        words.append(WORDS[at])
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def add_tokenizer():
    return save_tokenizer


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory):
    return lambda **options: tiny_llama(tmp_path_factory.mktemp("tiny"), **options)
