"""`client.completions` and its twin for asyncio."""

from __future__ import annotations

from typing import Any, Literal, overload

from openai.types import Completion
from typing_extensions import Unpack

from cai_runtime.api import completions as endpoint
from cai_runtime.api.completions import CompletionChunk, CompletionParams
from cai_runtime.api.generation import AsyncStream, Stream
from cai_runtime.api.methods.endpoint import Methods
from cai_runtime.api.serving import acreate, create


class Completions(Methods):
    """`client.completions`."""

    @overload
    def create(self, *, stream: Literal[True], **params: Unpack[CompletionParams]) -> Stream[CompletionChunk]: ...
    @overload
    def create(self, *, stream: Literal[False] | None = None, **params: Unpack[CompletionParams]) -> Completion: ...
    @overload
    def create(
        self, *, stream: bool | None, **params: Unpack[CompletionParams]
    ) -> Completion | Stream[CompletionChunk]: ...
    def create(self, **params: Any) -> Any:
        """Continue a text. The parameters are those of CompletionParams and `stream`.

        `top_p=0` means "not given", as in the CompactifAI API, and not "nearly greedy": that is `temperature=0`.

        Returns:
            Completion; with `stream=True` a Stream of its pieces.

        Raises:
            APIError: see `cai_runtime.api.errors`; while streaming, the stream may raise it too. APITimeoutError after
                `timeout` seconds: of a whole reply from the call to its end, of a stream to each next chunk. The request
                is then aborted; a model that was loading goes on loading.
        """
        return create(endpoint, self._host, params, self._timeout)


class AsyncCompletions(Methods):
    """`client.completions` of an AsyncClient."""

    @overload
    async def create(
        self, *, stream: Literal[True], **params: Unpack[CompletionParams]
    ) -> AsyncStream[CompletionChunk]: ...
    @overload
    async def create(
        self, *, stream: Literal[False] | None = None, **params: Unpack[CompletionParams]
    ) -> Completion: ...
    @overload
    async def create(
        self, *, stream: bool | None, **params: Unpack[CompletionParams]
    ) -> Completion | AsyncStream[CompletionChunk]: ...
    async def create(self, **params: Any) -> Any:
        """As `Client.completions.create`, not blocking the event loop; with `stream=True` an AsyncStream."""
        return await acreate(endpoint, self._host, params, self._timeout)
