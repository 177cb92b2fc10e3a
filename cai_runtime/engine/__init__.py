"""Continuous batching, streaming and sampling over a paged KV cache. See `docs/architecture.md`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alignment import Alignment
    from .beam_search import BeamSearch
    from .engine import Engine
    from .handle import Handle
    from .output import TokenOutput
    from .request import Delta, Finished, Request, SamplingParams
    from .stats import EngineStats

__all__ = [
    "Alignment", "BeamSearch", "Delta", "Engine", "EngineStats", "Finished", "Handle", "Request", "SamplingParams",
    "TokenOutput",
]  # fmt: skip

_MODULES = {
    "Alignment": "alignment",
    "BeamSearch": "beam_search",
    "Delta": "request",
    "Engine": "engine",
    "EngineStats": "stats",
    "Finished": "request",
    "Handle": "handle",
    "Request": "request",
    "SamplingParams": "request",
    "TokenOutput": "output",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
