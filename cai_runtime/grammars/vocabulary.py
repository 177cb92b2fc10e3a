"""A tokenizer's vocabulary as llguidance has it: what bytes each token stands for."""

from __future__ import annotations

import copy
import os
import re
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from cai_runtime.errors import GrammarError

_NAMED = re.compile(r"<(\[[^<>\s]*\]|[^<>\s]+)>")


class Vocabulary:
    """The tokens of one model.

    Args:
        tokenizer: of transformers, a fast one, whose decoder joins bytes (GPT-2's alphabet, or SentencePiece's with
            tokens for single bytes).
        vocab_size: tokens that the logits have.
        eos_ids: tokens that end a text.

    Attributes: `tokenizer` (LLTokenizer), `vocab_size`, `eos_ids`.

    Raises GrammarError where llguidance can't read it.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Sequence[int]):
        import llguidance

        self.vocab_size = vocab_size
        self.eos_ids = [i for i in eos_ids if 0 <= i < vocab_size]
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not self.eos_ids:
            lacks = "token that ends a text" if backend is not None else "fast tokenizer (tokenizer.json)"
            raise GrammarError(f"this model can't be held to a grammar: it has no {lacks}")
        backend = copy.copy(backend)
        backend.no_padding()
        backend.no_truncation()
        try:
            self.tokenizer = llguidance.LLTokenizer(backend.to_str(), n_vocab=vocab_size, eos_token=self.eos_ids)
        except BaseException as error:
            # Also a panic in its code, which is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise GrammarError(
                f"this model can't be held to a grammar: its tokenizer can't be read ({error})"
            ) from error
        self._names: dict[str, int] = {}
        for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
            self._names[str(token)] = token_id

    @cached_property
    def _ordinary(self) -> np.ndarray:
        """The tokens that stand for text: uint32 [words]."""
        ids = [i for i in range(self.vocab_size) if not self.tokenizer.is_special_token(i)]
        ids = [i for i in ids if self.tokenizer.decode_bytes([i])]
        return _bits(ids, self.vocab_size)

    def permitted(self, lark: str) -> np.ndarray:
        """The tokens that a grammar may allow at all: those that stand for text, and the special ones that it names.
        uint32 [words]. Without this, the negation of a regular expression would allow special tokens."""
        named: list[int] = []
        for match in _NAMED.finditer(lark):
            name = match.group(1)
            if name.startswith("["):
                named += _ids(name[1:-1], self.vocab_size)
            elif (token_id := self._names.get(f"<{name}>")) is not None:
                named.append(token_id)
        return self._ordinary | _bits(named, self.vocab_size) if named else self._ordinary


_lock = threading.Lock()
_executors: dict[int, Any] = {}


def executor() -> Any:
    """One for the process: a forked child has none of its parent's threads."""
    import llguidance

    with _lock:
        pid = os.getpid()
        if pid not in _executors:
            _executors.clear()
            # The model computes meanwhile, on all processors: a mask takes a small part of a pass.
            _executors[pid] = llguidance.LLExecutor(num_threads=max(1, min(8, (os.cpu_count() or 1) // 4)))
        return _executors[pid]


def _ids(text: str, vocab_size: int) -> list[int]:
    """The ids of `<[1,5-9]>`; with "^" all others, "*" is all."""
    if text == "*":
        return list(range(vocab_size))
    found: set[int] = set()
    for part in text.removeprefix("^").split(","):
        low, _, high = part.partition("-")
        if low.isdecimal() and (high or low).isdecimal():
            found.update(range(int(low), min(int(high or low), vocab_size - 1) + 1))
    return sorted(set(range(vocab_size)) - found if text.startswith("^") else found)


def _bits(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[np.asarray([i for i in ids if i < vocab_size], np.int64)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
