"""Calibration text as token sequences of one length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.errors import CompressionError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CalibrationText:
    """Texts, and where they came from in words (for the report)."""

    texts: list[str]
    source: str


def load_calibration(file: str | Path | None = None, *, progress: bool | None = None) -> CalibrationText:
    """Read a text file, or a .jsonl file whose lines are objects with a "text"; None: the calibration half of the
    Wikipedia sample.

    Raises CompressionError for a file that can't be read, is not what its name says, or holds no text; SourceError when
    the sample can't be fetched.
    """
    if file is None:
        from cai_runtime.convert.texts import split_articles, wikipedia_articles

        articles = split_articles(wikipedia_articles(progress=progress)).calibration
        return CalibrationText(articles, f"wikipedia-sample, first half: {len(articles)} articles")
    path = Path(file)
    try:
        content = path.read_bytes().decode("utf-8")
    except OSError as e:
        raise CompressionError(f"calibration file {path} can't be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise CompressionError(f"calibration file {path} is not UTF-8 text: {e}") from e
    texts = _json_lines(path, content) if path.suffix == ".jsonl" else [content]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CompressionError(f"calibration file {path} holds no text")
    return CalibrationText(texts, f"{path.name}: {len(texts)} {'text' if len(texts) == 1 else 'texts'}")


def _json_lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as e:
            raise CompressionError(f"calibration file {path}, line {number}: not JSON: {e}") from e
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise CompressionError(f'calibration file {path}, line {number}: must be an object with a string "text"')
        texts.append(entry["text"])
    return texts


def tokenize(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """All texts as one row of token ids, int64 [tokens], each as the tokenizer begins and ends a document, with its
    end-of-sequence token (where it has one) between them."""
    import torch

    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int64)


def sample_sequences(tokens: torch.Tensor, samples: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """`samples` different windows of `length` tokens, int64 [samples, length], drawn by `seed`; all of them in order,
    when there are no more than that.

    Raises CompressionError when the tokens do not fill one window.
    """
    import torch

    windows = tokens.numel() // length
    if windows == 0:
        raise CompressionError(
            f"the calibration text has {tokens.numel()} tokens, less than one sequence of {length}: give a longer text or a "
            "smaller --sequence-length"
        )
    packed = tokens[: windows * length].view(windows, length)
    if windows <= samples:
        return packed
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))
    return packed[order[:samples].sort().values]
