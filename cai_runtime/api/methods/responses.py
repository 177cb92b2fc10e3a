"""`client.responses` and its twin for asyncio."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

from openai import NOT_GIVEN, NotGiven, Omit
from openai.pagination import AsyncCursorPage, SyncCursorPage
from openai.types.responses import ParsedResponse, Response, ResponseItem, ResponseStreamEvent
from pydantic import PrivateAttr, TypeAdapter
from typing_extensions import Unpack

from cai_runtime.api.errors import invalid
from cai_runtime.api.generation import AsyncStream, Stream
from cai_runtime.api.helpers import ResponseCall
from cai_runtime.api.host import ModelHost
from cai_runtime.api.methods.endpoint import Methods
from cai_runtime.api.params import CallOptions, call_options
from cai_runtime.api.responses import ResponsesEndpoint
from cai_runtime.api.responses.params import ResponseParams, included, refused
from cai_runtime.api.responses.store import ResponseStore
from cai_runtime.api.serving import acreate, create
from cai_runtime.scalars import as_integer, shown

if TYPE_CHECKING:
    from openai.lib._parsing._responses import TextFormatT
    from openai.lib.streaming.responses import AsyncResponseStreamManager, ResponseStreamManager

MAX_LIMIT = 100  # items of a page
_ITEM: TypeAdapter[ResponseItem] = TypeAdapter(ResponseItem)
_LISTED = ("after", "include", "limit", "order")  # options of a listing
_NOT_KEPT = "the events of stored responses are not kept; stream when you create them"


class _Responses(Methods):
    def __init__(self, host: ModelHost, timeout: float | None, store: ResponseStore):
        super().__init__(host, timeout)
        self._store = store
        self._endpoint = ResponsesEndpoint(store)

    def _retrieve(self, response_id: str, options: Mapping[str, Any]) -> Response:
        given = call_options(options, ("include", "include_obfuscation", "starting_after", "stream"))
        if given.get("stream") or "starting_after" in given:
            name = "stream" if given.get("stream") else "starting_after"
            raise refused(name, _NOT_KEPT)
        if given.get("include_obfuscation"):
            raise refused("include_obfuscation", "no network carries these events")
        included(given.get("include", []))
        return self._store.get(response_id).machine.snapshot()

    def _cancel(self, response_id: str, options: Mapping[str, Any]) -> Response:
        call_options(options)
        stored = self._store.get(response_id)
        stored.abort()
        return stored.machine.snapshot()

    def _delete(self, response_id: str, options: Mapping[str, Any]) -> None:
        call_options(options)
        self._store.delete(response_id)


class Responses(_Responses):
    """`client.responses`."""

    @property
    def input_items(self) -> InputItems:
        return InputItems(self._store)

    @overload
    def create(self, *, stream: Literal[True], **params: Unpack[ResponseParams]) -> Stream[ResponseStreamEvent]: ...
    @overload
    def create(self, *, stream: Literal[False] | None = None, **params: Unpack[ResponseParams]) -> Response: ...
    @overload
    def create(
        self, *, stream: bool | None, **params: Unpack[ResponseParams]
    ) -> Response | Stream[ResponseStreamEvent]: ...
    def create(self, **params: Any) -> Any:
        """Respond to a text or to items. The parameters are those of ResponseParams and `stream`.

        Returns:
            Response; with `stream=True` a Stream of the `openai` package's response events. A response that runs out of
            tokens, or ends inside a thought, has the status "incomplete".

        Raises:
            APIError: see `cai_runtime.api.errors`. While streaming, `response.failed` comes first, then the stream raises
                it. APITimeoutError after `timeout` seconds: of a whole response from the call to its end, of a stream to
                each next event.
        """
        return create(self._endpoint, self._host, params, self._timeout)

    def parse(
        self,
        *,
        text_format: type[TextFormatT] | None = None,
        parse_as: type[TextFormatT] | NotGiven | None = NOT_GIVEN,
        **params: Unpack[ResponseParams],
    ) -> ParsedResponse[TextFormatT]:
        """`create`, and the answer as an object: `.output_parsed`, and each call's `.parsed_arguments`.

        Args:
            text_format: a Pydantic model or dataclass, to whose schema the answer is held.
            parse_as: what the answer is parsed as, if not as `text_format`; None leaves it a text.
            params: those of ResponseParams. Functions of `tools` may be made by `openai.pydantic_function_tool(Model)`;
                the arguments of those that are not strict stay unparsed.

        Raises:
            APIError: as `create`.
            ValueError: Pydantic's or json's: an answer that was cut off has no object.
        """
        call = ResponseCall(params, text_format, parse_as, stream=False)
        return call.parsed(create(self._endpoint, self._host, call.params, self._timeout))

    def stream(
        self,
        *,
        text_format: type[TextFormatT] | None = None,
        response_id: str | None = None,
        starting_after: int | None = None,
        **params: Unpack[ResponseParams],
    ) -> ResponseStreamManager[TextFormatT]:
        """`create(stream=True)` whose events hold what there is so far, and the answer as an object at its end:

            with client.responses.stream(input=..., text_format=Model) as stream:
                for event in stream:
                    if event.type == "response.output_text.delta":
                        print(event.delta, end="")
            print(stream.get_final_response().output_parsed)

        The request begins with the `with` statement, and is aborted if that is left before the end. Parameters and
        errors are those of `parse`. `response_id` and `starting_after` are refused: events are not kept.
        `get_final_response` raises RuntimeError for a response that did not complete; the last event has it.
        """
        _refuse_stored(response_id, starting_after)
        call = ResponseCall(params, text_format, stream=True)
        return call.manager(partial(create, self._endpoint, self._host, call.params, self._timeout))

    def retrieve(self, response_id: str, **options: Any) -> Response:
        """A stored response as it stands, a copy. `include` may name what is served; `stream` is refused.

        Raises NotFoundError: none of this id is stored in this client.
        """
        return self._retrieve(response_id, options)

    def cancel(self, response_id: str, **options: Unpack[CallOptions]) -> Response:
        """Stop a stored response that is streamed; its stream raises APIError. One that is done is returned as it is."""
        return self._cancel(response_id, options)

    def delete(self, response_id: str, **options: Unpack[CallOptions]) -> None:
        """Forget a stored response; one that still runs is stopped. Those that go on from it keep its items.

        Raises NotFoundError: none of this id is stored in this client.
        """
        self._delete(response_id, options)


class AsyncResponses(_Responses):
    """`client.responses` of an AsyncClient."""

    @property
    def input_items(self) -> AsyncInputItems:
        return AsyncInputItems(self._store)

    @overload
    async def create(
        self, *, stream: Literal[True], **params: Unpack[ResponseParams]
    ) -> AsyncStream[ResponseStreamEvent]: ...
    @overload
    async def create(self, *, stream: Literal[False] | None = None, **params: Unpack[ResponseParams]) -> Response: ...
    @overload
    async def create(
        self, *, stream: bool | None, **params: Unpack[ResponseParams]
    ) -> Response | AsyncStream[ResponseStreamEvent]: ...
    async def create(self, **params: Any) -> Any:
        """As `Client.responses.create`, not blocking the event loop; with `stream=True` an AsyncStream."""
        return await acreate(self._endpoint, self._host, params, self._timeout)

    async def parse(
        self,
        *,
        text_format: type[TextFormatT] | None = None,
        parse_as: type[TextFormatT] | NotGiven | None = NOT_GIVEN,
        **params: Unpack[ResponseParams],
    ) -> ParsedResponse[TextFormatT]:
        """As `Client.responses.parse`, not blocking the event loop."""
        call = ResponseCall(params, text_format, parse_as, stream=False)
        return call.parsed(await acreate(self._endpoint, self._host, call.params, self._timeout))

    def stream(
        self,
        *,
        text_format: type[TextFormatT] | None = None,
        response_id: str | None = None,
        starting_after: int | None = None,
        **params: Unpack[ResponseParams],
    ) -> AsyncResponseStreamManager[TextFormatT]:
        """As `Client.responses.stream`, with `async with` and `async for`."""
        _refuse_stored(response_id, starting_after)
        call = ResponseCall(params, text_format, stream=True)
        return call.async_manager(partial(acreate, self._endpoint, self._host, call.params, self._timeout))

    async def retrieve(self, response_id: str, **options: Any) -> Response:
        """As `Client.responses.retrieve`."""
        return self._retrieve(response_id, options)

    async def cancel(self, response_id: str, **options: Unpack[CallOptions]) -> Response:
        """As `Client.responses.cancel`."""
        return self._cancel(response_id, options)

    async def delete(self, response_id: str, **options: Unpack[CallOptions]) -> None:
        """As `Client.responses.delete`."""
        self._delete(response_id, options)


class ItemPage(SyncCursorPage[ResponseItem]):
    """A page of items; iterating it goes on to the pages after it. `object`, `first_id`, `last_id` as OpenAI's."""

    _next: Callable[[], ItemPage] = PrivateAttr()

    def get_next_page(self) -> ItemPage:
        return self._next()


class AsyncItemPage(AsyncCursorPage[ResponseItem]):
    """ItemPage, for `async for`."""

    _next: Callable[[], AsyncItemPage] = PrivateAttr()

    async def get_next_page(self) -> AsyncItemPage:
        return self._next()


class InputItems:
    """`client.responses.input_items`."""

    def __init__(self, store: ResponseStore):
        self._store = store

    def list(self, response_id: str, **options: Any) -> ItemPage:
        """The items that a stored response was made from, those of the responses before it included.

        Args:
            response_id: of the response.
            options: `order`: "desc" (default) or "asc". `limit`: 1 to 100 on a page, default 20. `after`: an item's id;
                the page begins after it.

        Raises NotFoundError: no response of this id is stored in this client.
        """
        return self._page(response_id, call_options(options, _LISTED))

    def _page(self, response_id: str, given: dict[str, Any]) -> ItemPage:
        fields = _page(self._store, response_id, given)
        page = ItemPage(**fields)
        page._next = lambda: self._page(response_id, {**given, "after": fields["last_id"]})
        return page


class AsyncInputItems:
    """`client.responses.input_items` of an AsyncClient."""

    def __init__(self, store: ResponseStore):
        self._store = store

    def list(self, response_id: str, **options: Any) -> AsyncItems:
        """As `Client.responses.input_items.list`: await it for a page, or iterate it with `async for`."""
        return AsyncItems(lambda: self._page(response_id, call_options(options, _LISTED)))

    def _page(self, response_id: str, given: dict[str, Any]) -> AsyncItemPage:
        fields = _page(self._store, response_id, given)
        page = AsyncItemPage(**fields)
        page._next = lambda: self._page(response_id, {**given, "after": fields["last_id"]})
        return page


class AsyncItems:
    """A listing that has not begun."""

    def __init__(self, first: Callable[[], AsyncItemPage]):
        self._first = first

    def __await__(self) -> Generator[Any, Any, AsyncItemPage]:
        return self._page().__await__()

    async def __aiter__(self) -> AsyncIterator[ResponseItem]:
        async for item in await self:
            yield item

    async def _page(self) -> AsyncItemPage:
        await asyncio.sleep(0)
        return self._first()


def _page(store: ResponseStore, response_id: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a page. given: options of _LISTED."""
    included(given.get("include", []))
    order, limit = given.get("order", "desc"), as_integer(given.get("limit", 20))
    if order not in ("asc", "desc"):
        raise invalid("order", f"must be asc or desc, got {shown(order)}")
    if limit is None or not 1 <= limit <= MAX_LIMIT:
        raise invalid("limit", f"must be 1 to {MAX_LIMIT}, got {shown(given['limit'])}")
    items = builtins.list(store.get(response_id).items)
    if order == "desc":
        items.reverse()
    if "after" in given:
        ids = [item["id"] for item in items]
        if given["after"] not in ids:
            raise invalid("after", f"is {shown(given['after'])}, which is no item of this response")
        items = items[ids.index(given["after"]) + 1 :]
    data = [_ITEM.validate_python(item) for item in items[:limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0].id if data else None,
        "last_id": data[-1].id if data else None,
        "has_more": len(items) > limit,
    }


def _refuse_stored(response_id: Any, starting_after: Any) -> None:
    for name, value in (("response_id", response_id), ("starting_after", starting_after)):
        if value is not None and not isinstance(value, (NotGiven, Omit)):
            raise refused(name, _NOT_KEPT)
