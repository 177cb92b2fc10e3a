"""The spellings that divide an answer, and how one tokenizer writes them: as one token, or as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Marker:
    """A marker that the model wrote. token_id: None where the tokenizer has no token for it, so that it is text."""

    text: str
    token_id: int | None = None


class Markers:
    """A format's markers in one tokenizer. A marker that is a token is that token alone: its characters, written with
    other tokens, are text.

    Args:
        tokenizer: transformers' tokenizer.
        texts: the markers' spellings.
    """

    def __init__(self, tokenizer: Any, texts: Iterable[str]):
        ids = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._ids = {text: ids.get(text) for text in texts}
        self.tokens = {token_id: Marker(text, token_id) for text, token_id in self._ids.items() if token_id is not None}

    def __contains__(self, text: object) -> bool:
        return text in self._ids

    def is_token(self, text: str) -> bool:
        return self._ids.get(text) is not None

    def token(self, text: str) -> Marker:
        return Marker(text, self._ids.get(text))


def first_marker(text: str, markers: Iterable[str]) -> tuple[int, str] | None:
    """The marker that begins first, of several at one place the longest: (where it begins, its spelling)."""
    found = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker)) >= 0]
    if not found:
        return None
    at, _, marker = min(found)
    return at, marker


def held_length(text: str, markers: Iterable[str]) -> int:
    """The length of the longest end of `text` that more text can make a marker of."""
    longest = 0
    for marker in markers:
        for length in range(min(len(text), len(marker) - 1), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest
