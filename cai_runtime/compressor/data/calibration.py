"""Calibration text as token sequences of one length, from the model itself, Wikipedia, files or a dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.errors import CompressionError

if TYPE_CHECKING:
    import torch

    from cai_runtime.compressor.data.self_text import SelfSampling
    from cai_runtime.convert.text_files import Document

SELF = "self"
WIKIPEDIA = "wikipedia"
Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Calibration:
    """Token sequences and their origin.

    sequences: int64 [samples, length], on the CPU. source: description for people. provenance: JSON values to reproduce the
    text: files and their SHA-256, a dataset's commit, or the sampling settings.
    """

    sequences: torch.Tensor
    source: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values for the report, with the SHA-256 of the token ids (int64, little-endian, row-major)."""
        return {
            "source": self.source,
            "sequences": self.sequences.shape[0],
            "sequence_length": self.sequences.shape[1],
            "tokens": self.sequences.numel(),
            "tokens_sha256": hashlib.sha256(self.sequences.numpy().astype("<i8").tobytes()).hexdigest(),
            **self.provenance,
        }


def calibration_sequences(
    source: Source = SELF,
    *,
    tokenizer: Any,
    model_path: str | Path,
    samples: int = 16,
    sequence_length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    sampling: SelfSampling | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Calibration text of a source as `samples` sequences of `sequence_length` tokens, or fewer if the text is short.

    Args:
        source:
          - "self": written by the model itself, see `self_text`;
          - "wikipedia": the first half of the articles in `wikipedia-sample`;
          - "hf:owner/name[:config[:split]][@revision]": a dataset of the Hugging Face hub, see `hub_dataset`;
          - a .txt, .jsonl or .parquet file, a directory of such files, or a list of them, see `text_files`. For a file
            named like a word above, write "./self".
        tokenizer: transformers' tokenizer of the model. It renders conversations with its chat template. Other texts are
            documents, separated by its end-of-sequence token.
        model_path: the dense or slim checkpoint that "self" runs.
        seed: for drawing sequences from a longer text, and for sampling with "self".
        device: "cpu" or "cuda[:n]", where "self" runs the model.
        sampling: settings of "self"; None: the defaults of `SelfSampling`.
        progress: bars on stderr; None: on a terminal only.

    The same arguments give the same sequences. No global random state is used or changed. A large file or dataset is sampled
    in one pass; only the sample is in memory.

    Raises:
        CompressionError: the source is unknown or empty, too short for one sequence, malformed (the message names file and
            line or row), needs a package that is not installed, or the model can't write its own text.
        SourceError: the Wikipedia sample can't be fetched. CheckpointError: "self" met a damaged checkpoint.
    """
    if source == SELF:
        return _self(model_path, tokenizer, samples, sequence_length, seed, device, sampling, progress)
    if source == WIKIPEDIA:
        documents, words, provenance = _wikipedia(progress)
    elif isinstance(source, str) and source.startswith("hf:"):
        documents, words, provenance = _dataset(source, samples * sequence_length, seed, progress)
    else:
        documents, words, provenance = _files(source, samples * sequence_length, seed)
    tokens = tokenize_documents(tokenizer, documents)
    sequences = sample_sequences(tokens, samples, sequence_length, seed=seed)
    return Calibration(sequences, words, provenance | {"seed": seed})


def _self(
    model_path: str | Path,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    device: str,
    sampling: SelfSampling | None,
    progress: bool | None,
) -> Calibration:
    import torch

    from cai_runtime.compressor.data.self_text import SelfSampling, write_self_text

    sampling = sampling or SelfSampling()
    text = write_self_text(
        model_path,
        tokenizer,
        samples=samples,
        length=length,
        seed=seed,
        sampling=sampling,
        device=device,
        progress=progress,
    )
    words = f"the model's own text: {samples - text.chats} sequences of documents, {text.chats} of conversations"
    provenance = {"seed": seed, "writer": text.writer, "loops_cut": text.loops, "sampling": asdict(sampling)}
    return Calibration(torch.tensor(text.sequences, dtype=torch.int64), words, provenance)


def _wikipedia(progress: bool | None) -> tuple[list[Document], str, dict[str, Any]]:
    from cai_runtime.convert.text_files import Document
    from cai_runtime.convert.texts import split_articles, wikipedia_articles

    articles = split_articles(wikipedia_articles(progress=progress)).calibration
    documents = [Document(f"article {k}", text=text) for k, text in enumerate(articles, 1)]
    digest = hashlib.sha256(json.dumps(articles).encode()).hexdigest()
    return documents, f"wikipedia-sample, first half: {len(articles)} articles", {"articles_sha256": digest}


def _files(source: Source, tokens: int, seed: int) -> tuple[list[Document], str, dict[str, Any]]:
    from cai_runtime.convert.cache import sha256_of
    from cai_runtime.convert.text_files import characters_for, find_files, read_documents, sample_documents

    given = [source] if isinstance(source, (str, Path)) else list(source)
    files = [file for item in given for file in find_files(item)]
    counted = _Counted(document for file in files for document in read_documents(file))
    documents = sample_documents(counted, characters_for(tokens), seed)
    names = files[0].name if len(files) == 1 else f"{len(files)} files"
    if not documents:
        raise CompressionError(f"calibration text {', '.join(map(str, given)) or 'of no files'} holds no text")
    hashes = [{"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files]
    return documents, f"{names}: {_count(documents, counted.count)}", {"files": hashes}


def _dataset(source: str, tokens: int, seed: int, progress: bool | None) -> tuple[list[Document], str, dict[str, Any]]:
    from cai_runtime.compressor.data.hub_dataset import DatasetName, fetch_shards, find_shards
    from cai_runtime.convert.text_files import (
        characters_for,
        read_documents,
        sample_documents,
        total_characters,
    )

    name = DatasetName.parse(source)
    shards = find_shards(name)
    enough, files, count = characters_for(tokens), 0, 0
    documents: list[Document] = []
    for path in fetch_shards(shards, progress=progress):
        counted = _Counted(read_documents(path))
        documents += sample_documents(counted, enough - total_characters(documents), seed)
        files, count = files + 1, count + counted.count
        if total_characters(documents) >= enough:
            break
    if not documents:
        raise CompressionError(f"calibration dataset {name} holds no text")
    provenance = {
        "dataset": name.repo,
        "config": shards.config,
        "split": name.split,
        "revision": shards.commit,
        "files": list(shards.files[:files]),
    }
    words = (
        f"{name.repo}, {shards.config}, {name.split}, {files} of {len(shards.files)} files: {_count(documents, count)}"
    )
    return documents, words, provenance


class _Counted:
    """Iterates over documents and counts them."""

    def __init__(self, documents: Iterable[Document]):
        self.count = 0
        self._documents = documents

    def __iter__(self):
        for document in self._documents:
            self.count += 1
            yield document


def _count(documents: Sequence[Document], among: int) -> str:
    chats = sum(bool(document.messages) for document in documents)
    parts = [
        f"{number} {word if number == 1 else word + 's'}"
        for number, word in ((len(documents) - chats, "text"), (chats, "conversation"))
        if number
    ]
    return " and ".join(parts) + (f", drawn from {among}" if among > len(documents) else "")


def tokenize_documents(tokenizer: Any, documents: Iterable[Document]) -> torch.Tensor:
    """All documents as token ids, int64 [tokens]. Conversations are rendered by the chat template, texts as in `tokenize`.

    Raises CompressionError, which names file and line: the model has no chat template, or it rejects a conversation.
    """
    import torch

    ids: list[int] = []
    for document in documents:
        ids += _chat_ids(tokenizer, document) if document.messages else _text_ids(tokenizer, document.text)
    return torch.tensor(ids, dtype=torch.int64)


def _chat_ids(tokenizer: Any, document: Document) -> list[int]:
    from jinja2.exceptions import TemplateError

    from cai_runtime.compressor.data.conversation import dated_template

    if not getattr(tokenizer, "chat_template", None):
        raise CompressionError(
            f"calibration file {document.where}: a conversation, but this model has no chat template: give it texts"
        )
    try:
        encoded = tokenizer.apply_chat_template(
            list(document.messages), chat_template=dated_template(tokenizer), tokenize=True, return_dict=True
        )
    except (TemplateError, TypeError, KeyError, ValueError) as e:
        raise CompressionError(
            f"calibration file {document.where}: the model's chat template refuses this conversation: {e}"
        ) from e
    ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
    return [int(token) for token in ids]


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids


def tokenize(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """All texts as token ids, int64 [tokens], with the tokenizer's special tokens. Each text ends with an end-of-sequence
    token if the tokenizer has one."""
    import torch

    return torch.tensor([token for text in texts for token in _text_ids(tokenizer, text)], dtype=torch.int64)


def sample_sequences(tokens: torch.Tensor, samples: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """`samples` disjoint windows of `length` tokens, drawn by `seed`, in text order: int64 [samples, length]. All windows if
    there are no more.

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
