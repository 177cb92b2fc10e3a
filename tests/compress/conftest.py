"""Tiny dense checkpoints with a tokenizer, made on the spot."""

import pytest
import torch

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
