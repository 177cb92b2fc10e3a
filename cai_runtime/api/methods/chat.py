"""`client.chat` and its twin for asyncio."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, overload

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ParsedChatCompletion
from typing_extensions import Unpack

from cai_runtime.api import chat as endpoint
from cai_runtime.api.chat import ChatOptions, ChatParams
from cai_runtime.api.generation import AsyncStream, Stream
from cai_runtime.api.helpers import ChatCall
from cai_runtime.api.methods.endpoint import Methods
from cai_runtime.api.serving import acreate, create

if TYPE_CHECKING:
    from openai.lib._parsing import ResponseFormatT
    from openai.lib.streaming.chat import AsyncChatCompletionStreamManager, ChatCompletionStreamManager


class Chat(Methods):
    """`client.chat`."""

    @cached_property
    def completions(self) -> ChatCompletions:
        return ChatCompletions(self._host, self._timeout)


class AsyncChat(Methods):
    """`client.chat` of an AsyncClient."""

    @cached_property
    def completions(self) -> AsyncChatCompletions:
        return AsyncChatCompletions(self._host, self._timeout)


class ChatCompletions(Methods):
    """`client.chat.completions`."""

    @overload
    def create(self, *, stream: Literal[True], **params: Unpack[ChatParams]) -> Stream[ChatCompletionChunk]: ...
    @overload
    def create(self, *, stream: Literal[False] | None = None, **params: Unpack[ChatParams]) -> ChatCompletion: ...
    @overload
    def create(
        self, *, stream: bool | None, **params: Unpack[ChatParams]
    ) -> ChatCompletion | Stream[ChatCompletionChunk]: ...
    def create(self, **params: Any) -> Any:
        """Answer a conversation. The parameters are those of ChatParams and `stream`.

        `top_p=0` means "not given", as in the CompactifAI API, and not "nearly greedy": that is `temperature=0`.

        Returns:
            ChatCompletion; with `stream=True` a Stream of ChatCompletionChunk.

        Raises:
            APIError: see `cai_runtime.api.errors`; while streaming, the stream may raise it too. APITimeoutError after
                `timeout` seconds: of a whole reply from the call to its end, of a stream to each next chunk. The request
                is then aborted; a model that was loading goes on loading.
        """
        return create(endpoint, self._host, params, self._timeout)

    def parse(
        self,
        *,
        response_format: type[ResponseFormatT] | Mapping[str, Any] | None = None,
        **params: Unpack[ChatOptions],
    ) -> ParsedChatCompletion[ResponseFormatT]:
        """`create`, and the answer as an object: `.choices[0].message.parsed`, and each call's
        `.function.parsed_arguments`.

        Args:
            response_format: a Pydantic model or dataclass, to whose schema the answer is held; or as for `create`.
            params: those of ChatOptions. `tools` are strict: `openai.pydantic_function_tool(Model)`, or functions with
                `"strict": True`.

        Raises:
            APIError: as `create`.
            openai.LengthFinishReasonError: the answer was cut off by its limit; `.completion` is the reply.
        """
        call = ChatCall(params, response_format, stream=False)
        return call.parsed(create(call, self._host, call.params, self._timeout))

    def stream(
        self,
        *,
        response_format: type[ResponseFormatT] | Mapping[str, Any] | None = None,
        **params: Unpack[ChatOptions],
    ) -> ChatCompletionStreamManager[ResponseFormatT]:
        """`create(stream=True)` with events beside the chunks, such as `content.delta` and
        `tool_calls.function.arguments.done`:

            with client.chat.completions.stream(messages=..., response_format=Model) as stream:
                for event in stream:
                    if event.type == "content.delta":
                        print(event.delta, end="")
            print(stream.get_final_completion().choices[0].message.parsed)

        The request begins with the `with` statement, and is aborted if that is left before the end. Parameters and
        errors are those of `parse`; `tools` need not be strict, and the arguments of those that are not stay unparsed.
        """
        call = ChatCall(params, response_format, stream=True)
        return call.manager(partial(create, call, self._host, call.params, self._timeout))


class AsyncChatCompletions(Methods):
    """`client.chat.completions` of an AsyncClient."""

    @overload
    async def create(
        self, *, stream: Literal[True], **params: Unpack[ChatParams]
    ) -> AsyncStream[ChatCompletionChunk]: ...
    @overload
    async def create(self, *, stream: Literal[False] | None = None, **params: Unpack[ChatParams]) -> ChatCompletion: ...
    @overload
    async def create(
        self, *, stream: bool | None, **params: Unpack[ChatParams]
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]: ...
    async def create(self, **params: Any) -> Any:
        """As `Client.chat.completions.create`, not blocking the event loop; with `stream=True` an AsyncStream."""
        return await acreate(endpoint, self._host, params, self._timeout)

    async def parse(
        self,
        *,
        response_format: type[ResponseFormatT] | Mapping[str, Any] | None = None,
        **params: Unpack[ChatOptions],
    ) -> ParsedChatCompletion[ResponseFormatT]:
        """As `Client.chat.completions.parse`, not blocking the event loop."""
        call = ChatCall(params, response_format, stream=False)
        return call.parsed(await acreate(call, self._host, call.params, self._timeout))

    def stream(
        self,
        *,
        response_format: type[ResponseFormatT] | Mapping[str, Any] | None = None,
        **params: Unpack[ChatOptions],
    ) -> AsyncChatCompletionStreamManager[ResponseFormatT]:
        """As `Client.chat.completions.stream`, with `async with` and `async for`."""
        call = ChatCall(params, response_format, stream=True)
        return call.async_manager(partial(acreate, call, self._host, call.params, self._timeout))
