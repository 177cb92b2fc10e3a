"""Answers one request of a batch: by its endpoint's own way, but waiting where the engine is full."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from cai_runtime.api import chat, completions, embeddings
from cai_runtime.api.batch.lines import BatchRequest, BatchResult, answered
from cai_runtime.api.errors import APIError, BadRequestError, RateLimitError, api_error
from cai_runtime.api.generation import Consumed, Submitted
from cai_runtime.api.host import ModelHost, ResolvedModel
from cai_runtime.api.open_model import OpenModel
from cai_runtime.api.responses import ResponsesEndpoint
from cai_runtime.api.responses.store import ResponseStore
from cai_runtime.api.serving import Endpoint, acreate

# By the url of a batch's line; called with the client's store of responses.
ENDPOINTS: dict[str, Callable[[ResponseStore], Endpoint]] = {
    "/v1/chat/completions": lambda store: chat,
    "/v1/completions": lambda store: completions,
    "/v1/responses": ResponsesEndpoint,
    "/v1/embeddings": lambda store: embeddings,
}

LOOK_AGAIN = 0.05  # seconds after which a full engine is asked again, whose seats may be taken by other callers


class BatchServer:
    """Answers the requests of one batch, from one event loop.

    Args:
        timeout: seconds, of requests that name none. It counts from the moment the request is handed over.
    """

    def __init__(self, host: ModelHost, store: ResponseStore, timeout: float | None):
        self._host = host
        self._timeout = timeout
        self._endpoints = {url: _Whole(make(store)) for url, make in ENDPOINTS.items()}
        self._turns: WeakKeyDictionary[Any, asyncio.Lock] = WeakKeyDictionary()  # by engine
        self._freed = asyncio.Event()

    async def __call__(self, request: BatchRequest) -> BatchResult:
        """The result of a request, an error's too. Raises APIError when the client is closed, since nothing can be
        answered any more."""
        try:
            reply = await acreate(
                self._endpoints[request.url], self._host, request.body, self._timeout, submit=self._submit
            )
            return answered(request, 200, reply.model_dump(mode="json"))
        except Exception as error:
            if self._host.closed:
                raise
            failure: APIError = api_error(error)
            return answered(request, failure.status_code, failure.body)
        finally:
            self._freed.set()

    async def _submit(self, generation: Submitted[Any, Any], engine: Any) -> Consumed[Any, Any]:
        """Hand a request to the engine. Where that takes no more, wait until it does, in order."""
        async with self._turns.setdefault(engine, asyncio.Lock()):
            while True:
                self._freed.clear()
                try:
                    return generation.submit(engine)
                except RateLimitError as error:
                    if error.code != "queue_full":
                        raise
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AGAIN):
                        await self._freed.wait()


class _Whole:
    """An endpoint whose replies can't be streamed."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint

    def parse(self, params: Mapping[str, Any], /) -> Any:
        request = self._endpoint.parse(params)
        if getattr(request, "stream", False):
            raise BadRequestError(
                "'stream' can't be used in a batch: each line of its output is a whole reply.",
                param="stream",
                code="unsupported_parameter",
            )
        return request

    def prepare(self, request: Any, model: ResolvedModel, opened: OpenModel, /) -> Submitted[Any, Any]:
        return self._endpoint.prepare(request, model, opened)
