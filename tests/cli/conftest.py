"""A tiny random model that chats in bytes, and a cache of its own for every test."""

import pytest

TEMPLATE = "{% for m in messages %}{{ m.role + ':' + m.content + '\\n' }}{% endfor %}assistant:\n"


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """A random llama of 258 tokens (bytes, <bos>, <eos>) with a chat template, fp32."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("cli") / "tiny"
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


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache directory."""
    path = tmp_path / "home"
    monkeypatch.setenv("CAI_HOME", str(path))
    return path


@pytest.fixture
def cached_model(tiny_dir):
    """Puts the tiny model into the cache as `cai pull` would; called with what it was pulled from. Returns the entry."""
    import shutil

    from cai_runtime.convert.cache import entry

    def put(identity, kind="models", inside="."):
        def build(directory):
            shutil.copytree(tiny_dir, directory / inside, dirs_exist_ok=True)

        return entry(kind, "tiny", identity, build)

    return put
