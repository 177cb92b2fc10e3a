"""A deterministic language model over a fake paged cache, and a tokenizer for its vocabulary."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from cai_runtime.engine.engine import Engine
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.engine.runner_thread import Done
from cai_runtime.kernels.cache_groups import CacheGroup, pools
from cai_runtime.kernels.sampling import sample_cpu

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

    def copy_pages(self, pairs):
        for source, target in pairs:
            self.slots[target] = self.slots[source]

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


def fold(values, start=START):
    for value in values:
        start = next_hash(start, value)
    return start


class GroupRunner:
    """A "model" of several caches; kinds: any of "full", "window", "state", "encoder".

    Its next-token logits are a hash of what every group holds: the running hash of all tokens in the pages of "full", the
    hash of the last tokens' in "window", the running hash in the slots of "state", and all of "encoder". Groups of one pool
    lie in the same memory. So whatever is found in a wrong place changes the text. A token counts as itself, a given row
    as its number plus 1000.
    """

    able = frozenset({"given_rows", "encoder"})
    fold = staticmethod(fold)
    max_context, vocab_size = 128, VOCAB

    def __init__(self, kinds, num_pages=64, page_size=4, window=6, slots=12, encoder_pages=6, shared=True, align=8):
        size, self.window, self.page_size = page_size, window, page_size
        made = {
            "full": CacheGroup("full", "pages", 100, size),
            "window": CacheGroup("window", "window", 100 if shared else 50, size, window=window),
            "state": CacheGroup("state", "state", 300, size, reuse="snapshot", align=align),
            "encoder": CacheGroup("encoder", "encoder", 70, size, reuse="content", most_pages=3),
        }
        counts = {"full": num_pages, "window": num_pages, "state": slots, "encoder": encoder_pages}
        self.kinds, self.groups = kinds, tuple(made[kind] for kind in kinds)
        self.counts = {kind: counts[kind] for kind in kinds}
        self.memory = {}
        for pool in pools(self.groups):
            cells = np.zeros((counts[pool[0].name], size), np.uint64)
            self.memory |= {group.name: cells for group in pool}
        self.tables = {}
        self.steps, self.encoded, self.fail_on, self.nan_on, self.fail_after, self.closed = [], [], None, None, None, 0

    def launch(self, step):
        for change in step.pages:
            table = self.tables.setdefault((change.seat, change.group), [])
            table[change.at :] = change.pages + table[change.at + len(change.pages) :]
        self.steps.append([len(feed.ids) for feed in step.feeds])
        for copy in step.copies:
            self.memory[copy.group][copy.target] = self.memory[copy.group][copy.source]
        for encode in step.encode:
            self.encoded.append(encode.input.digest)
            for i in range(encode.input.rows):
                self._write(encode.seat, encode.group, i, encode.input.features + i)
        rows = [row for feed in step.feeds for row in self._run(feed)]
        if self.fail_after is not None and len(step.feeds) > self.fail_after:
            raise RuntimeError("too many sequences for this device")
        return Done(np.stack(rows) if rows else np.zeros((0, VOCAB), np.float32))

    def _run(self, feed):
        values = list(feed.ids)
        for rows in feed.inputs:
            values[rows.start : rows.start + len(rows.rows)] = [1000 + int(row) for row in rows.rows]
        state, slots = START, self.tables.get((feed.seat, "state"))
        if slots and feed.start:
            state = int(self.memory["state"][slots[0], 0])
        for at, value in enumerate(values):
            position, parts = feed.start + at, []
            if "full" in self.kinds:
                before = self._read(feed.seat, "full", position - 1) if position else START
                self._write(feed.seat, "full", position, next_hash(before, value))
                parts.append(self._read(feed.seat, "full", position))
            if "window" in self.kinds:
                self._write(feed.seat, "window", position, next_hash(position, value))
                seen = range(max(0, position - self.window + 1), position + 1)
                parts.append(fold(self._read(feed.seat, "window", p) for p in seen))
            if slots:
                state = next_hash(state, value)
                parts.append(state)
            if self.tables.get((feed.seat, "encoder")) and "encoder" in self.kinds:
                parts.append(self._read(feed.seat, "encoder", 0))
            if value == self.fail_on:
                raise RuntimeError(f"token {value} is poison")
            if at >= len(values) - feed.wanted:
                row = logits_of(fold(parts))
                if value == self.nan_on:
                    row[5] = np.nan
                yield row
        if slots:
            self.memory["state"][slots[1], 0] = state

    def sample(self, made, batch):
        return Done(sample_cpu(made.wait(), batch))

    def _cell(self, seat, group, position):
        return self.tables[seat, group][position // self.page_size], position % self.page_size

    def _read(self, seat, group, position):
        return int(self.memory[group][self._cell(seat, group, position)])

    def _write(self, seat, group, position, value):
        self.memory[group][self._cell(seat, group, position)] = value

    def close(self):
        self.closed += 1

    def defined(self, values, count, features=None):
        """The greedy continuation by the definition alone; values: as `_run` has them."""
        values, tokens = list(values), []
        while len(tokens) < count and EOS not in tokens:
            cells = [next_hash(p, value) for p, value in enumerate(values)]
            parts = {"full": fold(values), "window": fold(cells[-self.window :]), "state": fold(values)}
            parts = [parts[kind] for kind in ("full", "window", "state") if kind in self.kinds]
            parts += [features] if features is not None else []
            tokens.append(int(logits_of(fold(parts)).argmax()))
            values.append(tokens[-1])
        return tuple(tokens)


class HashMask:
    """A `TokenMask` that allows about a third of the tokens: which, a hash of all accepted ones says. A token too many or
    too few that it is told of changes everything after it. The text may end where the hash is a multiple of 4."""

    name = "hash_mask"

    def __init__(self, ends):
        self.ends, self.states = ends, [START]

    def allowed(self):
        rng = np.random.default_rng(self.states[-1])
        allowed = rng.random(VOCAB) < 0.33
        allowed[95] = True
        allowed[[*self.ends]] = self.states[-1] % 4 == 0
        return allowed

    def fill(self, row):
        assert (row == 0xFFFFFFFF).all()
        bits = np.zeros(len(row) * 32, np.uint8)
        bits[:VOCAB] = self.allowed()
        row[:] = np.packbits(bits, bitorder="little").view(np.uint32)
        return True

    def accept(self, token_id):
        assert self.allowed()[token_id] and token_id not in self.ends
        self.states.append(next_hash(self.states[-1], token_id))

    def rollback(self, count):
        assert 0 < count < len(self.states)
        del self.states[-count:]


@pytest.fixture(scope="session")
def hash_mask():
    """The class of a mask: a `MaskFactory`."""
    return HashMask


@pytest.fixture(scope="session")
def obeys():
    """obeys(token_ids, ends=(EOS,)): whether a text is one that a HashMask allows."""

    def check(token_ids, ends=(EOS,)):
        mask = HashMask(ends)
        for token_id in token_ids[:-1]:
            mask.accept(token_id)
        return bool(mask.allowed()[token_ids[-1]])

    return check


@pytest.fixture(scope="session")
def make_groups():
    """make_groups(kinds, **sizes) -> GroupRunner."""
    return GroupRunner


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
def logits_behind():
    """logits_behind(tokens): the row of logits by the definition of the model alone."""
    return lambda tokens: logits_of(fold(tokens))


@pytest.fixture(scope="session")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 90, size=int(n)).tolist() for n in rng.integers(1, 60, size=24)]
