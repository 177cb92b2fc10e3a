"""How a checkpoint makes embeddings, by the files of the sentence-transformers package. Light to import.

modules.json names the steps: Transformer, Pooling, Normalize. The pooling step's own config.json names the kind of pooling.
config_sentence_transformers.json may have prompts, texts that go before the input for some use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cai_runtime.errors import InvalidConfigError, UnsupportedModelError
from cai_runtime.scalars import as_integer, shown
from cai_runtime.slim.files import read_json, refuse_pointer

MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
TEXT_FILE = "sentence_bert_config.json"
_POOLINGS: dict[str, Literal["mean", "last"]] = {"mean": "mean", "lasttoken": "last"}
_FLAGS = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "mean_sqrt_len_tokens": "mean_sqrt_len",
          "weightedmean_tokens": "weightedmean", "lasttoken": "lasttoken"}  # fmt: skip


@dataclass(frozen=True)
class EmbeddingFiles:
    """What a checkpoint says of its embeddings.

    pooling: over a text's hidden states. normalize: to length 1. prompts: text by name. pools_prompt: whether a prompt's
    tokens are pooled, too. dimensions: to which a vector may be cut; None: the files don't say.
    """

    pooling: Literal["mean", "last"]
    normalize: bool
    prompts: Mapping[str, str] = field(default_factory=dict)
    pools_prompt: bool = True
    dimensions: tuple[int, ...] | None = None

    @classmethod
    def read(cls, path: Path) -> EmbeddingFiles | None:
        """Of a checkpoint directory; None if it has no modules.json, so that nothing says how to pool.

        Raises:
            CheckpointError: a file is missing or malformed.
            UnsupportedModelError: the steps or the pooling are others than the engine has.
        """
        if not (path / MODULES_FILE).is_file():
            return None
        kinds = _steps(path)
        if [kind for kind, _ in kinds] not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise UnsupportedModelError(
                f"{MODULES_FILE} has the steps {', '.join(kind for kind, _ in kinds)}: supported are Transformer, Pooling "
                "and, optionally, Normalize"
            )
        (_, transformer), (_, pooling) = kinds[:2]
        if transformer not in ("", "."):
            raise UnsupportedModelError(
                f"{MODULES_FILE} has the transformer in {shown(transformer)}: supported is the checkpoint directory itself"
            )
        config = read_json(path / TEXT_FILE) if (path / TEXT_FILE).is_file() else {}
        if config.get("do_lower_case"):
            raise UnsupportedModelError(
                f"{TEXT_FILE} asks for texts in lower case (do_lower_case), which is not supported"
            )
        model = read_json(path / "config.json")
        for key, value in (("is_causal", False), ("use_bidirectional_attention", True)):
            if model.get(key) is value:
                raise UnsupportedModelError(
                    f"config.json asks for attention in both directions ({key}), which is not here"
                )
        settings = read_json(path / pooling / "config.json")
        return cls(
            _pooling(settings),
            normalize=len(kinds) == 3,
            prompts=_prompts(path),
            pools_prompt=settings.get("include_prompt") is not False,
            dimensions=_dimensions(model),
        )


def _steps(path: Path) -> list[tuple[str, str]]:
    """(the class's name, its folder) of each step."""
    file = path / MODULES_FILE
    raw = file.read_bytes()
    refuse_pointer(raw, file)
    try:
        steps = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidConfigError(f"is not valid JSON: {error}", file=file) from None
    found = []
    for step in steps if isinstance(steps, list) else [None]:
        kind, folder = (step.get("type"), step.get("path")) if isinstance(step, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(folder, str) or Path(folder).is_absolute() or ".." in folder:
            raise InvalidConfigError(
                "must hold a list of objects with 'type' and 'path', a folder of this one", file=file
            )
        found.append((kind.rpartition(".")[2], folder))
    return found


def _pooling(settings: Mapping[str, Any]) -> Literal["mean", "last"]:
    on = [name for key, name in _FLAGS.items() if settings.get(f"pooling_mode_{key}")]
    if isinstance(mode := settings.get("pooling_mode"), str):  # newer versions name one
        on = [mode]
    if len(on) != 1 or on[0] not in _POOLINGS:
        raise UnsupportedModelError(
            f"the pooling of its files is {' and '.join(on) or 'none'}: a causal model's can be mean or lasttoken"
        )
    return _POOLINGS[on[0]]


def _prompts(path: Path) -> dict[str, str]:
    file = path / PROMPTS_FILE
    prompts = (read_json(file).get("prompts") or {}) if file.is_file() else {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise InvalidConfigError(f"prompts must map names to texts, is {shown(prompts)}", file=file)
    return prompts


def _dimensions(model: Mapping[str, Any]) -> tuple[int, ...] | None:
    """By the keys of config.json that vLLM reads, too."""
    if model.get("is_matryoshka") is False:
        return ()
    given = model.get("matryoshka_dimensions")
    if given is None:
        return None
    sizes = [as_integer(size) for size in given] if isinstance(given, list) else [None]
    if any(size is None or size < 1 for size in sizes):
        raise InvalidConfigError(
            f"matryoshka_dimensions must be a list of sizes, is {shown(given)}", file="config.json"
        )
    return tuple(sorted(size for size in sizes if size is not None))
