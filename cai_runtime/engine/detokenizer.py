"""Tokens to text, one token at a time: never half a character, never a part of a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_UNSETTLED = 16  # tokens in the window before a cut is tried; see Detokenizer._cut


class TokenDecoder:
    """The three questions that detokenization asks of a tokenizer. Shared by all sequences of an engine.

    `tokenizer`: a fast tokenizer of transformers, a `tokenizers.Tokenizer`, or anything with
    `decode(token_ids, skip_special_tokens=...)`. Text is never "cleaned up": it is what the model wrote.
    """

    def __init__(self, tokenizer: Any):
        # The Rust tokenizer under a fast one decodes several times faster and never cleans up.
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
        cleans_up = hasattr(self._backend, "clean_up_tokenization")
        self._options = {"clean_up_tokenization_spaces": False} if cleans_up else {}
        self._special = frozenset(token_id for token_id, token in _added_tokens(self._backend) if token.special)
        self._is_byte: dict[int, bool] = {}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of a whole sequence of tokens."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens, **self._options)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of text when special tokens are skipped."""
        return token_id in self._special

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one byte of a sentencepiece-like vocabulary's fallback, `<0x0A>`."""
        known = self._is_byte.get(token_id)
        if known is None:
            name = getattr(self._backend, "id_to_token", None) or getattr(self._backend, "convert_ids_to_tokens", None)
            token = name(token_id) if name else None
            known = self._is_byte[token_id] = token is not None and _BYTE_TOKEN.fullmatch(token) is not None
        return known


def _added_tokens(tokenizer: Any) -> list[tuple[int, Any]]:
    if hasattr(tokenizer, "get_added_tokens_decoder"):  # tokenizers
        return list(tokenizer.get_added_tokens_decoder().items())
    return list(getattr(tokenizer, "added_tokens_decoder", {}).items())  # transformers


class Detokenizer:
    """The text of one growing sequence. The pieces that `feed` and `finish` return, joined, are exactly
    `TokenDecoder.decode` of all tokens.

    A window of the newest tokens is decoded as a whole. Its first token was emitted before and stays as context,
    because decoders treat the first token of a text differently (a leading space). What is not certain is held back:

    - Byte-level vocabularies: an unfinished character shows as one U+FFFD at the end. That one character is held back.
    - Byte fallback: a run of byte tokens is text as a whole or not at all, so the run is held until it ends.
    """

    def __init__(self, decoder: TokenDecoder, *, skip_special_tokens: bool = True):
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that were returned already
        self._byte_run: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        if self._skip and self._decoder.is_special(token_id):
            return ""  # it is as if it were not there
        if self._decoder.is_byte(token_id):
            self._byte_run.append(token_id)
            return ""
        self._window += [*self._byte_run, token_id]
        self._byte_run.clear()
        text = self._decoder.decode(self._window, self._skip)
        if text.endswith(_REPLACEMENT):
            piece = text[self._emitted : -1]
            self._emitted = max(self._emitted, len(text) - 1)
            if len(self._window) > _MAX_UNSETTLED:
                self._cut(text)
            return piece
        piece = text[self._emitted :]
        self._emitted = len(text)
        if piece:
            last = self._decoder.decode([token_id], self._skip)
            if last:  # a token without text of its own is no context for the next one
                self._window, self._emitted = [token_id], len(last)
        return piece

    def _cut(self, text: str) -> None:
        """Shorten a window whose end keeps being U+FFFD, where a cut provably changes nothing.

        If both parts decode to the whole, the left one ended between characters: had the right one continued a
        character, its continuation bytes alone would have shown as additional U+FFFD.
        """
        left, right = self._window[:-4], self._window[-4:]
        right_text = self._decoder.decode(right, self._skip)
        left_text = self._decoder.decode(left, self._skip)
        if right_text and left_text + right_text == text:
            self._window, self._emitted = right, self._emitted - len(left_text)

    def finish(self) -> str:
        """What was held back, as text: an unfinished character becomes U+FFFD."""
        self._window += self._byte_run
        self._byte_run.clear()
        text = self._decoder.decode(self._window, self._skip)
        piece, self._emitted = text[self._emitted :], len(text)
        return piece


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces, and holds back what might become one.

    The first is the one that is complete first; of two complete at the same character, the longer. This does not depend
    on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def feed(self, piece: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """(text that may be shown, the stop string that was found or None). After a find, the text is over.

        A stop string that is completed while `may_stop` is False is ordinary text.
        """
        if not self._stops:
            return piece, None
        known, text = len(self._held), self._held + piece
        if may_stop:
            found = self._find(text, known)
            if found is not None:
                begin, stop = found
                self._held = ""
                return text[:begin], stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        shown = text[: len(text) - keep]
        self._held = text[len(text) - keep :]
        return shown, None

    def _find(self, text: str, known: int) -> tuple[int, str] | None:
        """The first match that ends after `known` characters: (where it begins, what it is)."""
        matches = [
            (begin + len(stop), begin, stop)
            for stop in self._stops
            if (begin := text.find(stop, max(0, known - len(stop) + 1))) >= 0
        ]
        if not matches:
            return None
        _, begin, stop = min(matches)
        return begin, stop

    def finish(self) -> str:
        """The text held back, which turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, shorter than `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
