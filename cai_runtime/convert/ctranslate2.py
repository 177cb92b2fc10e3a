"""CTranslate2 model directories to Hugging Face directories: weights, config, generation config, processor, tokenizer.

Whisper so far, see `ctranslate2_whisper`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cai_runtime.convert.cache import tqdm_disable
from cai_runtime.convert.ctranslate2_file import CTranslate2File
from cai_runtime.convert.ctranslate2_whisper import REVISIONS, SPEC, Weight, Whisper
from cai_runtime.convert.safetensors_stream import DTYPES, Declared, encode, write_shards
from cai_runtime.errors import ConversionError

MODEL_FILE = "model.bin"
TOKENIZER_FILE = "tokenizer.json"
PROCESSOR_FILE = "preprocessor_config.json"


def ctranslate2_to_hf(
    source: str | Path, out_dir: str | Path, *, dtype: str = "auto", progress: bool | None = None
) -> Path:
    """Convert a CTranslate2 model to a model directory in Hugging Face layout; returns `out_dir`.

    `source`: the directory with model.bin, config.json, tokenizer.json and vocabulary.txt or .json. `dtype`: "float32",
    "float16", "bfloat16" for the written weights, or "auto": the stored dtype when every variable has the same 16-bit
    one, else float32 (an 8-bit code over its scale is not exact in 16 bits). Nothing is rounded with "auto". `out_dir`
    must not exist or be empty; it appears whole or not at all. Memory: one variable in fp32, and the vocabulary.
    `progress`: a bar on stderr, None on a terminal only.

    Raises ConversionError naming the file and the part: not CTranslate2's, truncated, damaged, another model than
    Whisper, or a part of it that the layout can't express.
    """
    directory, out = Path(source), Path(out_dir)
    if dtype != "auto" and dtype not in DTYPES:
        raise ConversionError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(f"{out} already exists and is not an empty directory")
    partial = out.with_name(f".{out.name}.converting")
    with CTranslate2File(directory / MODEL_FILE) as file:
        if file.spec != SPEC or file.revision not in REVISIONS:
            raise ConversionError(
                f"{file.path}: {file.spec} of revision {file.revision} is not converted; known: {SPEC} of revision "
                f"{', '.join(map(str, REVISIONS))}"
            )
        dtype = _dtype_of(file) if dtype == "auto" else dtype
        model = Whisper(file, _json(directory / "config.json"), read_vocabulary(directory))
        processor = directory / PROCESSOR_FILE
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_weights(file, model, partial, dtype, progress)
            _write_tokenizer(directory / TOKENIZER_FILE, model, partial)
            written: dict[str, Any] = {
                "config.json": model.config(dtype),
                "generation_config.json": model.generation_config(),
                PROCESSOR_FILE: _json(processor) if processor.exists() else model.preprocessor_config(),
            }
            for name, content in written.items():
                (partial / name).write_text(json.dumps(content, indent=2) + "\n")
            if out.is_dir():
                out.rmdir()
            partial.rename(out)
        except OSError as e:
            raise ConversionError(f"{directory}: can't write {out}: {e}") from e
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def read_vocabulary(directory: Path) -> list[str]:
    """The tokens in the order of their ids, from vocabulary.json (a list) or vocabulary.txt (a line each).

    Raises ConversionError when neither is there or can be read.
    """
    for name in ("vocabulary.json", "vocabulary.txt"):
        path = directory / name
        if not path.is_file():
            continue
        if path.suffix == ".json":
            tokens = _json(path, of=list)
        else:
            try:
                tokens = path.read_bytes().decode().removesuffix("\n").split("\n")
            except (OSError, UnicodeDecodeError) as e:
                raise ConversionError(f"{path}: can't be read: {e}") from e
        if not tokens or not all(isinstance(token, str) for token in tokens):
            raise ConversionError(f"{path} is not a list of tokens")
        return tokens
    raise ConversionError(f"{directory} has neither vocabulary.json nor vocabulary.txt")


def _json(path: Path, of: type = dict) -> Any:
    try:
        found = json.loads(path.read_bytes())
    except OSError as e:
        raise ConversionError(f"{path}: can't be read: {e.strerror or e}") from e
    except ValueError as e:
        raise ConversionError(f"{path} is not JSON: {e}") from e
    if not isinstance(found, of):
        raise ConversionError(f"{path} is not a JSON {'object' if of is dict else 'list'}")
    return found


def _dtype_of(file: CTranslate2File) -> str:
    kinds = {v.type_name for v in file.variables.values() if v.shape}
    return kinds.pop() if kinds in ({"float16"}, {"bfloat16"}) else "float32"


def _write_weights(file: CTranslate2File, model: Whisper, directory: Path, dtype: str, progress: bool | None) -> None:
    from tqdm import tqdm

    weights = model.weights()
    total = sum(file.variable(w.variable).nbytes // w.parts for w in weights)
    with tqdm(
        desc=f"convert {file.path.name}", total=total, unit="B", unit_scale=True, disable=tqdm_disable(progress)
    ) as bar:

        def chunks(weight: Weight) -> Iterator[np.ndarray]:
            encoded = encode(weight.of(file.array(weight.variable)), dtype)
            if dtype == "float16" and not np.isfinite(encoded).all():
                raise ConversionError(f"{file.path}: {weight.variable} overflows float16; convert to bfloat16")
            yield encoded
            bar.update(file.variable(weight.variable).nbytes // weight.parts)

        write_shards(directory, ((Declared(w.name, w.shape, dtype), chunks(w)) for w in weights))


def _write_tokenizer(source: Path, model: Whisper, directory: Path) -> None:
    """tokenizer.json with the vocabulary's times added, which many copies lack, and how transformers is to open it."""
    tokenizer = _json(source)
    try:
        known = {str(token): int(at) for token, at in tokenizer["model"]["vocab"].items()}
        known |= {str(entry["content"]): int(entry["id"]) for entry in tokenizer["added_tokens"]}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ConversionError(f"{source} is not a tokenizer with a vocabulary: {e!r}") from e
    for token, at in known.items():
        if not 0 <= at < len(model.vocabulary) or model.vocabulary[at] != token:
            raise ConversionError(f"{source}: token {at} is {token!r}, not the vocabulary's")
    times = model.vocabulary[model.first_timestamp :]
    if missing := sorted(set(model.vocabulary) - set(known) - set(times)):
        raise ConversionError(f"{source} lacks {len(missing)} tokens of the vocabulary, the first is {missing[0]!r}")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    tokenizer["added_tokens"] += [
        {"id": at, "content": token, **flags}
        for at, token in enumerate(times, model.first_timestamp)
        if token not in known
    ]
    (directory / TOKENIZER_FILE).write_text(
        json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(model.tokenizer_config(), indent=2) + "\n")
