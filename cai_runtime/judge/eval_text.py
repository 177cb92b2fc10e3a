"""Text to judge a model by: windows of tokens, spread evenly over articles that no calibration has seen."""

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
    """Texts in their order, and where they came from in words."""

    texts: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Windows:
    """What a model is shown: pieces of text, each by itself.

    Attributes:
        token_ids: one int64 [tokens] for each window, at least two tokens long. All but the first of them are scored.
        nbytes: UTF-8 bytes of each window's text.
        begins_with_bos: each window's first token is the tokenizer's beginning-of-sequence token, and no part of the
        text.
    """

    token_ids: tuple[torch.Tensor, ...]
    nbytes: tuple[int, ...]
    begins_with_bos: bool

    @property
    def tokens(self) -> int:
        """Of the text itself: without the beginning-of-sequence tokens that were put before it."""
        return sum(len(ids) for ids in self.token_ids) - (len(self.token_ids) if self.begins_with_bos else 0)


def read_text(source: str | Path | None = None, *, progress: bool | None = None) -> EvalText:
    """None or "wikipedia": the last quarter of the Wikipedia sample, which is for tests alone. Else a file that the
    compressor would take as calibration text.

    Raises CompressionError for a file that can't be read or holds no text, SourceError when the sample can't be
    fetched.
    """
    if source is None or source == WIKIPEDIA:
        from cai_runtime.convert.texts import split_articles, wikipedia_articles

        articles = split_articles(wikipedia_articles(progress=progress)).test
        return EvalText(tuple(articles), f"wikipedia-sample, last quarter: {len(articles)} articles")
    from cai_runtime.convert.text_files import whole_texts

    texts, words = whole_texts(source)
    return EvalText(tuple(texts), words)


def cut_windows(text: EvalText, tokenizer: Any, *, tokens: int, window: int) -> Windows:
    """`tokens // window` windows of `window` tokens, spread evenly over the text; all there are, when there are
    fewer; one shorter one, when the text is shorter than a window. An end-of-sequence token goes between two texts.

    Raises CompressionError for sizes that leave nothing to score, or a text of fewer than two tokens.
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
    """The same pieces of text as another tokenizer cuts them; their lengths then differ.

    Raises CompressionError when a piece comes to nothing that could be scored.
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
    """The tokenizer's beginning-of-sequence token where it puts one before every text, else nothing. Models that were
    trained with it are lost without it, so each window gets its own."""
    bos = getattr(tokenizer, "bos_token_id", None)
    with_special = tokenizer("a", verbose=False)["input_ids"]
    return [bos] if bos is not None and list(with_special[:1]) == [bos] else []


def same_tokens(first: Any, second: Any) -> bool:
    """Whether two tokenizers give every id the same meaning."""
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
