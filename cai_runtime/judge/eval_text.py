"""Evaluation text: windows of tokens, spread evenly over a text that no calibration has used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cai_runtime.errors import CompressionError

WIKIPEDIA = "wikipedia"


@dataclass(frozen=True)
class EvalText:
    """Texts in order, and a description of their source."""

    texts: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Windows:
    """Pieces of text, each scored without the others.

    Attributes:
        token_ids: one int64 [tokens] for each window, at least two tokens long. All tokens but the first are scored.
        nbytes: UTF-8 bytes of each window's text.
        begins_with_bos: whether each window begins with the beginning-of-sequence token, which is no part of the text.
    """

    token_ids: tuple[torch.Tensor, ...]
    nbytes: tuple[int, ...]
    begins_with_bos: bool

    @property
    def tokens(self) -> int:
        """Number of tokens of the text, without beginning-of-sequence tokens."""
        return sum(len(ids) for ids in self.token_ids) - (len(self.token_ids) if self.begins_with_bos else 0)


def read_text(source: str | Path | None = None, *, progress: bool | None = None) -> EvalText:
    """Read the evaluation text.

    source: None or "wikipedia" is the last quarter of the Wikipedia sample, which calibration never uses. Anything else is
    a file that the compressor takes as calibration text.

    Raises CompressionError for a file without text or one that can't be read, SourceError if the sample can't be fetched.
    """
    if source is None or source == WIKIPEDIA:
        from cai_runtime.convert.texts import split_articles, wikipedia_articles

        articles = split_articles(wikipedia_articles(progress=progress)).test
        return EvalText(tuple(articles), f"wikipedia-sample, last quarter: {len(articles)} articles")
    from cai_runtime.convert.text_files import whole_texts

    texts, words = whole_texts(source)
    return EvalText(tuple(texts), words)


def cut_windows(text: EvalText, tokenizer: Any, *, tokens: int, window: int) -> Windows:
    """Cut `tokens // window` windows of `window` tokens, spread evenly over the text.

    A shorter text gives all its windows; one shorter than a window gives one window. An end-of-sequence token separates
    two texts.

    Raises CompressionError for `tokens` or `window` below 2, or a text of fewer than two tokens.
    """
    if window < 2 or tokens < 2:
        raise CompressionError(
            f"window {window} and tokens {tokens} must be at least 2: the first token has no context"
        )
    bos = beginning_of_sequence(tokenizer)
    own = window - len(bos)
    ids: list[int] = []
    for each in text.texts:
        ids += tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    if len(ids) < 2:
        raise CompressionError(f"{text.source}: the text has {len(ids)} token(s); give at least two")
    row = torch.tensor(ids, dtype=torch.int64)
    if len(row) < own:
        pieces = [row[:tokens]]
    else:
        whole = row[: len(row) // own * own].view(-1, own)
        wanted = max(tokens // window, 1)
        chosen = (
            range(len(whole))
            if len(whole) <= wanted
            else torch.linspace(0, len(whole) - 1, wanted, dtype=torch.float32).long().tolist()
        )
        pieces = [whole[k][: max(tokens, 2)] for k in chosen]
    return _windows(pieces, [_text_of(tokenizer, piece) for piece in pieces], bos)


def retokenized(windows: Windows, tokenizer: Any, other: Any) -> Windows:
    """The same pieces of text, encoded by the tokenizer `other`. Their lengths in tokens may differ.

    Raises CompressionError if `other` makes fewer than two tokens of a piece.
    """
    skip = 1 if windows.begins_with_bos else 0
    bos = beginning_of_sequence(other)
    pieces, texts = [], []
    for ids in windows.token_ids:
        text = _text_of(tokenizer, ids[skip:])
        piece = torch.tensor(other(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
        if len(piece) + len(bos) < 2:
            raise CompressionError(f"the second model's tokenizer makes {len(piece)} token(s) of {text[:40]!r}")
        pieces.append(piece)
        texts.append(text)
    return _windows(pieces, texts, bos)


def beginning_of_sequence(tokenizer: Any) -> list[int]:
    """[the beginning-of-sequence token] if the tokenizer puts it before every text, else [].

    A model that was trained with it fails without it, so each window begins with one.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    with_special = tokenizer("a", verbose=False)["input_ids"]
    return [bos] if bos is not None and list(with_special[:1]) == [bos] else []


def same_tokens(first: Any, second: Any) -> bool:
    """Whether two tokenizers have the same vocabulary."""
    return first.get_vocab() == second.get_vocab()


def _windows(pieces: Sequence[torch.Tensor], texts: Sequence[str], bos: list[int]) -> Windows:
    start = torch.tensor(bos, dtype=torch.int64)
    return Windows(
        tuple(torch.cat([start, piece]) for piece in pieces),
        tuple(max(len(text.encode()), 1) for text in texts),
        bool(bos),
    )


def _text_of(tokenizer: Any, ids: torch.Tensor) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
