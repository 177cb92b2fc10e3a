"""A tokenizer's vocabulary as llguidance has it: what bytes each token stands for."""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from cai_runtime.errors import GrammarError
from cai_runtime.grammars.mask import bits_of

# Of llguidance's lexer: strings, comments, regular expressions, and special tokens (the only group).
_LEXEME = re.compile(r'"(?:\\.|[^"\\])*"|(?:#|//)[^\n]*|/(?:\\.|[^/\\])+/|(<[^<>\s]+>)', re.DOTALL)


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

        self.vocab_size, self._words = vocab_size, -(-vocab_size // 32)
        self.eos_ids = [i for i in eos_ids if 0 <= i < vocab_size]
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not self.eos_ids:
            lacks = "token that ends a text" if backend is not None else "fast tokenizer (tokenizer.json)"
            raise GrammarError(f"this model can't be held to a grammar: it has no {lacks}")
        self._names = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if _is_special(token)}
        try:
            stored = _without_names(backend, self._names)
            self.tokenizer = llguidance.LLTokenizer(stored, n_vocab=vocab_size, eos_token=self.eos_ids)
        except BaseException as error:
            # Also a panic in its code, which is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise GrammarError(
                f"this model can't be held to a grammar: its tokenizer can't be read ({error})"
            ) from error
        if lost := [name for name, i in self._names.items() if not self.tokenizer.is_special_token(i)]:
            raise GrammarError(f"this model can't be held to a grammar: {lost[0]!r} is not special in its tokenizer")

    @cached_property
    def _ordinary(self) -> np.ndarray:
        """The tokens that stand for text: uint32 [words]."""
        ids = [i for i in range(self.vocab_size) if not self.tokenizer.is_special_token(i)]
        ids = [i for i in ids if self.tokenizer.decode_bytes([i])]
        return bits_of(ids, self._words)

    def resolved(self, lark: str) -> tuple[str, np.ndarray]:
        """A grammar with ids in place of the names of special tokens; and the tokens that it may allow at all, uint32
        [words]: those that stand for text, and the special ones that it names. Without that, the negation of a regular
        expression would allow special tokens.

        Raises:
            GrammarError: it names what is no special token.
        """
        named: list[int] = []

        def by_id(match: re.Match[str]) -> str:
            name = match.group(1)
            if name is None:
                return match.group()
            if name.startswith("<["):
                named.extend(_ids(name[2:-2], self.vocab_size))
                return name
            if name not in self._names:
                raise GrammarError(
                    f"unknown special token {name}: this tokenizer has {', '.join(self._names) or 'none'}"
                )
            named.append(self._names[name])
            return f"<[{self._names[name]}]>"

        text = _LEXEME.sub(by_id, lark)
        known = [i for i in named if i < self.vocab_size]
        return text, self._ordinary | bits_of(known, self._words) if known else self._ordinary


def _is_special(token: Any) -> bool:
    """Whether an added token is no text. Marked as such or not: those in brackets are the markers of calls and thoughts
    (`<tool_call>`, `[TOOL_CALLS]`), which must not come inside what a grammar has as text."""
    return token.special or token.content[:1] + token.content[-1:] in ("<>", "[]")


def _without_names(backend: Any, names: Mapping[str, int]) -> str:
    """tokenizer.json with other names for the special tokens. llguidance tokenizes text that must come, and would find
    special tokens in it by their names."""
    backend = copy.copy(backend)
    backend.no_padding()
    backend.no_truncation()
    stored, nonce = json.loads(backend.to_str()), secrets.token_hex(8)
    new = {name: f"<{nonce}:{i}>" for name, i in names.items()}
    for token in stored["added_tokens"]:
        if token["content"] in new:
            token |= {"content": new[token["content"]], "special": True}
    model = stored["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {new.get(token, token): i for token, i in vocabulary.items()}
    else:
        model["vocab"] = [[new.get(token, token), score] for token, score in vocabulary]
    if merges := model.get("merges"):  # a merge can't make what is not in the vocabulary
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
        model["merges"] = [pair for pair in pairs if not new.keys() & {*pair, "".join(pair)}]
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]
    return json.dumps(stored)


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
