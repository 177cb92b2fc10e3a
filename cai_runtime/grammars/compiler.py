"""Compiles grammars for one model, and keeps the newest."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cai_runtime.errors import GrammarError
from cai_runtime.grammars.mask import GrammarMask
from cai_runtime.grammars.vocabulary import Vocabulary

MAX_CHARACTERS = 1 << 20  # of a grammar; compiling more takes seconds
MAX_KEPT = 64  # compiled grammars
MAX_KEPT_CHARACTERS = 4 << 20  # of their texts
MAX_KEPT_SECONDS = 3.0  # of a processor, that they took to compile: what a second makes takes about 150 MB of memory

# What one grammar may take, about 200 MB and 2 seconds to compile and 20 ms a token; llguidance counts it, so that a refusal
# does not depend on the machine. A unit of fuel takes 20 to 70 ns, an item 50 ns, a lexer's state 1 to 2 kB.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}


@dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """A compiled grammar: a `MaskFactory`.

    matcher: at the start, never moved. permitted: see `Vocabulary.resolved`. seconds: of a processor, that it took.
    """

    name: str
    matcher: Any
    permitted: np.ndarray
    vocabulary: Vocabulary
    seconds: float = 0.0

    def __call__(self, ends: Collection[int] = ()) -> GrammarMask:
        """A sequence's mask, at the grammar's start. ends: the tokens that end the text; none are the model's own."""
        own = frozenset(self.vocabulary.eos_ids)
        return GrammarMask(self.name, self.matcher.deep_copy(), self.permitted, own, frozenset(ends) or own)


class Grammars:
    """The grammars of one model. Thread-safe.

    Args:
        tokenizer: of transformers, a fast one.
        vocab_size: tokens that the logits have; the tokenizer may have fewer, and what it lacks is never allowed.
        eos_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Iterable[int]):
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, tuple(sorted(eos_ids))
        self._lock = threading.Lock()  # guards the following
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[str, CompiledGrammar] = OrderedDict()  # the newest last
        self._characters, self._seconds = 0, 0.0

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's vocabulary as llguidance has it; made at the first use, in half a second.

        Raises:
            GrammarError: llguidance can't read this tokenizer.
        """
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer, self._vocab_size, self._eos_ids)
            return self._vocabulary

    def mask(self, lark: str, name: str = "grammar") -> CompiledGrammar:
        """Compile a grammar, or find it among those kept.

        Args:
            lark: in llguidance's dialect, with a rule `start`. Special tokens appear as `<|name|>` or `<[id]>`.
            name: the request's parameter that it came from, for errors.

        Raises:
            GrammarError: it is malformed, names what this tokenizer lacks, or takes too much to compile.
        """
        vocabulary = self.vocabulary
        with self._lock:
            found = self._kept.get(lark)
            if found is not None:
                self._kept.move_to_end(lark)
        if found is None:
            begin = time.thread_time()
            found = self._compiled(lark, name, vocabulary)
            found = replace(found, seconds=time.thread_time() - begin)
            self._keep(lark, found)
        return replace(found, name=name)

    def _keep(self, lark: str, compiled: CompiledGrammar) -> None:
        with self._lock:
            if lark not in self._kept:
                self._kept[lark] = compiled
                self._characters += len(lark)
                self._seconds += compiled.seconds
            while len(self._kept) > 1 and (
                len(self._kept) > MAX_KEPT or self._characters > MAX_KEPT_CHARACTERS or self._seconds > MAX_KEPT_SECONDS
            ):
                oldest, dropped = self._kept.popitem(last=False)
                self._characters -= len(oldest)
                self._seconds -= dropped.seconds

    @staticmethod
    def _compiled(lark: str, name: str, vocabulary: Vocabulary) -> CompiledGrammar:
        check_size(lark, name)
        try:
            text, permitted = vocabulary.resolved(lark)
        except GrammarError as error:
            raise GrammarError(f"'{name}' can't be compiled: {error}", param=name) from error
        matcher = new_matcher(text, vocabulary.tokenizer)
        if matcher.is_error():
            raise GrammarError(f"'{name}' can't be compiled: {readable(matcher.get_error())}", param=name)
        compiled = CompiledGrammar(name, matcher, permitted, vocabulary)
        row = np.full(-(-vocabulary.vocab_size // 32), 0xFFFFFFFF, np.uint32)
        first = compiled()
        try:
            first.fill(row)  # what can't be followed for one token can't be followed at all
        except GrammarError as error:
            raise GrammarError(str(error), param=name) from error
        if not row.any():
            raise GrammarError(f"'{name}' can't be met: no text fits it", param=name)
        return compiled


def new_matcher(lark: str, tokenizer: Any) -> Any:
    """An LLMatcher; where the grammar is at fault, it is in its error state."""
    import llguidance

    grammar = llguidance.LLMatcher.grammar_from_lark(lark)
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))  # type: ignore[arg-type]


def check_size(text: str, name: str) -> None:
    """Raise GrammarError for a grammar of more than MAX_CHARACTERS."""
    if len(text) > MAX_CHARACTERS:
        raise GrammarError(
            f"'{name}' is too large: {len(text)} characters as a grammar, and {MAX_CHARACTERS} may be", param=name
        )


_REGEX_ERROR = re.compile(r"^error: (.+)$", re.MULTILINE)
_LOCATION = re.compile(r"^at \d+\(\d+\): ")


def readable(message: str) -> str:
    """llguidance's error in one line, without the excerpt of a grammar that the caller has not written."""
    found = _REGEX_ERROR.search(message)
    line = found.group(1) if found else _LOCATION.sub("", message.strip()).partition("\n")[0].strip().rstrip(":")
    return line if len(line) <= 500 else line[:497] + "..."
