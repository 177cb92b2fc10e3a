"""In-process inference for language models whose linear layers are stored as tensor-network factors.

    import cai_runtime
    client = cai_runtime.Client(model="path/to/checkpoint")
    client.chat.completions.create(messages=[{"role": "user", "content": "Why is the sky blue?"}])

Names load when they are first used: importing the package brings in neither torch nor transformers nor openai.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cai_runtime.integrations import registration

if TYPE_CHECKING:
    from cai_runtime.api.errors import (
        APIError,
        APIStatusError,
        AuthenticationError,
        BadRequestError,
        InternalServerError,
        NotFoundError,
        RateLimitError,
        UnprocessableEntityError,
    )
    from cai_runtime.client import AsyncClient, AsyncStream, Client, Stream
    from cai_runtime.compress import compress  # type: ignore[attr-defined]
    from cai_runtime.default import chat, close, complete, configure, models
    from cai_runtime.errors import CaiError

_HOME_OF = {
    "APIError": "cai_runtime.api.errors",
    "APIStatusError": "cai_runtime.api.errors",
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
    "close": "cai_runtime.default",
    "complete": "cai_runtime.default",
    "configure": "cai_runtime.default",
}

# Names that are a function and a package too. Python puts a package in its parent's place of that name once it is
# imported, so the package must be what is called.
_FUNCTION_OF = {
    "chat": "cai_runtime.default",
    "compress": "cai_runtime.compress",
    "models": "cai_runtime.default",
}

__all__ = [
    "APIError",
    "APIStatusError",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "BadRequestError",
    "CaiError",
    "Client",
    "InternalServerError",
    "NotFoundError",
    "RateLimitError",
    "Stream",
    "UnprocessableEntityError",
    "chat",
    "close",
    "complete",
    "compress",
    "configure",
    "models",
]


class _CallablePackage(ModuleType):
    """A package that is the function of its name when called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(_FUNCTION_OF[name]), name)(*args, **kwargs)


class _Package(ModuleType):
    """This package: makes the packages of `_FUNCTION_OF` callable as the import system puts them in place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FUNCTION_OF and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _FUNCTION_OF:
        return import_module(f"cai_runtime.{name}")
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'cai_runtime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
registration.install()  # transformers reads slim checkpoints from here on
