"""The way of every request: check it, find and open its model, prepare its sequences, run them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from cai_runtime.api.errors import InternalServerError
from cai_runtime.api.generation import AsyncStream, Consumed, Stream, Submitted
from cai_runtime.api.host import ModelHost, ResolvedModel
from cai_runtime.api.models import require_text
from cai_runtime.api.open_model import OpenModel
from cai_runtime.api.timeouts import timed_out

Require = Callable[[ResolvedModel], None]
Submit = Callable[[Submitted[Any, Any], Any], Awaitable[Consumed[Any, Any]]]


class Endpoint(Protocol):
    """A module, or an object, that makes a reply's sequences of a call's keyword arguments."""

    def parse(self, params: Mapping[str, Any], /) -> Any:
        """The checked call, with `.model`, `.params` and `.stream`, before anything is loaded. Raises BadRequestError."""
        ...

    def prepare(self, request: Any, model: ResolvedModel, opened: OpenModel, /) -> Submitted[Any, Any]:
        """What to run for it. Raises BadRequestError."""
        ...


def create(
    endpoint: Endpoint,
    host: ModelHost,
    params: Mapping[str, Any],
    timeout: float | None,
    *,
    require: Require = require_text,
) -> Any:
    """The reply to a call of `create`, or its stream.

    Args:
        endpoint: parses and prepares the request: `api.chat`, `api.completions`, a ResponsesEndpoint.
        params: the keyword arguments as they came.
        timeout: seconds, of a request that names none.
        require: refuses a model that lacks the capability, before its weights are loaded.
    """
    request = endpoint.parse(params)
    seconds = _timeout_of(params, request, timeout)
    end = None if seconds is None else time.monotonic() + seconds
    model = host.resolve(request.model)
    require(model)
    opened = host.open(model, seconds)
    try:
        running = endpoint.prepare(request, model, opened).submit(opened.engine)
    except InternalServerError as error:
        if not (_has_ended(error, host) and host.discard(model, opened)):
            raise
        opened = host.open(model, _left(end))
        running = endpoint.prepare(request, model, opened).submit(opened.engine)
    running.timeout = seconds
    return Stream(running) if request.stream else running.whole(_left(end))


async def submit_at_once(generation: Submitted[Any, Any], engine: Any) -> Consumed[Any, Any]:
    """Hand a request to the engine. Raises RateLimitError if that takes no more."""
    return generation.submit(engine)


async def acreate(
    endpoint: Endpoint,
    host: ModelHost,
    params: Mapping[str, Any],
    timeout: float | None,
    submit: Submit = submit_at_once,
    *,
    require: Require = require_text,
) -> Any:
    """`create` without blocking the event loop.

    Args:
        submit: hands the prepared request to the engine, such as one that waits for a place there. Once it has submitted,
            it returns without a wait: a cancelled task would lose sight of what runs.
    """
    request = endpoint.parse(params)
    seconds = _timeout_of(params, request, timeout)
    model = host.resolve(request.model)
    require(model)
    try:
        async with asyncio.timeout(seconds):
            running = await _start(endpoint, host, request, model, submit)
            if not request.stream:
                return await running.awhole()
    except TimeoutError:  # errors of the library come as APIError
        raise timed_out(seconds) from None
    running.timeout = seconds
    return AsyncStream(running)


async def _start(
    endpoint: Endpoint, host: ModelHost, request: Any, model: ResolvedModel, submit: Submit
) -> Consumed[Any, Any]:
    opened = await host.aopen(model)
    generation = await asyncio.to_thread(endpoint.prepare, request, model, opened)
    try:
        # Not in a thread: a cancelled task would lose sight of what runs there.
        return await submit(generation, opened.engine)
    except InternalServerError as error:
        if not (_has_ended(error, host) and await asyncio.to_thread(host.discard, model, opened)):
            raise
    opened = await host.aopen(model)
    generation = await asyncio.to_thread(endpoint.prepare, request, model, opened)
    return await submit(generation, opened.engine)


def _has_ended(error: InternalServerError, host: ModelHost) -> bool:
    """Whether a request was refused because its engine has ended, unloaded since it was looked up or by an error of its
    own, so that opening the model again serves it."""
    return error.code == "engine_closed" and not host.closed


def _timeout_of(params: Mapping[str, Any], request: Any, default: float | None) -> float | None:
    """The request's own, else the client's. An explicit None is no limit, as in the `openai` client."""
    if "timeout" in request.params:
        return request.params["timeout"]
    return None if params.get("timeout", default) is None else default


def _left(end: float | None) -> float | None:
    return None if end is None else max(0.0, end - time.monotonic())
