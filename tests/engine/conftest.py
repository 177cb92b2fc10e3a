"""A deterministic language model over a fake paged cache, and a tokenizer for its vocabulary."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from cai_runtime.engine.engine import Engine
from cai_runtime.engine.request import Request, SamplingParams

VOCAB = 97
EOS = 96
START = 7  # the hash of no tokens


class FakeTokenizer:
    """One character a token; the last token is special and invisible."""

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join("" if t == EOS and skip_special_tokens else chr(0x100 + t) for t in token_ids)


class HashRunner:
    """A "model" whose next-token logits are a hash of all tokens before, read back through the pages it is given.

    Slot p of a sequence holds the running hash of tokens 0..p, which is computed from the slot before. A wrong page
    table, a page that was given away too early, a wrong prefix hit or a skipped position therefore changes every later
    logit. `fail_on` makes `run` raise when a step feeds that token; `gate`, when given, is waited for in each run.
    """

    def __init__(self, num_pages=64, page_size=4, max_context=256, vocab_size=VOCAB):
        self.page_size, self.num_pages, self.max_context, self.vocab_size = (
            page_size,
            num_pages,
            max_context,
            vocab_size,
        )
        self.slots = np.zeros((num_pages, page_size), dtype=np.uint64)
        self.fail_on = self.nan_on = None
        self.gate: threading.Semaphore | None = None
        self.entered = threading.Event()
        self.steps: list[list[int]] = []  # tokens per sequence
        self.threads = set()
        self.closed = 0

    def run(self, step):
        self.entered.set()
        if self.gate is not None:
            self.gate.acquire()
        self.threads.add(threading.get_ident())
        self.steps.append([len(s.token_ids) for s in step])
        assert step and not self.closed
        rows = []
        for s in step:
            assert s.token_ids and s.start + len(s.token_ids) <= len(s.pages) * self.page_size
            value = int(self.slots[self._slot(s, s.start - 1)]) if s.start else START
            for position, token in enumerate(s.token_ids, s.start):
                value = next_hash(value, token) if token != self.fail_on else 666
                self.slots[self._slot(s, position)] = value
                if token == self.fail_on:
                    raise RuntimeError(f"token {token} is poison")
                if position >= s.start + len(s.token_ids) - s.wanted:
                    rows.append(logits_of(value, self.vocab_size))
                    if self.nan_on in s.token_ids[: position - s.start + 1]:
                        rows[-1][5] = np.nan
        return np.stack(rows) if rows else np.zeros((0, self.vocab_size), np.float32)

    def _slot(self, s, position):
        return s.pages[position // self.page_size], position % self.page_size

    def close(self):
        self.closed += 1


def next_hash(value: int, token: int) -> int:
    return (value * 6364136223846793005 + token * 1442695040888963407 + 1) % 2**64


def logits_of(value: int, vocab_size: int = VOCAB) -> np.ndarray:
    row = np.random.default_rng(value).normal(size=vocab_size).astype(np.float32) * 3
    row[EOS] -= 2
    return row


def continuation(prompt, count):
    value, tokens = START, []
    for token in prompt:
        value = next_hash(value, token)
    while len(tokens) < count and EOS not in tokens:
        tokens.append(int(logits_of(value).argmax()))
        value = next_hash(value, tokens[-1])
    return tuple(tokens)


@pytest.fixture
def make_engine():
    """Engines over a HashRunner, closed after the test with their pages checked. Their clock stands still unless another is
    given, so that no test depends on the machine's speed."""
    engines = []

    def make(runner=None, clock=lambda: 0.0, **options):
        engine = Engine(runner or HashRunner(), FakeTokenizer(), eos_token_ids=[EOS], clock=clock, **options)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
        engine.check_integrity()
        assert engine.stats().pages_used == 0


@pytest.fixture(scope="session")
def greedy():
    """greedy(prompt, max_tokens=20, **sampling) -> Request."""

    def make(prompt, max_tokens=20, **sampling):
        return Request(list(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling))

    return make


@pytest.fixture(scope="session")
def make_runner():
    """make_runner(num_pages=64, page_size=4, max_context=256) -> HashRunner."""
    return HashRunner


@pytest.fixture(scope="session")
def expected():
    """expected(prompt, count): the greedy continuation by the definition of the model alone, without any engine."""
    return continuation


@pytest.fixture(scope="session")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 90, size=int(n)).tolist() for n in rng.integers(1, 60, size=24)]
