"""The catalogue: the models that the CompactifAI API lists, with the fields it lists them with (`catalog.json`).

Light to import: no torch, no transformers. The entries say what a model is; whether its weights are on this machine is
another matter (`cai_runtime.api.host`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Capabilities:
    """What a model can do. `support_chat_completion` has no s: it is the API's own name for it."""

    supports_audio: bool
    supports_image: bool
    supports_function_calling: bool
    support_chat_completion: bool
    supports_responses: bool


@dataclass(frozen=True)
class CatalogEntry:
    """One model. `created` in Unix seconds; `parameters_number` is a text such as "3.28B", or "unknown"."""

    id: str
    created: int
    owned_by: str
    parameters_number: str
    capabilities: Capabilities
    object: str = "model"


@cache
def catalog() -> dict[str, CatalogEntry]:
    """Every entry by its id, in the API's order."""
    listing = json.loads(Path(__file__).with_name("catalog.json").read_text("utf-8"))
    entries = [CatalogEntry(**{**e, "capabilities": Capabilities(**e["capabilities"])}) for e in listing["data"]]
    return {entry.id: entry for entry in entries}


def format_parameters(count: int) -> str:
    """A parameter count as the catalogue writes them: 135M, 3.28B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        # 999.6M would print as 1000M: from half a step below, the next unit writes it.
        if count >= size * 0.9995:
            digits = f"{count / size:.2f}" if count < 100 * size else f"{count / size:.0f}"
            return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + unit
    return str(count)
