"""The real engine over a runner that knows the alphabet, so that API tests need no weights and every reply is known."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from fake_speech import FakeSpeech, make_speech_dir

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


def make_tokenizer(template: str | None = TEMPLATE):
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
        self.fail = None  # an exception to raise in every step
        self.full = 1  # sequences of a step that counts
        self.full_steps = 0
        self.before_step = {}  # number of such a step (from 0) -> called before it
        self.lock = threading.Lock()
        self.resumed = False  # from then on nothing pauses
        self.gate = threading.Event()  # cleared: steps wait
        self.gate.set()
        self.next_token = np.full(self.vocab_size, tokenizer.convert_tokens_to_ids("a"))
        for letter in "abcdefghijklmnopqrstuvwxy":
            following = tokenizer.convert_tokens_to_ids(chr(ord(letter) + 1))
            self.next_token[tokenizer.convert_tokens_to_ids(letter)] = following
        self.next_token[tokenizer.convert_tokens_to_ids("z")] = tokenizer.eos_token_id
        self.letters = [tokenizer.convert_tokens_to_ids(chr(c)) for c in range(ord("a"), ord("z") + 1)]

    def run(self, step):
        if len(step) >= self.full:
            self.before_step.get(self.full_steps, lambda: None)()
            self.full_steps += 1
        assert self.gate.wait(timeout=30), "a test forgot to open the gate"
        if self.fail is not None:
            raise self.fail
        last = [token for s in step for token in s.token_ids[len(s.token_ids) - s.wanted :]]
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
        self.engines = []
        self.errors = {}  # directory -> raised instead of opening it
        self.holds = {}  # directory -> an event that its opening waits for
        self.prepare = lambda runner: None  # called with every new runner
        self.wait_for = 0  # requests that a new engine waits for before its first step

    def __call__(self, path, **options):
        self.opened.append(Path(path))
        self.options.append(options)
        if path in self.holds:
            assert self.holds[path].wait(timeout=30), "a test forgot to let a model open"
        if path in self.errors:
            raise self.errors[path]
        runner = AlphabetRunner(self.tokenizer)
        self.prepare(runner)
        self.runners.append(runner)
        engine = Engine(runner, self.tokenizer, eos_token_ids=[self.tokenizer.eos_token_id], max_batch=8)
        if self.wait_for:
            self._hold(engine, runner)
        self.engines.append(engine)
        return engine

    def _hold(self, engine, runner):
        runner.gate.clear()
        submit_all, missing = engine.submit_all, self.wait_for

        def submit_and_count(requests):
            nonlocal missing
            handles = submit_all(requests)
            if 0 < missing <= len(handles):  # once: a later request must not open a gate that a test has closed
                runner.gate.set()
            missing -= len(handles)
            return handles

        engine.submit_all = submit_and_count

    def pause_before_step(self, step, full=1, and_then=lambda: None):
        """Have every engine wait at this step until `resume`; steps of fewer sequences than `full` don't count, and
        there are none before that many requests are in."""

        def pause(runner):
            with runner.lock:
                if not runner.resumed:  # the consumer may have all it wants before this step begins
                    runner.gate.clear()
            and_then()

        def prepare(runner):
            runner.full = full
            runner.before_step[step] = lambda: pause(runner)

        self.prepare = prepare
        self.wait_for = full

    def resume(self):
        for runner in self.runners:
            with runner.lock:
                runner.resumed = True
                runner.gate.set()


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def bare_tokenizer():
    """Without a chat template."""
    return make_tokenizer(template=None)


@pytest.fixture
def factory(tokenizer):
    factory = Factory(tokenizer)
    yield factory
    factory.resume()
    for engine in factory.engines:
        engine.close()


@pytest.fixture(autouse=True)
def always_home(home):
    """Every test has a `home` of its own."""


@pytest.fixture
def model_dir(tmp_path):
    """A directory that looks like a checkpoint; the factory does not read it."""
    path = tmp_path / "alphabet"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


@pytest.fixture
def client(factory, model_dir):
    client = Client("abc", models={"abc": model_dir}, _engine_factory=factory)
    yield client
    factory.resume()
    client.close()


@pytest.fixture
def new_client(factory, model_dir):
    """Clients with other options: `new_client(model=..., models=...)`; closed at the end of the test."""
    clients = []

    def make(*args, factory=factory, **options):
        clients.append(Client(*args, _engine_factory=factory, **options))
        return clients[-1]

    yield make
    factory.resume()
    for client in clients:
        client.close()


@pytest.fixture
def async_client(factory, model_dir):
    """The factory closes its engines."""
    return AsyncClient("abc", models={"abc": model_dir}, _engine_factory=factory)


def assert_valid(reply, of_type):
    """`reply` is an instance of the openai package's `of_type` and survives its strict validation, as objects and as JSON,
    with every field of the type present."""
    assert isinstance(reply, of_type)
    dumped = reply.model_dump()
    assert of_type.model_validate(dumped, strict=True).model_dump() == dumped
    assert of_type.model_validate_json(reply.model_dump_json(), strict=True).model_dump() == dumped


@pytest.fixture
def valid():
    return assert_valid


@pytest.fixture
def ask():
    """Parameters of a question that the alphabet answers at temperature 0."""
    return {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}


@pytest.fixture
def speech(monkeypatch):
    """Has clients read audio that is text; see FakeSpeech."""
    import cai_runtime.api.transcriptions as endpoint

    fake = FakeSpeech()
    monkeypatch.setattr(endpoint, "begin_work", fake)
    return fake


@pytest.fixture
def speech_models(tmp_path, model_dir):
    """Three names: a multilingual model, one that knows English alone, and one that answers text."""
    return {
        "whisper": make_speech_dir(tmp_path / "whisper"),
        "whisper.en": make_speech_dir(tmp_path / "whisper.en", multilingual=False),
        "abc": model_dir,
    }


@pytest.fixture
def hearing(speech, speech_models, new_client):
    """A client of these, whose default is the multilingual one."""
    return new_client("whisper", models=speech_models)


@pytest.fixture
def async_hearing(speech, speech_models, factory):
    return AsyncClient("whisper", models=speech_models, _engine_factory=factory)
