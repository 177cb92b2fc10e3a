"""Tokens to text, one token at a time: never half a character, never a part of a stop string."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_UNSETTLED = 16  # tokens in the window before a cut is tried; see Detokenizer._cut
_CONTEXT = 8  # prompt tokens that decide how the first generated token is written; a character has at most 4


class TokenDecoder:
    """The questions that detokenization asks of a tokenizer. Shared by all sequences of an engine, and thread-safe.

    `tokenizer`: a fast tokenizer of transformers, a `tokenizers.Tokenizer`, or anything with
    `decode(token_ids, skip_special_tokens=...)`. Text is never "cleaned up": it is what the model wrote.
    """

    def __init__(self, tokenizer: Any):
        # The Rust tokenizer under a fast one decodes several times faster and never cleans up.
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
        cleans_up = hasattr(self._backend, "clean_up_tokenization")
        self._options = {"clean_up_tokenization_spaces": False} if cleans_up else {}
        special = {token_id: str(token) for token_id, token in _added_tokens(self._backend) if token.special}
        self._special = frozenset(special)
        self._special_id = {text: token_id for token_id, text in special.items()}
        self._byte: dict[int, int | None] = {}
        self._alone: dict[tuple[int, bool], str] = {}
        # GPT-2's decoder writes each token's bytes, whatever stands beside it. Others strip or join.
        self._is_byte_level = type(getattr(self._backend, "decoder", None)).__name__ == "ByteLevel"
        self._has_byte_alphabet = _has_byte_level(getattr(self._backend, "decoder", None))
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[bool, dict[int, str]] = {False: {}, True: {}}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of a whole sequence of tokens."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens, **self._options)

    def length_alone(self, token_ids: Sequence[int], skip_special_tokens: bool) -> int:
        """Characters of these tokens' own text. Known of a token that was asked for before: half of a detokenizer's work."""
        if len(token_ids) > 1:
            return len(self.decode(token_ids, skip_special_tokens))
        return len(self._text_alone(token_ids[0], skip_special_tokens))

    def _text_alone(self, token_id: int, skip_special_tokens: bool) -> str:
        key = token_id, skip_special_tokens
        if key not in self._alone:
            self._alone[key] = self.decode([token_id], skip_special_tokens)
        return self._alone[key]

    def pieces(self, skip_special_tokens: bool) -> dict[int, str]:
        """Of the tokens that `learn_piece` was called with, what they add to any text that ends with a whole character; ""
        where that depends on the text."""
        return self._pieces[skip_special_tokens]

    def learn_piece(self, token_id: int, skip_special_tokens: bool) -> None:
        """Note a token's piece: in a byte-level vocabulary that of a token whose bytes are whole characters."""
        piece = self._text_alone(token_id, skip_special_tokens) if self._is_byte_level else ""
        self._pieces[skip_special_tokens][token_id] = "" if _REPLACEMENT in piece else piece

    def bytes_of(self, token_id: int) -> bytes:
        """What the token stands for in the middle of a text, as UTF-8 or a piece of it; of special tokens, their spelling.
        Empty for an id that the tokenizer does not have."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._find_bytes(token_id)
        return self._bytes[token_id]

    def _find_bytes(self, token_id: int) -> bytes:
        byte = self.byte_of(token_id)
        if byte is not None:
            return bytes([byte])
        # Decoders strip the beginning of a text. What the second of two equal tokens adds is whole.
        try:
            alone, twice = (self.decode([token_id] * count, False) for count in (1, 2))
        except (IndexError, KeyError, OverflowError, TypeError, ValueError):  # of a padded vocabulary, say
            return b""
        if _REPLACEMENT in twice and (token := self._name(token_id)) is not None and self._has_byte_alphabet:
            # The decoder takes a token for text where a character of it stands for no byte.
            found = [_BYTE_OF.get(character) for character in token]
            return token.encode() if None in found else bytes(b for b in found if b is not None)
        return twice[len(alone) :].encode()

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of text when special tokens are skipped."""
        return token_id in self._special

    def special_id(self, text: str) -> int | None:
        """The special token that is written `text`, such as "<|im_end|>"; None when there is none."""
        return self._special_id.get(text)

    def byte_of(self, token_id: int) -> int | None:
        """The byte that the token stands for, in vocabularies with byte fallback (`<0x0A>`); None for other tokens."""
        if token_id not in self._byte:
            token = self._name(token_id)
            match = _BYTE_TOKEN.fullmatch(token) if token else None
            # Without byte fallback, a token that looks like a byte is written as it is named.
            is_byte = match is not None and self.decode([token_id], False) != token
            self._byte[token_id] = int(match[1], 16) if match and is_byte else None
        return self._byte[token_id]

    def _name(self, token_id: int) -> str | None:
        name = getattr(self._backend, "id_to_token", None) or getattr(self._backend, "convert_ids_to_tokens", None)
        return name(token_id) if name else None


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2): printable Latin-1 characters are their
    own byte, the other bytes are the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _has_byte_level(decoder: Any) -> bool:
    """Whether a decoder of the `tokenizers` library, or a part of it, reads GPT-2's alphabet."""
    if not type(decoder).__module__.startswith("tokenizers"):
        return False
    parts = [json.loads(decoder.__getstate__())]
    while parts:
        part = parts.pop()
        if part.get("type") == "ByteLevel":
            return True
        parts += part.get("decoders", ())
    return False


def _added_tokens(tokenizer: Any) -> list[tuple[int, Any]]:
    if hasattr(tokenizer, "get_added_tokens_decoder"):  # tokenizers
        return list(tokenizer.get_added_tokens_decoder().items())
    return list(getattr(tokenizer, "added_tokens_decoder", {}).items())  # transformers


class Detokenizer:
    """The text that a growing sequence adds to its prompt.

    The pieces that `feed` and `finish` return, joined, are what `TokenDecoder.decode` of prompt and generated tokens
    has beyond the prompt's own text. One exception: byte-fallback decoders write U+FFFD for every byte of a run of
    byte tokens as soon as one byte in it is invalid; here each valid character of the run stays, because it was shown.

    `prompt_ids`: the tokens before the first generated one; only the last few matter. Decoders treat the first token of
    a text differently (they strip its leading space), and the first generated token is not the first of the text.

    The newest tokens are decoded together, as a window. Its first token was emitted before and is kept as context. Text
    that is not certain is held back:

    - Byte-level vocabularies: an unfinished character shows as one U+FFFD at the end. That one character is held back.
    - Byte fallback: byte tokens are held back until they make a character, or can't make one any more.
    """

    def __init__(self, decoder: TokenDecoder, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True):
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._pieces = decoder.pieces(skip_special_tokens)
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that were returned already
        self._is_whole = (
            False  # the window is not empty, its text ends with a whole character, and all of it was returned
        )
        self._previous: list[int] = []  # what the window was extended by last
        self._bytes: list[int] = []  # byte tokens that begin a character
        self._bytes_shown = 0  # how many of them the prompt's own text shows as U+FFFD
        self._after_bad_byte = False  # the window is one invalid byte: context for other tokens, not for bytes
        self._prompt_is_unfinished = False  # the last character of the prompt's text may still be completed
        self._context: list[int] | None = self._end_of(prompt_ids)  # None once it was read

    def _end_of(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last few tokens of the prompt that have text."""
        context: list[int] = []
        for token_id in reversed(prompt_ids):
            if not (self._skip and self._decoder.is_special(token_id)):
                context.append(token_id)
            if len(context) == _CONTEXT:
                break
        return context[::-1]

    def _read_context(self, context: list[int]) -> None:
        """Bring the window to where the prompt ends, with all text of the prompt emitted."""
        self._context = None
        for token_id in context:
            self.feed(token_id)
        self._bytes_shown = len(self._bytes)
        text = self._decoder.decode(self._window, self._skip) if self._window else ""
        self._prompt_is_unfinished = self._emitted < len(text)
        self._emitted = len(text)

    def feed(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        if self._is_whole and (piece := self._pieces.get(token_id)):
            self._window = self._previous = [token_id]
            self._emitted = len(piece)
            return piece
        if self._context is not None:
            self._read_context(self._context)
        if token_id not in self._pieces:
            self._decoder.learn_piece(token_id, self._skip)
        if self._skip and self._decoder.is_special(token_id):
            return ""  # it is as if it were not there
        if self._decoder.byte_of(token_id) is not None:
            return self._feed_byte(token_id)
        dropped = self._drop_bytes() if self._bytes else ""
        return dropped + self._extend([token_id])

    def _feed_byte(self, token_id: int) -> str:
        """Add a byte token: whole characters come out, bytes that can't belong to one come out as U+FFFD each."""
        self._bytes.append(token_id)
        pieces = []
        while self._bytes:
            content = bytes(self._decoder.byte_of(token) or 0 for token in self._bytes)
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as error:
                if error.start == 0 and error.reason == "unexpected end of data":
                    break
                pieces.append(self._drop_byte())
            else:
                character, self._bytes, self._bytes_shown = self._bytes, [], 0
                pieces.append(self._extend(character))
        return "".join(pieces)

    def _drop_byte(self) -> str:
        """Give up on the oldest byte that was held back."""
        byte = self._bytes.pop(0)
        held = self._flush_window()
        if not self._window:  # the decoder must not take what follows for the beginning of a text
            self._window, self._previous, self._after_bad_byte = [byte], [], True
            self._emitted = len(self._decoder.decode(self._window, self._skip))
        if self._bytes_shown:
            self._bytes_shown -= 1
            return held
        return held + _REPLACEMENT

    def _drop_bytes(self) -> str:
        return "".join(self._drop_byte() for _ in self._bytes[:])

    def _extend(self, token_ids: list[int]) -> str:
        """Add a token, or the byte tokens of one character, to the window."""
        if self._after_bad_byte and self._decoder.byte_of(token_ids[0]) is not None:
            # The invalid byte would spoil the run. Twice the character shows what it is in the middle of a text.
            self._window = self._previous = list(token_ids)
            self._emitted = len(self._decoder.decode(self._window, self._skip))
        self._after_bad_byte = False
        self._window = [*self._window, *token_ids]
        text = self._decoder.decode(self._window, self._skip)
        if self._prompt_is_unfinished and text[self._emitted - 1 : self._emitted] != _REPLACEMENT:
            self._emitted -= 1  # the generated bytes completed the prompt's last character
            self._prompt_is_unfinished = False
        self._is_whole = not text.endswith(_REPLACEMENT)
        if not self._is_whole:
            piece = text[self._emitted : -1]
            self._emitted = max(self._emitted, len(text) - 1)
            if len(self._window) > _MAX_UNSETTLED:
                self._cut(text)
            return piece
        self._prompt_is_unfinished = False
        piece = text[self._emitted :]
        self._emitted = len(text)
        if piece:
            # A token without text of its own is no context for the next one; a second one before it makes it one.
            for context in (token_ids, [*self._previous, *token_ids]):
                length = self._decoder.length_alone(context, self._skip)
                if length:
                    self._window, self._emitted = list(context), length
                    break
        self._previous = token_ids
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

    def _flush_window(self) -> str:
        text = self._decoder.decode(self._window, self._skip) if self._window else ""
        piece, self._emitted = text[self._emitted :], len(text)
        return piece

    def finish(self) -> str:
        """What was held back, as text: an unfinished character becomes U+FFFD."""
        return self._flush_window() + self._drop_bytes()


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
