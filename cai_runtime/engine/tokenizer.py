"""A checkpoint's tokenizer, by transformers, with the class that its files ask for."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from cai_runtime.errors import InvalidConfigError, MissingFileError

# Classes that are nothing but the pipeline of tokenizer.json.
_GENERIC = frozenset({"TokenizersBackend", "PreTrainedTokenizer"})
# Classes that build a pipeline of their own from the vocabulary, whatever tokenizer.json says. For byte-level files it
# is the wrong one, in some versions of transformers: LlamaTokenizer drops every space.
_OWN_PIPELINE = frozenset(
    {
        "LlamaTokenizer",
        "CodeLlamaTokenizer",
        "GemmaTokenizer",
        "GPT2Tokenizer",
        "GPTNeoXTokenizer",
        "Qwen2Tokenizer",
        "WhisperTokenizer",
    }
)


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer, without running code of the checkpoint's.

    Raises:
        MissingFileError: the directory has none.
        InvalidConfigError: its files can't be read.
    """
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise MissingFileError("the checkpoint has no tokenizer (tokenizer.json)", file=path)
    try:
        return tokenizer_class(path).from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as e:  # transformers raises whatever its code stumbles over in a damaged file
        raise InvalidConfigError(f"the tokenizer can't be read: {e}", file=path) from e


def tokenizer_class(path: Path) -> Any:
    """The class to load a checkpoint's tokenizer with, the same in every version of transformers.

    The generic class, which runs the pipeline of tokenizer.json as it is, where tokenizer_config.json names it, or names
    a class that would put a pipeline of its own in place of a byte-level one. Else AutoTokenizer, which imports modelling
    code on its way: that takes longer than everything else at opening a small model.
    """
    declared = str(_read_json(path / "tokenizer_config.json").get("tokenizer_class") or "").removesuffix("Fast")
    if (path / "tokenizer.json").exists() and (
        declared in _GENERIC or (declared in _OWN_PIPELINE and _is_byte_level(_read_json(path / "tokenizer.json")))
    ):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _is_byte_level(stored: dict[str, Any]) -> bool:
    """Whether a tokenizer.json splits or joins text as bytes in GPT-2's alphabet."""
    parts = [stored.get("pre_tokenizer"), stored.get("decoder")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if part.get("type") == "ByteLevel":
                return True
            parts += [*(part.get("pretokenizers") or ()), *(part.get("decoders") or ())]
    return False


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none. Whoever loads the file reports what is wrong with it."""
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(stored, dict):
            return stored
    return {}
