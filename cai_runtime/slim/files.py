"""The text files of a checkpoint directory, and what they are when a copy or an editor went wrong.

JSON is read in any encoding of Unicode, and in Latin-1: what config.json and an index mean lies in ASCII. Files that
transformers reads (tokenizer, templates) must be what it takes, which is UTF-8 without a byte order mark.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from cai_runtime.errors import CorruptFileError, InvalidConfigError, MissingFileError

_LFS = b"version https://git-lfs.github.com/spec/"
# What transformers reads of a model besides its weights and config.json. Other files are nobody's business here.
_TEXT = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "normalizer.json", "chat_template.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_OURS = "generation_config.json"  # in any encoding, see `read_json`
_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig",
}  # fmt: skip
_SMALL = 1 << 20  # bytes; larger files are not read to see whether they are UTF-8


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object, in UTF-8, in UTF-16 or UTF-32 with a byte order mark, or in Latin-1.

    Raises:
        MissingFileError: it is not there or can't be read.
        CorruptFileError: it is a Git LFS pointer.
        InvalidConfigError: it is not a JSON object.
    """
    try:
        raw = file.read_bytes()
    except OSError as e:
        raise MissingFileError(f"can't be read: {e.strerror or e}", file=file) from None
    refuse_pointer(raw, file)
    try:
        value = json.loads(_decoded(raw))
    except (ValueError, RecursionError) as e:
        raise InvalidConfigError(f"is not valid JSON: {e}", file=file) from None
    if not isinstance(value, dict):
        raise InvalidConfigError("must hold a JSON object", file=file)
    return value


def _decoded(raw: bytes) -> str:
    for mark, encoding in _MARKS.items():
        if raw.startswith(mark):
            return raw.decode(encoding)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        # Names of tensors, files and classes that this misreads are then missed by name.
        return raw.decode("latin-1")


def refuse_pointer(start: bytes, file: Path) -> None:
    """Raises CorruptFileError where a file that begins so is a Git LFS pointer."""
    if start.startswith(_LFS):
        raise CorruptFileError(
            "is a Git LFS pointer and not the file that it stands for: run `git lfs install` and `git lfs pull` in the "
            "clone, or fetch the model with `cai pull hf://...`",
            file=file,
        )


def check_text_files(directory: Path) -> None:
    """Check the encoding of a checkpoint's text files that other libraries read: the tokenizer's, and templates.

    Raises CorruptFileError for a Git LFS pointer, InvalidConfigError for another encoding than UTF-8 or a byte order mark.
    """
    for file in sorted(directory.iterdir()):
        if not (file.name in (*_TEXT, _OURS) or file.suffix in (".jinja", ".model")) or not file.is_file():
            continue
        try:
            with file.open("rb") as f:
                raw = f.read(_SMALL)
        except OSError as e:
            raise MissingFileError(f"can't be read: {e.strerror or e}", file=file) from None
        refuse_pointer(raw, file)
        if file.suffix == ".model" or file.name == _OURS:
            continue
        remedy = "save it as UTF-8 without a byte order mark, or fetch it again"
        for mark, encoding in _MARKS.items():
            if raw.startswith(mark):
                what = "UTF-8 with a byte order mark" if encoding == "utf-8-sig" else encoding.upper()
                raise InvalidConfigError(f"is {what}: {remedy}", file=file)
        if len(raw) < _SMALL:
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as e:
                raise InvalidConfigError(f"is not UTF-8 (byte {e.start}): {remedy}", file=file) from None
