"""The API's errors: named as in the `openai` package, each with a status code and the JSON body a server would send.

Light to import. Everything below the API raises its own typed errors (`cai_runtime.errors`); `api_error` maps them, and
the original stays as `__cause__`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from cai_runtime import errors as library


class APIError(library.CaiError):
    """Base of what the API raises.

    Attributes:
        status_code: the HTTP status a server would answer with.
        message: what is wrong and what to do.
        type: the error's family, such as `invalid_request_error`.
        param: the parameter at fault, such as `temperature` or `messages[0].content`; None if it is none.
        code: a word for programs, such as `context_length_exceeded`; None if there is none.
        body: `{"error": {"message", "type", "param", "code"}}`.
    """

    status_code: ClassVar[int] = 500
    default_type: ClassVar[str] = "api_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, type: str | None = None):
        super().__init__(message)
        self.message = message
        self.type = type or self.default_type
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by their args alone; a batch job hands errors from one process to another.
        return _rebuild, (type(self), self.message, self.param, self.code, self.type)


def _rebuild(cls: type[APIError], message: str, param: str | None, code: str | None, type: str | None) -> APIError:
    return cls(message, param=param, code=code, type=type)


class APIStatusError(APIError):
    """Base of the errors that have a status code: here, all of them."""


class BadRequestError(APIStatusError):
    """400: the request itself is wrong; the same request will fail again."""

    status_code = 400
    default_type = "invalid_request_error"


class AuthenticationError(APIStatusError):
    """401. There is nothing to authenticate in-process: no call raises it; it is here for handlers that name it."""

    status_code = 401
    default_type = "authentication_error"


class NotFoundError(APIStatusError):
    """404: no such model, or its weights are not on this machine."""

    status_code = 404
    default_type = "invalid_request_error"


class UnprocessableEntityError(APIStatusError):
    """422: the request is well formed, but the checkpoint it names can't be used."""

    status_code = 422
    default_type = "invalid_request_error"


class RateLimitError(APIStatusError):
    """429: more requests wait than the engine was told to accept. Try again later."""

    status_code = 429
    default_type = "rate_limit_error"


class InternalServerError(APIStatusError):
    """500: the request was right, and the engine could not serve it."""

    status_code = 500
    default_type = "server_error"


def api_error(error: BaseException) -> APIError:
    """The API error for `error`; an APIError is returned as it is."""
    message = str(error) or type(error).__name__
    match error:
        case APIError():
            return error
        case library.ConversationError():
            code = f"{error.capability}_not_supported" if error.capability else "invalid_value"
            return BadRequestError(message, param=error.param, code=code)
        case library.RequestTooLargeError():
            return BadRequestError(message, code="context_length_exceeded")
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


@contextmanager
def as_api_errors() -> Iterator[None]:
    """Raise whatever the block raises as an APIError, the original as its `__cause__`."""
    try:
        yield
    except APIError:
        raise
    except Exception as error:
        raise api_error(error) from error
