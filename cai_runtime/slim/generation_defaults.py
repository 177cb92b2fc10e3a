"""The sampling parameters that a checkpoint's generation_config.json recommends. Light to import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cai_runtime.errors import InvalidConfigError
from cai_runtime.scalars import as_bool, as_integer, as_number, shown

FILE = "generation_config.json"
REMEDY = 'mend the file, or ignore its sampling parameters with generation_config="none"'


@dataclass(frozen=True)
class GenerationDefaults:
    """What is used where a request names no value of its own.

    Without a file, or without the key in it, OpenAI's defaults hold: temperature 1, and everything else off. An explicit
    `"do_sample": false` means greedy decoding, as in transformers: temperature 0, and the keys that shape sampling are
    not used. A missing `do_sample` says nothing: many checkpoints that are meant to be sampled from lack it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def read(cls, path: Path) -> GenerationDefaults:
        """Of a checkpoint directory. Raises InvalidConfigError, naming the key, for a value that can't be used."""
        file = path / FILE
        try:
            config = json.loads(file.read_bytes().decode("utf-8-sig"))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidConfigError(f"can't be read as JSON ({error}): {REMEDY}", file=file) from error
        if not isinstance(config, Mapping):
            raise InvalidConfigError(f"must hold a JSON object: {REMEDY}", file=file)
        found = {name: value for name in _RANGES if (value := config.get(name)) is not None}
        for name, value in found.items():
            check, least, most = _RANGES[name]
            number = check(value)
            if number is None or not least <= number <= most:
                raise InvalidConfigError(
                    f"{name} must be from {least} to {most}, is {shown(value)}: {REMEDY}", file=file
                )
            found[name] = number
        if as_bool(config.get("do_sample")) is False:
            found = {"temperature": 0, **{k: v for k, v in found.items() if k == "repetition_penalty"}}
        if found.get("top_k") == -1:
            found["top_k"] = 0
        if found.get("top_p") == 0:
            found["top_p"] = 1
        values: dict[str, Any] = {
            name: int(value) if name == "top_k" else float(value) for name, value in found.items()
        }
        return cls(**values)

    def given(self) -> dict[str, Any]:
        """Those that differ from OpenAI's, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


PENALTY_MIN, PENALTY_MAX = 1e-6, 1e6  # of repetition_penalty: logits times or over it stay finite in fp32
_RANGES: dict[str, tuple[Any, float, float]] = {
    "temperature": (as_number, 0, 2),
    "top_k": (as_integer, -1, 2**31 - 1),
    "top_p": (as_number, 0, 1),
    "min_p": (as_number, 0, 1),
    "repetition_penalty": (as_number, PENALTY_MIN, PENALTY_MAX),
}
