"""`parse` and `stream` of chat and Responses: the `openai` package's own parsers and accumulators, over our replies and
streams.

That package documents what they do, not the modules that hold them. They are imported on first use, by names that every
version has which this package allows.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from openai import NOT_GIVEN, NotGiven, Omit
from pydantic import BaseModel
from pydantic.errors import PydanticUserError

from cai_runtime.api import chat
from cai_runtime.api.errors import BadRequestError, invalid
from cai_runtime.api.generation import AsyncStream, Stream
from cai_runtime.api.responses.params import mapping, refused
from cai_runtime.scalars import shown

if TYPE_CHECKING:
    from openai.lib.streaming.chat import AsyncChatCompletionStreamManager, ChatCompletionStreamManager
    from openai.lib.streaming.responses import AsyncResponseStreamManager, ResponseStreamManager
    from openai.types.chat import ChatCompletion, ParsedChatCompletion
    from openai.types.responses import ParsedResponse, Response


class ChatCall:
    """A call of `chat.completions.parse` or `.stream`.

    Args:
        params: its keyword arguments.
        response_format: a Pydantic model or dataclass, an object as `create` takes it, or None.
        stream: which of the two it is.

    `params` are the keyword arguments for `create`. As an endpoint, this is chat's; a call of `parse` must have strict
    tools.

    Raises:
        BadRequestError: `response_format` is of another type, or `stream` is given.
    """

    def __init__(self, params: Mapping[str, Any], response_format: Any, *, stream: bool):
        from openai.lib._parsing import type_to_response_format_param

        _check_stream(params, stream)
        self._streams = stream
        self._tools = _given(_listed(params.get("tools")))
        # The package's parsers know the API's own form by its being a dict.
        self._response_format: Any = _given(
            dict(response_format) if isinstance(response_format, Mapping) else response_format
        )
        with_format: dict[str, Any] = {}
        if self._response_format is not NOT_GIVEN:
            made = _converted(type_to_response_format_param, self._response_format, "response_format")
            with_format["response_format"] = made
        tools = None if self._tools is NOT_GIVEN else self._tools
        self.params = {**params, **with_format, "tools": tools, "stream": stream}

    def parse(self, params: Mapping[str, Any]) -> Any:
        """As `api.chat.parse`. Raises BadRequestError for tools that `parse` can't take, too."""
        from openai.lib._parsing import validate_input_tools

        request = chat.parse(params)
        if not self._streams:
            try:
                validate_input_tools(self._tools)
            except ValueError as error:
                raise invalid("tools", str(error)) from error
        return request

    prepare = staticmethod(chat.prepare)

    def parsed(self, reply: ChatCompletion) -> ParsedChatCompletion[Any]:
        """The reply with its parsed content and arguments.

        Raises:
            openai.LengthFinishReasonError: it was cut off.
        """
        from openai.lib._parsing import parse_chat_completion

        return parse_chat_completion(
            response_format=self._response_format, input_tools=self._tools, chat_completion=reply
        )

    def manager(self, start: Callable[[], Stream[Any]]) -> ChatCompletionStreamManager[Any]:
        """start: sends the request."""
        from openai.lib.streaming.chat import ChatCompletionStreamManager

        begin: Any = _Beginning(start)
        return ChatCompletionStreamManager(begin, response_format=self._response_format, input_tools=self._tools)

    def async_manager(self, start: Callable[[], Awaitable[AsyncStream[Any]]]) -> AsyncChatCompletionStreamManager[Any]:
        """start: sends the request."""
        from openai.lib.streaming.chat import AsyncChatCompletionStreamManager

        begin: Any = _Beginning(start)
        return AsyncChatCompletionStreamManager(begin, response_format=self._response_format, input_tools=self._tools)


class ResponseCall:
    """A call of `responses.parse` or `.stream`.

    Args:
        params: its keyword arguments.
        text_format: a Pydantic model or dataclass, or None.
        parse_as: what the text is parsed as, if not as text_format; None: as nothing.
        stream: which of the two it is.

    `params` are the keyword arguments for `create`.

    Raises:
        BadRequestError: `text_format` or `parse_as` is of another type, both `text_format` and `text.format` are given, or
            `stream` is.
    """

    def __init__(self, params: Mapping[str, Any], text_format: Any, parse_as: Any = NOT_GIVEN, *, stream: bool):
        from openai.lib._parsing._responses import type_to_text_format_param

        _check_stream(params, stream)
        self._tools = _given(_responses_tools(_listed(params.get("tools"))))
        self._parse_as: Any = _given(text_format)
        with_format: dict[str, Any] = {}
        if self._parse_as is not NOT_GIVEN:
            _check_type(text_format, "text_format")
            text = mapping(_or_none(params.get("text")) or {}, "text")
            if "format" in text:
                raise BadRequestError(
                    "'text.format' and 'text_format' both say what the answer must be: give one of them.",
                    param="text.format",
                    code="invalid_value",
                )
            made = _converted(type_to_text_format_param, text_format, "text_format")
            with_format["text"] = {**text, "format": made}
        if not isinstance(parse_as, (NotGiven, Omit)):
            if parse_as is not None:
                _check_type(parse_as, "parse_as")
            self._parse_as = _given(parse_as)
        tools = None if self._tools is NOT_GIVEN else self._tools
        self.params = {**params, **with_format, "tools": tools, "stream": stream}

    def parsed(self, response: Response) -> ParsedResponse[Any]:
        """The response with its parsed texts and arguments."""
        from openai.lib._parsing._responses import parse_response

        return parse_response(text_format=self._parse_as, input_tools=self._tools, response=response)

    def manager(self, start: Callable[[], Stream[Any]]) -> ResponseStreamManager[Any]:
        """start: sends the request."""
        from openai.lib.streaming.responses import ResponseStreamManager

        begin: Any = _Beginning(start)
        return ResponseStreamManager(begin, text_format=self._parse_as, input_tools=self._tools, starting_after=None)

    def async_manager(self, start: Callable[[], Awaitable[AsyncStream[Any]]]) -> AsyncResponseStreamManager[Any]:
        """start: sends the request."""
        from openai.lib.streaming.responses import AsyncResponseStreamManager

        begin: Any = _Beginning(start)
        return AsyncResponseStreamManager(
            begin, text_format=self._parse_as, input_tools=self._tools, starting_after=None
        )


class _Raw:
    """A stream as the `openai` package's have it: with a `response` to close."""

    def __init__(self, stream: Stream[Any] | AsyncStream[Any]):
        self._stream = stream
        self.response = self

    def __iter__(self) -> Iterator[Any]:
        assert isinstance(self._stream, Stream)
        return iter(self._stream)

    def __aiter__(self) -> AsyncIterator[Any]:
        assert isinstance(self._stream, AsyncStream)
        return aiter(self._stream)

    def close(self) -> None:
        assert isinstance(self._stream, Stream)
        self._stream.close()

    async def aclose(self) -> None:
        assert isinstance(self._stream, AsyncStream)
        await self._stream.close()


class _Beginning:
    """Sends the request when it is called or awaited, and not before: a manager may never be entered."""

    def __init__(self, start: Callable[[], Any]):
        self._start = start

    def __call__(self) -> _Raw:
        return _Raw(self._start())

    def __await__(self) -> Generator[Any, Any, _Raw]:
        return _Raw((yield from self._start().__await__()))


def _or_none(value: Any) -> Any:
    return None if isinstance(value, (NotGiven, Omit)) else value


def _given(value: Any) -> Any:
    """NOT_GIVEN for None and the like: the package's parsers take None for a value."""
    return NOT_GIVEN if _or_none(value) is None else value


def _check_stream(params: Mapping[str, Any], stream: bool) -> None:
    if _or_none(params.get("stream")) not in (None, stream):
        raise refused("stream", "'parse' gives the whole reply, 'stream' its events; each has a method of its own")


def _check_type(value: Any, param: str) -> None:
    if not inspect.isclass(value):
        raise _not_a_model(value, param, "must be a Pydantic model or dataclass")


def _not_a_model(value: Any, param: str, problem: str) -> BadRequestError:
    return invalid(param, f"{problem}, got {shown(value)}", "invalid_type")


def _converted(convert: Callable[[Any], Any], value: Any, param: str) -> Any:
    """The API's form of a response format. Raises BadRequestError for what has none."""
    try:
        return convert(value)
    except TypeError as error:
        raise _not_a_model(value, param, "must be a Pydantic model or dataclass") from error
    except PydanticUserError as error:  # its message ends with a link
        problem = f"Pydantic makes no JSON schema of {shown(value)}: {str(error).splitlines()[0]}"
        raise invalid(param, problem, "invalid_schema") from error


def _listed(tools: Any) -> Any:
    """Tools as a list, to be looked at twice, and objects among them as the dicts that the package's parsers take.
    Anything else as it is: `create` refuses it by name."""
    if not isinstance(tools, Iterable) or isinstance(tools, (str, bytes, Mapping)):
        return tools
    return [_as_dict(tool) for tool in tools]


def _as_dict(tool: Any) -> Any:
    if isinstance(tool, BaseModel):
        return tool.model_dump(exclude_none=True)
    if isinstance(tool, Mapping) and isinstance(tool.get("function"), BaseModel):
        return {**tool, "function": tool["function"].model_dump(exclude_none=True)}
    return tool


def _responses_tools(tools: Any) -> Any:
    """Tools of `openai.pydantic_function_tool`, which have the form of chat's, in that of Responses."""
    from openai.lib._tools import PydanticFunctionTool, ResponsesPydanticFunctionTool

    if not isinstance(tools, list):
        return tools
    made: list[Any] = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if isinstance(function, PydanticFunctionTool):
            fields: Any = {"type": "function", **function}
            tool = ResponsesPydanticFunctionTool(fields, function.model)
        made.append(tool)
    return made
