"""In-process inference for language models whose linear layers are stored as tensor-network factors.

    import cai_runtime
    client = cai_runtime.Client(model="path/to/checkpoint")
    client.chat.completions.create(messages=[{"role": "user", "content": "Why is the sky blue?"}])

Names load when they are first used: importing the package brings in neither torch nor transformers nor openai.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cai_runtime.integrations import registration

if TYPE_CHECKING:
    from cai_runtime.api.errors import (
        APIConnectionError,
        APIError,
        APIStatusError,
        APITimeoutError,
        AuthenticationError,
        BadRequestError,
        InternalServerError,
        NotFoundError,
        RateLimitError,
        UnprocessableEntityError,
    )
    from cai_runtime.client import AsyncClient, AsyncStream, Client, Stream
    from cai_runtime.compressor.pipeline import compress
    from cai_runtime.errors import CaiError
    from cai_runtime.functions import batch, chat, close, complete, configure, embed, list_models, respond, transcribe
    from cai_runtime.judge.comparison import compare
    from cai_runtime.options import EngineOptions

_HOME_OF = {
    "APIConnectionError": "cai_runtime.api.errors",
    "APIError": "cai_runtime.api.errors",
    "APIStatusError": "cai_runtime.api.errors",
    "APITimeoutError": "cai_runtime.api.errors",
    "AuthenticationError": "cai_runtime.api.errors",
    "BadRequestError": "cai_runtime.api.errors",
    "InternalServerError": "cai_runtime.api.errors",
    "NotFoundError": "cai_runtime.api.errors",
    "RateLimitError": "cai_runtime.api.errors",
    "UnprocessableEntityError": "cai_runtime.api.errors",
    "AsyncClient": "cai_runtime.client",
    "AsyncStream": "cai_runtime.client",
    "Client": "cai_runtime.client",
    "Stream": "cai_runtime.client",
    "CaiError": "cai_runtime.errors",
    "EngineOptions": "cai_runtime.options",
    "batch": "cai_runtime.functions",
    "chat": "cai_runtime.functions",
    "close": "cai_runtime.functions",
    "compare": "cai_runtime.judge.comparison",
    "complete": "cai_runtime.functions",
    "compress": "cai_runtime.compressor.pipeline",
    "configure": "cai_runtime.functions",
    "embed": "cai_runtime.functions",
    "list_models": "cai_runtime.functions",
    "respond": "cai_runtime.functions",
    "transcribe": "cai_runtime.functions",
}

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "BadRequestError",
    "CaiError",
    "Client",
    "EngineOptions",
    "InternalServerError",
    "NotFoundError",
    "RateLimitError",
    "Stream",
    "UnprocessableEntityError",
    "batch",
    "chat",
    "close",
    "compare",
    "complete",
    "compress",
    "configure",
    "embed",
    "list_models",
    "respond",
    "transcribe",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'cai_runtime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.install()  # transformers reads slim checkpoints from here on
