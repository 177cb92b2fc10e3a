"""Texts and conversations out of files: .txt, .jsonl, .parquet. One at a time, whatever the file's size."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from cai_runtime.errors import CompressionError

TEXT_SUFFIXES = (".txt", ".text", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
PIECE_BYTES = 1 << 20  # a text file above this is cut at line ends into documents of about this size
BATCH_ROWS = 256  # rows of a parquet file that are in memory as Python objects at a time


@dataclass(frozen=True)
class Document:
    """A text, or a conversation: `messages`, dicts with "role" and "content". where: file and line or row, for errors."""

    where: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()

    @property
    def characters(self) -> int:
        """About how long it is; at least 1."""
        return max(1, len(self.text) + sum(len(str(message.get("content", ""))) for message in self.messages))


def find_files(source: str | Path) -> list[Path]:
    """The file itself, or every .txt, .text, .md, .jsonl and .parquet file below a directory, sorted, hidden ones left out.

    Raises CompressionError when there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
        found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not found:
            raise CompressionError(f"calibration directory {path} holds no {', '.join(SUFFIXES)} file")
        return found
    if not path.exists():
        raise CompressionError(
            f"calibration file {path} is not there; besides a file or directory, calibration text may be self, "
            "wikipedia, or hf:owner/name for a dataset of the Hugging Face hub"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise CompressionError(
            f"calibration file {path} ends in none of {', '.join(SUFFIXES)}: rename it to .txt if it is plain text"
        )
    return [path]


def read_documents(path: Path) -> Iterator[Document]:
    """Yield a file's documents in order, empty ones left out.

    .txt, .text, .md: the whole file is one document (above 1 MiB, several). .jsonl: each line an object with a string "text"
    or a list "messages". .parquet: a column "messages" or "text", or else the only column of strings.

    Raises CompressionError, naming the line or row: the file can't be read, is not UTF-8, not JSON, lacks such a field, or
    (for .parquet) pyarrow is not installed.
    """
    suffix = path.suffix.lower()
    reader = {".jsonl": _json_lines, ".parquet": _parquet_rows}.get(suffix, _text_pieces)
    try:
        for document in reader(path):
            if document.messages or document.text.strip():
                yield document
    except OSError as e:
        raise CompressionError(f"calibration file {path} can't be read: {e.strerror or e}") from e


def sample_documents(documents: Iterable[Document], characters: int, seed: int) -> list[Document]:
    """A uniform sample of the documents, drawn by `seed` in one pass, in their order: the smallest that has `characters`
    characters, or all of them. Memory: the sample and one document."""
    import heapq

    random = Random(seed)
    kept: list[tuple[float, int, Document]] = []  # a heap, the greatest key first
    total = 0
    for number, document in enumerate(documents):
        heapq.heappush(kept, (-random.random(), number, document))
        total += document.characters
        while total - kept[0][2].characters >= characters:
            total -= heapq.heappop(kept)[2].characters
    return [document for _, _, document in sorted(kept, key=lambda item: item[1])]


def total_characters(documents: Iterable[Document]) -> int:
    """Of all the documents together."""
    return sum(document.characters for document in documents)


def _text_pieces(path: Path) -> Iterator[Document]:
    line = 1
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            piece += file.readline() if len(piece) == PIECE_BYTES else b""
            yield Document(f"{path}, line {line}", text=_decode(piece, path, line))
            line += piece.count(b"\n")


def _json_lines(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            text = _decode(line, path, number)
            try:
                entry = json.loads(text)
            except (ValueError, RecursionError) as e:
                raise CompressionError(f"calibration file {where}: not JSON: {e}") from e
            if isinstance(entry, dict) and isinstance(entry.get("text"), str):
                yield _text_document(where, entry["text"])
            elif isinstance(entry, dict) and "messages" in entry:
                yield _chat_document(where, entry["messages"])
            else:
                raise CompressionError(
                    f'calibration file {where}: must be an object with a string "text" or a list "messages"'
                )


def _parquet_rows(path: Path) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise CompressionError(
            f"calibration file {path} needs pyarrow to be read: pip install 'cai-runtime[parquet]'"
        ) from e
    try:
        # Not buffered ahead: of a row group no more is held than is being decoded.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            column = _column(path, file.schema_arrow)
            row = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    where = f"{path}, row {row}"
                    if column == "messages":
                        yield _chat_document(where, value)
                    elif value is not None:
                        yield _text_document(where, value)
    except pa.ArrowException as e:
        raise CompressionError(f"calibration file {path} is not a parquet file that can be read: {e}") from e


def _column(path: Path, schema: Any) -> str:
    import pyarrow as pa

    strings = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    if "messages" in schema.names and not pa.types.is_string(schema.field("messages").type):
        return "messages"
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise CompressionError(
        f'calibration file {path} has no column "text" or "messages", and not one single column of strings; it has '
        f"{', '.join(schema.names) or 'none'}: rename the one to use"
    )


def _decode(content: bytes, path: Path, line: int) -> str:
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as e:
        line += content.count(b"\n", 0, e.start)
        raise CompressionError(f"calibration file {path}, line {line}: not UTF-8 text: {e.reason}") from e


def _text_document(where: str, text: str) -> Document:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise CompressionError(f"calibration file {where}: half a surrogate pair is no text: {e.reason}") from e
    return Document(where, text=text)


def _chat_document(where: str, messages: Any) -> Document:
    ok = isinstance(messages, list) and messages and all(isinstance(m, Mapping) for m in messages)
    if not ok or not all(isinstance(m.get("role"), str) and m.get("content") is not None for m in messages):
        raise CompressionError(
            f'calibration file {where}: "messages" must be a list of objects with a string "role" and a "content"'
        )
    # Parquet writes a field that some message has into all of them, as null; templates ask whether it is there.
    kept = tuple({k: v for k, v in m.items() if v is not None} for m in messages)
    _text_document(where, "".join(str(m["content"]) for m in kept))
    return Document(where, messages=kept)


def characters_for(tokens: int) -> int:
    """Characters that surely hold `tokens` tokens several times over, so that the windows can be drawn from all over a
    large file: 8 times as many tokens at 4 characters each, and at least 4 Mi."""
    return max(4 << 20, math.ceil(tokens * 8 * 4))


def whole_texts(source: str | Path) -> tuple[list[str], str]:
    """Every text of a file, or of a directory of files, and their number and place in words.

    Raises CompressionError: a file is malformed or missing, or holds a conversation, or there is no text.
    """
    documents = [document for file in find_files(source) for document in read_documents(file)]
    for document in documents:
        if document.messages:
            raise CompressionError(f"calibration file {document.where}: a conversation where a text is wanted")
    if not documents:
        raise CompressionError(f"calibration text {source} holds no text")
    count = "1 text" if len(documents) == 1 else f"{len(documents)} texts"
    return [document.text for document in documents], f"{Path(source).name}: {count}"
