"""Splits a text's tokens into words, so that no token and no character is lost.

A word is what stands between spaces. Languages written without spaces are split at tokens, as OpenAI's Whisper does
(whisper/tokenizer.py), but no character, no syllable with its marks and no run of Latin letters and digits is torn.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

TokenDecode = Callable[[Sequence[int]], str]

PREPEND_PUNCTUATIONS = "\"'“¿([{-"  # whisper's defaults
APPEND_PUNCTUATIONS = "\"'.。,，!！?？:：”)]}、"
# Languages that Whisper's tokenizer writes without spaces: Chinese, Japanese, Thai, Lao, Burmese, Cantonese.
WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})


@dataclass(frozen=True)
class WordTokens:
    """A word and its place in the token list: tokens[begin:end]. `first` and `last` bound the tokens that are spoken:
    tokens[first:last], without the punctuation around them; a word of punctuation alone has all of its tokens there."""

    text: str
    begin: int
    end: int
    first: int
    last: int


def split_words(
    tokens: Sequence[int],
    decode: TokenDecode,
    language: str | None = None,
    *,
    prepend: str = PREPEND_PUNCTUATIONS,
    append: str = APPEND_PUNCTUATIONS,
) -> list[WordTokens]:
    """Split text tokens (no control and no time tokens) into words in order.

    decode: text of a list of tokens; bytes that make no character become U+FFFD. language: Whisper's code, None: words
    have spaces. prepend, append: punctuation that joins the word behind it or before it, as in whisper.
    The words' texts joined are decode(tokens), and each token belongs to one word. A text of spaces alone has no words.
    """
    pieces = _whole_pieces(tokens, decode)
    joined = _join(pieces, language in WITHOUT_SPACES, set(APPEND_PUNCTUATIONS) - set(append))
    return [_word(run) for run in _merge_punctuation(joined, prepend, append)]


@dataclass(frozen=True)
class _Piece:
    """The fewest tokens that make whole characters."""

    text: str
    begin: int
    end: int

    @property
    def content(self) -> bool:
        """Whether something of it is spoken."""
        return any(not (char.isspace() or is_punctuation(char)) for char in self.text)


def is_punctuation(char: str) -> bool:
    """Whether a character is punctuation of any script, or a sign of ASCII."""
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def _whole_pieces(tokens: Sequence[int], decode: TokenDecode) -> list[_Piece]:
    rest = decode(tokens)
    found: list[_Piece] = []
    begin = 0
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[begin:end])
        # Bytes of a character that goes on in the next token decode to U+FFFD. Bytes that are no character at all do so,
        # too: then the text behind them does not change when it is decoded alone.
        whole = "\ufffd" not in text or text + decode(tokens[end:]) == rest
        if whole and rest.startswith(text):
            found.append(_Piece(text, begin, end))
            rest, begin = rest[len(text) :], end
    if begin < len(tokens):
        found.append(_Piece(rest, begin, len(tokens)))
    return found


def _join(pieces: list[_Piece], every: bool, detached: set[str]) -> list[list[_Piece]]:
    """Pieces of a word together. every: each piece is a word of its own. detached: punctuation that joins no word."""
    words: list[list[_Piece]] = []
    for piece in pieces:
        before = words[-1][-1].text if words else ""
        if not before or all(each.text.isspace() for each in words[-1]):
            apart = not words  # spaces belong to what comes behind them
        elif piece.text[:1].isspace():
            apart = True
        elif not piece.text or unicodedata.category(piece.text[0]).startswith("M"):
            apart = False  # marks belong to the letter before
        elif every:
            apart = not (_latin(before[-1]) and _latin(piece.text[0]))
        else:
            apart = all(char in detached for char in piece.text) or all(char in detached for char in before.strip())
        if apart:
            words.append([piece])
        else:
            words[-1].append(piece)
    return words


def _latin(char: str) -> bool:
    return char.isascii() and char.isalnum()


def _merge_punctuation(words: list[list[_Piece]], prepend: str, append: str) -> Iterable[list[_Piece]]:
    """Join words of punctuation or of nothing to a neighbour: those of `prepend` behind a space to the next word, those of
    `append` to the one before."""
    merged: list[list[_Piece]] = []
    ahead: list[_Piece] = []
    for at, word in enumerate(words):
        text = _text(word)
        bare = text.strip()
        opens = bool(bare) and all(char in prepend for char in bare)
        opens = opens and (text[0].isspace() or not merged or unicodedata.category(bare[-1]) in ("Ps", "Pi"))
        if opens and at + 1 < len(words):
            ahead += word
            continue
        closes = not bare or (all(char in append for char in bare) and not text[0].isspace())
        if closes and not ahead and merged:
            merged[-1] = merged[-1] + word
            continue
        merged.append(ahead + word)
        ahead = []
    return [word for word in merged if _text(word).strip()] if len(merged) == 1 else merged


def _text(word: list[_Piece]) -> str:
    return "".join(piece.text for piece in word)


def _word(pieces: list[_Piece]) -> WordTokens:
    spoken = [piece for piece in pieces if piece.content] or pieces
    return WordTokens(_text(pieces), pieces[0].begin, pieces[-1].end, spoken[0].begin, spoken[-1].end)
