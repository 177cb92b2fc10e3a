"""Checks before a benchmark runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cai_runtime.errors import BenchmarkError

SAME = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class Peers:
    """The measured model in the formats of other engines: a GGUF file for llama.cpp, a dense directory for transformers."""

    gguf: Path
    dense: Path


def check_at_least(minimum: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < minimum:
            raise BenchmarkError(f"{name} is {count}; it must be at least {minimum}")


def check_peers(config: dict[str, Any], peers: Peers) -> None:
    """Raise BenchmarkError unless the peers are installed and have the same architecture as `config`."""
    if find_spec("xllamacpp") is None:
        raise BenchmarkError("llama.cpp is not installed: pip install 'cai-runtime[peers]'")
    check_same_model(config, peers.dense)


def check_same_model(config: dict[str, Any], dense: Path) -> None:
    """Raise BenchmarkError unless the directory's model has the same architecture as `config`."""
    from cai_runtime.slim.reader import read_json

    other = read_json(dense / "config.json")
    for key in SAME:
        if config.get(key) != other.get(key):
            raise BenchmarkError(
                f"the peers' model is another one: {key} is {other.get(key)} in {dense} and {config.get(key)} in "
                "the checkpoint; name its source with --peers-model"
            )
