"""Real input that several packages' tests share: fetched once, cached; a failed fetch fails the test. Makes
`tests/helpers` importable: pytest's importlib mode puts no test directory on the path."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

HELPERS = str(Path(__file__).parent / "helpers")
if HELPERS not in sys.path:
    sys.path.append(HELPERS)

# Tests run in as many processes as there are processors: each, and what it starts, takes one of them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CAI_NUM_THREADS", "1")

# A shell starts what it runs in the background with Ctrl-C ignored, which programs inherit, and tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory (fp32, from its Q4_1 GGUF where that is at hand)."""
    from cai_runtime.convert.sources import pull

    return pull("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def qwen_dir() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct as a Hugging Face directory (2.5 GB in fp32, from a GGUF of 490 MB where that is at hand).
    For slow tests."""
    from cai_runtime.convert.sources import pull

    return pull("qwen2.5-coder-0.5b-instruct")


@pytest.fixture(scope="session")
def whisper_dir() -> Path:
    """Whisper tiny.en as a Hugging Face directory."""
    from cai_runtime.convert.sources import pull

    return pull("whisper-tiny.en")


@pytest.fixture(scope="session")
def wikipedia_texts() -> list[str]:
    """Plain text of about a hundred English Wikipedia articles, in file order."""
    from cai_runtime.convert.texts import wikipedia_articles

    return wikipedia_articles()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty CAI_HOME: no model but those that the test puts there."""
    path = tmp_path / "home"
    monkeypatch.setenv("CAI_HOME", str(path))
    return path


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


class Hub:
    """A server on this machine that speaks the hub's protocol for one repository: "models/org/tiny", "datasets/org/words".

    revisions: name -> file name -> bytes. card: of the dataset. served: the files that were asked for. lie: state wrong
    SHA-256 hashes.
    """

    LARGE = (".safetensors", ".gguf", ".parquet")

    def __init__(self, repository: str):
        self.repository = repository
        self.revisions: dict[str, dict[str, bytes]] = {"main": {}}
        self.card: dict = {}
        self.served: list[str] = []
        self.lie = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                status, headers, body = hub.answer(self.path.split("?")[0], self.command)
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    @staticmethod
    def commit(revision: str) -> str:
        return hashlib.sha1(revision.encode()).hexdigest()

    def sha256(self, content: bytes) -> str:
        return "0" * 64 if self.lie else hashlib.sha256(content).hexdigest()

    def answer(self, path: str, method: str) -> tuple[int, dict[str, str], bytes]:
        name = self.repository.partition("/")[2]
        api, files_at = f"/api/{self.repository}", f"/{self.repository.removeprefix('models/')}/resolve"
        for revision, files in self.revisions.items():
            commit = self.commit(revision)
            names = (revision, revision.replace("/", "%2F"), commit)
            if path in [f"{api}/revision/{each}" for each in names]:
                siblings = [
                    self._described(f, "rfilename", "blobId", "sha256", content) for f, content in files.items()
                ]
                return self._json({"id": name, "sha": commit, "siblings": siblings, "cardData": self.card})
            if path == f"{api}/tree/{commit}":
                items = [self._described(f, "path", "oid", "oid", content) for f, content in files.items()]
                return self._json([{"type": "file"} | item for item in items])
            file = path.removeprefix(f"{files_at}/{commit}/")
            if file != path and file in files:
                if method == "GET":
                    self.served.append(file)
                large = file.endswith(self.LARGE)
                etag = self.sha256(files[file]) if large else hashlib.sha1(files[file]).hexdigest()
                return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[file]
        code = "RevisionNotFound" if path.startswith(api) else "RepoNotFound"
        return 404, {"X-Error-Code": code, "X-Error-Message": "not found"}, b"{}"

    def _described(self, file: str, name: str, digest: str, large_digest: str, content: bytes) -> dict:
        """One file in an answer of the API, whose endpoints name its fields differently."""
        found = {name: file, "size": len(content), digest: hashlib.sha1(content).hexdigest()}
        if file.endswith(self.LARGE):
            found["lfs"] = {large_digest: self.sha256(content), "size": len(content), "pointerSize": 100}
        return found

    @staticmethod
    def _json(value) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@pytest.fixture
def serve_hub(home: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts a `Hub` for a repository, with HF_ENDPOINT set to it and an empty CAI_HOME."""
    started = []

    def serve(repository: str) -> Hub:
        started.append(Hub(repository))
        monkeypatch.setenv("HF_ENDPOINT", started[-1].url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        return started[-1]

    yield serve
    for hub in started:
        hub.close()
