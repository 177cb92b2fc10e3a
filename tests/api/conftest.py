"""The real engine over a runner that knows the alphabet, so that API tests need no weights and every reply is known."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from cai_runtime.client import AsyncClient, Client
from cai_runtime.engine.engine import Engine

# One line for each turn; the system's rule mirrors what real templates do with conversations they can't render.
TEMPLATE = """
{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('the system message must come first') }}{% endif %}
{{- m.role + ':' + m.content + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}
"""


def make_tokenizer(template=TEMPLATE):
    """Bytes as tokens, then <bos> and <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


class AlphabetRunner:
    """After a letter the next one is likeliest, after z the end of the text, after anything else the letter a."""

    page_size = 4
    num_pages = 256
    max_context = 200

    def __init__(self, tokenizer):
        self.vocab_size = len(tokenizer)
        self.closed = False
        self.fail = None  # an exception to raise in the next step
        self.gate = threading.Event()  # cleared: steps wait
        self.gate.set()
        self.next_token = np.full(self.vocab_size, tokenizer.convert_tokens_to_ids("a"))
        for letter in "abcdefghijklmnopqrstuvwxy":
            following = tokenizer.convert_tokens_to_ids(chr(ord(letter) + 1))
            self.next_token[tokenizer.convert_tokens_to_ids(letter)] = following
        self.next_token[tokenizer.convert_tokens_to_ids("z")] = tokenizer.eos_token_id
        self.letters = [tokenizer.convert_tokens_to_ids(chr(c)) for c in range(ord("a"), ord("z") + 1)]

    def run(self, step):
        assert self.gate.wait(timeout=30), "a test forgot to open the gate"
        if self.fail is not None:
            raise self.fail
        last = [sequence.token_ids[-1] for sequence in step if sequence.sample]
        logits = np.full((len(last), self.vocab_size), -20.0, dtype=np.float32)
        logits[:, self.letters] = 0.0
        logits[np.arange(len(last)), self.next_token[last]] = 2.0
        return logits

    def close(self):
        self.closed = True


class Factory:
    """Stands in for open_engine: counts openings and keeps what it opened."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.opened = []
        self.options = []
        self.runners = []
        self.error = None
        self.may_open = threading.Event()  # cleared: loading takes until it is set
        self.may_open.set()

    def __call__(self, path, **options):
        self.opened.append(Path(path))
        self.options.append(options)
        assert self.may_open.wait(timeout=30)
        if self.error is not None:
            raise self.error
        runner = AlphabetRunner(self.tokenizer)
        self.runners.append(runner)
        return Engine(runner, self.tokenizer, eos_token_ids=[self.tokenizer.eos_token_id], max_batch=8)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def bare_tokenizer():
    """Without a chat template."""
    return make_tokenizer(template=None)


@pytest.fixture
def factory(tokenizer):
    return Factory(tokenizer)


@pytest.fixture(autouse=True)
def empty_home(tmp_path, monkeypatch):
    """No weights on this machine but those that a test puts there."""
    home = tmp_path / "home"
    monkeypatch.setenv("CAI_HOME", str(home))
    return home


@pytest.fixture
def model_dir(tmp_path):
    """A directory that looks like a checkpoint; the factory does not read it."""
    path = tmp_path / "alphabet"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


@pytest.fixture
def client(factory, model_dir):
    with Client("abc", models={"abc": model_dir}, _engine_factory=factory) as client:
        yield client


@pytest.fixture
def new_client(factory, model_dir):
    """Clients with other options: `new_client(model=..., models=...)`; closed at the end of the test."""
    clients = []

    def make(*args, factory=factory, **options):
        clients.append(Client(*args, _engine_factory=factory, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def async_client(factory, model_dir):
    """Close it in the test: it belongs to the test's event loop."""
    return AsyncClient("abc", models={"abc": model_dir}, _engine_factory=factory)
