"""The API's errors: those of the `openai` package, each with a status code and the JSON body a server would send.

Every class here is a subclass of the `openai` package's class of the same name and of `cai_runtime.CaiError`, so that
`except openai.APIError` of a program written for that client catches what this one raises. Importing this module imports
`openai`; `cai_runtime.errors` is the light one.

Everything below the API raises its own typed errors (`cai_runtime.errors`); `api_error` maps them, and the original
stays as `__cause__`.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import CodeType, ModuleType
from typing import Any, ClassVar, Literal

import openai

from cai_runtime import errors as library
from cai_runtime.scalars import printable

URL = "http://localhost/cai_runtime"  # of `.request`, which a handler may log; nothing is ever sent


class APIError(library.CaiError, openai.APIError):
    """Base of what the API raises.

    Attributes:
        status_code: the HTTP status a server would answer with.
        message: what is wrong and what to do. Always printable.
        type: the error's family, such as `invalid_request_error`.
        param: the parameter at fault, such as `temperature` or `messages[0].content`; None if it is none.
        code: a word for programs, such as `context_length_exceeded`; None if there is none.
        body: `{"error": {"message", "type", "param", "code"}}`.
        request, response: the HTTP library's objects that a server's answer would have; made when asked for.
        request_id: None; there is no server that gives one.
    """

    status_code: int = 500
    default_type: ClassVar[str] = "api_error"
    type: str
    request: Any
    response: Any
    body: Any
    request_id: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, type: str | None = None):
        # Not openai's __init__: it wants a response of the HTTP library, which most handlers never look at.
        self.message = _cut(printable(message), 4000)
        Exception.__init__(self, self.message)
        self.type = type or self.default_type
        self.param = None if param is None else _cut(printable(param), 200)
        self.code = code
        self.body = {
            "error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code},
        }

    def __getattr__(self, name: str) -> Any:
        if name == "request":
            value = _http().Request("POST", URL)
        elif name == "response":
            value = _http().Response(self.status_code, json=self.body, request=self.request)
        else:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        setattr(self, name, value)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by their args alone; a batch job hands errors from one process to another.
        return _rebuild, (type(self), self.message, self.param, self.code, self.type)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _rebuild(cls: type[APIError], message: str, param: str | None, code: str | None, type: str | None) -> APIError:
    return cls(message, param=param, code=code, type=type)


def _http() -> ModuleType:
    """The HTTP library that this version of `openai` is built on: httpx, or its successor."""
    (name,) = (
        base.__module__.partition(".")[0] for base in openai.DefaultHttpxClient.__mro__ if base.__name__ == "Client"
    )
    return import_module(name)


class APIConnectionError(APIError, openai.APIConnectionError):
    """Base of APITimeoutError, as in the `openai` package. There is no connection here that could fail."""


class APITimeoutError(APIConnectionError, openai.APITimeoutError):
    """408: the request took longer than its `timeout`. It was aborted and its memory freed."""

    status_code = 408
    default_type = "timeout_error"


class APIStatusError(APIError, openai.APIStatusError):
    """Base of the errors that a server would answer with."""


class BadRequestError(APIStatusError, openai.BadRequestError):  # type: ignore[misc]
    """400: the request itself is wrong; the same request will fail again."""

    status_code: Literal[400] = 400
    default_type = "invalid_request_error"


class AuthenticationError(APIStatusError, openai.AuthenticationError):  # type: ignore[misc]
    """401. There is nothing to authenticate in-process: no call raises it; it is here for handlers that name it."""

    status_code: Literal[401] = 401
    default_type = "authentication_error"


class NotFoundError(APIStatusError, openai.NotFoundError):  # type: ignore[misc]
    """404: no such model, or its weights are not on this machine."""

    status_code: Literal[404] = 404
    default_type = "invalid_request_error"


class UnprocessableEntityError(APIStatusError, openai.UnprocessableEntityError):  # type: ignore[misc]
    """422: the request is well formed, but the checkpoint it names can't be used."""

    status_code: Literal[422] = 422
    default_type = "invalid_request_error"


class RateLimitError(APIStatusError, openai.RateLimitError):  # type: ignore[misc]
    """429: more requests wait than the engine was told to accept. Try again later."""

    status_code: Literal[429] = 429
    default_type = "rate_limit_error"


class InternalServerError(APIStatusError, openai.InternalServerError):
    """500: the request was right, and the engine could not serve it."""

    status_code = 500
    default_type = "server_error"


def invalid(param: str, problem: str, code: str = "invalid_value") -> BadRequestError:
    """problem: what follows the parameter's name, such as "must be a list"."""
    return BadRequestError(f"Invalid '{param}': {problem}.", param=param, code=code)


def missing(param: str) -> BadRequestError:
    return BadRequestError(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def unknown(param: str, hint: str = "") -> BadRequestError:
    return BadRequestError(f"Unknown parameter: '{param}'.{hint}", param=param, code="unknown_parameter")


def api_error(error: BaseException) -> APIError:
    """The API error for `error`; an APIError is returned as it is."""
    message = str(error) or type(error).__name__
    match error:
        case APIError():
            return error
        case library.ConversationError():
            return BadRequestError(message, param=error.param, code=error.code)
        case library.AudioPackageError():
            return BadRequestError(message, param=error.param, code="missing_package")
        case library.AudioError():
            return BadRequestError(message, param=error.param, code="invalid_audio")
        case library.TranscriptionError():
            return BadRequestError(message, param=error.param, code=_code_of_capability(error.capability))
        case library.RequestTooLargeError():
            return BadRequestError(message, code="context_length_exceeded")
        case library.GrammarError():
            return BadRequestError(message, param=error.param, code="invalid_grammar")
        case library.InvalidRequestError():
            return BadRequestError(message, code="invalid_value")
        case library.QueueFullError():
            return RateLimitError(message, code="queue_full")
        case library.SourceError():
            return NotFoundError(message, param="model", code="model_not_found")
        case library.CheckpointError():
            return UnprocessableEntityError(message, param="model", code="invalid_checkpoint")
        case library.UnsupportedModelError():
            return UnprocessableEntityError(message, param="model", code="unsupported_model")
        case library.MemoryBudgetError():
            return InternalServerError(message, code="insufficient_memory")
        case library.EngineClosedError():
            return InternalServerError(message, code="engine_closed")
        case library.RequestAbortedError():
            return InternalServerError(message, code="request_aborted")
        case library.CaiError():
            return InternalServerError(message)
        case _:
            return InternalServerError(f"{type(error).__name__}: {message}")


def _code_of_capability(capability: str | None) -> str:
    return f"{capability}_not_supported" if capability else "invalid_value"


@contextmanager
def as_api_errors(kind: type[Exception] = Exception) -> Iterator[None]:
    """Raise what the block raises as an APIError, the original as its `__cause__`.

    kind: of the exceptions that are meant; others pass. So does, of any kind, what a handler of a signal raises while the
    block runs, such as the time limit of a task queue or of a test: its program waits for that very exception.
    """
    try:
        yield
    except APIError:
        raise
    except kind as error:
        if _is_of_signal_handler(error):
            raise
        raise api_error(error) from error


def _is_of_signal_handler(error: BaseException) -> bool:
    """Whether the function that is installed for some signal raised it, or called what did."""
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread alone
        return False
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    frames = traceback.walk_tb(error.__traceback__)
    return bool(handlers) and any(frame.f_code in handlers for frame, _ in frames)


def _code_of(handler: Any) -> CodeType | None:
    """Of a function, a bound method, a partial of one, or an object that can be called."""
    while isinstance(handler, partial):
        handler = handler.func
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = getattr(handler, "__func__", None) or type(handler).__call__
    return getattr(handler, "__code__", None)
