"""One state machine makes the events of a response and the response itself, so that they can't differ."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseCreatedEvent,
    ResponseError,
    ResponseFailedEvent,
    ResponseFunctionCallArgumentsDeltaEvent,
    ResponseFunctionCallArgumentsDoneEvent,
    ResponseFunctionToolCall,
    ResponseIncompleteEvent,
    ResponseInProgressEvent,
    ResponseOutputItem,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
    ResponseReasoningTextDeltaEvent,
    ResponseReasoningTextDoneEvent,
    ResponseStreamEvent,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
    ResponseUsage,
)
from openai.types.responses.response import IncompleteDetails
from openai.types.responses.response_content_part_added_event import PartReasoningText as AddedThought
from openai.types.responses.response_content_part_done_event import PartReasoningText as DoneThought
from openai.types.responses.response_output_text import Logprob
from openai.types.responses.response_reasoning_item import Content as Thought

from cai_runtime.api.responses.items import new_id
from cai_runtime.formats.events import (
    ArgumentsEvent,
    ChatEvent,
    EndEvent,
    MarkerEvent,
    ReasoningEvent,
    TextEvent,
    ToolCallEvent,
)

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ItemKind = Literal["message", "reasoning", "function_call"]
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


@dataclass
class _OpenItem:
    """The item that the model is writing. pieces: of its text, its thought or its arguments. logprobs: of its text's
    tokens, in Chat's shape, where they are wanted."""

    kind: ItemKind
    index: int
    id: str
    call: ToolCallEvent | None = None
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def item(self, status: ItemStatus) -> ResponseOutputItem:
        text = "".join(self.pieces)
        if self.call is not None:
            return ResponseFunctionToolCall(
                id=self.id,
                type="function_call",
                call_id=self.call.call_id,
                name=self.call.name,
                arguments=text,
                status=status,
            )
        if self.kind == "reasoning":
            thought = [Thought(type="reasoning_text", text=text)]
            return ResponseReasoningItem(id=self.id, type="reasoning", summary=[], content=thought, status=status)
        content: list[Any] = [_text_part(text, self.logprobs)]
        return ResponseOutputMessage(id=self.id, type="message", role="assistant", content=content, status=status)

    def begun(self) -> ResponseOutputItem:
        """The item before its first content part."""
        item = self.item("in_progress")
        if isinstance(item, ResponseOutputMessage | ResponseReasoningItem):
            item.content = []
        return item


class ResponseMachine:
    """Of one response: feed it the answer's events, and it gives the response's.

    At most one item is open at a time. Every item and part that was added is done before the next one, and before the
    response is. Thread-safe: while one thread feeds it, others may look at `snapshot`.
    """

    def __init__(self, response: Response, max_tokens: int):
        """response: in progress, without output; from here on the machine's. max_tokens: that the answer may have."""
        self._response = response
        self._max_tokens = max_tokens
        self._number = 0
        self._open: _OpenItem | None = None
        self._reason: str | None = None  # the answer's finish reason
        self._last: list[ResponseStreamEvent] = []  # of a cancelled response: what its stream has not shown yet
        self._lock = threading.RLock()

    @property
    def response(self) -> Response:
        """The whole of it, once it is done."""
        return self._response

    @property
    def status(self) -> str | None:
        return self._response.status

    def snapshot(self) -> Response:
        """The response as it stands, a copy; an open item is in it."""
        with self._lock:
            copy = self._response.model_copy(deep=True)
            if self._open is not None:
                copy.output.append(self._open.item("in_progress"))
            return copy

    def begin(self) -> list[ResponseStreamEvent]:
        """The events before the model's first."""
        with self._lock:
            return [
                self._event(ResponseCreatedEvent, "response.created", response=self.snapshot()),
                self._event(ResponseInProgressEvent, "response.in_progress", response=self.snapshot()),
            ]

    def feed(self, event: ChatEvent, logprobs: Sequence[dict[str, Any]] = ()) -> list[ResponseStreamEvent]:
        """What one event of the answer adds. logprobs: of its tokens, in Chat's shape."""
        with self._lock:
            if self._done:  # cancelled by another thread
                return []
            match event:
                case TextEvent():
                    return self._write("message", event.text, logprobs)
                case ReasoningEvent():
                    return self._write("reasoning", event.text)
                case ToolCallEvent():
                    return [*self._close("completed"), *self._begin("function_call", event)]
                case ArgumentsEvent():
                    call = None if self._open is None else self._open.call
                    if call is None or call.index != event.index:
                        raise AssertionError(f"{event!r} outside its call")
                    return self._write("function_call", event.text)
                case EndEvent():
                    self._reason = event.finish_reason
                    return []
                case MarkerEvent():
                    return []

    def end(self, usage: ResponseUsage) -> list[ResponseStreamEvent]:
        """The events after the answer's last one."""
        with self._lock:
            if self._done:
                return []
            events: list[ResponseStreamEvent] = []
            in_thought = self._open is not None and self._open.kind == "reasoning"
            whole = self._reason != "length" and not in_thought
            if self._open is None and not self._response.output:  # an answer of no text is a message, too
                events += self._begin("message")
            events += self._close("completed" if whole else "incomplete")
            self._response.usage = usage
            if whole:
                self._response.completed_at = float(int(time.time()))
                self._response.status = "completed"
                return [*events, self._event(ResponseCompletedEvent, "response.completed", response=self.snapshot())]
            # An end of text inside the thought is none of the schema's reasons.
            full = usage.output_tokens >= self._max_tokens
            self._response.incomplete_details = IncompleteDetails(reason="max_output_tokens" if full else None)
            self._response.status = "incomplete"
            return [*events, self._event(ResponseIncompleteEvent, "response.incomplete", response=self.snapshot())]

    def fail(self, message: str) -> list[ResponseStreamEvent]:
        """End it by an error: what is open is closed as incomplete. Nothing where it is done."""
        with self._lock:
            if self._done:
                return []
            events = self._close("incomplete")
            self._response.status = "failed"
            self._response.error = ResponseError(code="server_error", message=message)
            return [*events, self._event(ResponseFailedEvent, "response.failed", response=self.snapshot())]

    def cancel(self) -> bool:
        """End it because nobody wants it any more. False where it is done."""
        with self._lock:
            if self._done:
                return False
            self._last = self._close("incomplete")
            self._response.status = "cancelled"
            return True

    def last_events(self) -> list[ResponseStreamEvent]:
        """Those of what `cancel` closed, for whoever still listens; once. There is no event of its own for it."""
        with self._lock:
            events, self._last = self._last, []
            return events

    @property
    def _done(self) -> bool:
        return self._response.status != "in_progress"

    def _write(self, kind: ItemKind, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[ResponseStreamEvent]:
        events: list[ResponseStreamEvent] = []
        if self._open is None or self._open.kind != kind:
            events += self._close("completed")
            events += self._begin(kind)
        item = self._open
        assert item is not None
        item.pieces.append(text)
        item.logprobs += logprobs
        where: dict[str, Any] = {"item_id": item.id, "output_index": item.index, "delta": text}
        match kind:
            case "message":
                kinds: Any = (ResponseTextDeltaEvent, "response.output_text.delta")
                events.append(self._event(*kinds, **where, content_index=0, logprobs=[*logprobs]))
            case "reasoning":
                kinds = (ResponseReasoningTextDeltaEvent, "response.reasoning_text.delta")
                events.append(self._event(*kinds, **where, content_index=0))
            case "function_call":
                kinds = (ResponseFunctionCallArgumentsDeltaEvent, "response.function_call_arguments.delta")
                events.append(self._event(*kinds, **where))
        return events

    def _begin(self, kind: ItemKind, call: ToolCallEvent | None = None) -> list[ResponseStreamEvent]:
        item = self._open = _OpenItem(kind, len(self._response.output), new_id(_PREFIXES[kind]), call)
        events = [
            self._event(
                ResponseOutputItemAddedEvent, "response.output_item.added", item=item.begun(), output_index=item.index
            )
        ]
        if kind != "function_call":
            part = _text_part("") if kind == "message" else AddedThought(type="reasoning_text", text="")
            events.append(self._part(ResponseContentPartAddedEvent, "response.content_part.added", item, part))
        return events

    def _close(self, status: ItemStatus) -> list[ResponseStreamEvent]:
        item, self._open = self._open, None
        if item is None:
            return []
        text = "".join(item.pieces)
        where: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        events: list[ResponseStreamEvent] = []
        match item.kind:
            case "message":
                kinds: Any = (ResponseTextDoneEvent, "response.output_text.done")
                events.append(self._event(*kinds, **where, content_index=0, text=text, logprobs=[*item.logprobs]))
                part: Any = _text_part(text, item.logprobs)
                events.append(self._part(ResponseContentPartDoneEvent, "response.content_part.done", item, part))
            case "reasoning":
                kinds = (ResponseReasoningTextDoneEvent, "response.reasoning_text.done")
                events.append(self._event(*kinds, **where, content_index=0, text=text))
                part = DoneThought(type="reasoning_text", text=text)
                events.append(self._part(ResponseContentPartDoneEvent, "response.content_part.done", item, part))
            case "function_call":
                kinds = (ResponseFunctionCallArgumentsDoneEvent, "response.function_call_arguments.done")
                # Some versions of the package's type want the name; in others it is an extra field.
                name = "" if item.call is None else item.call.name
                events.append(self._event(*kinds, **where, arguments=text, name=name))
        done = item.item(status)
        self._response.output.append(done)
        kinds = (ResponseOutputItemDoneEvent, "response.output_item.done")
        events.append(self._event(*kinds, item=done.model_copy(deep=True), output_index=item.index))
        return events

    def _part(self, of: Callable[..., Any], type: str, item: _OpenItem, part: Any) -> Any:
        return self._event(of, type, item_id=item.id, output_index=item.index, content_index=0, part=part)

    def _event(self, of: Callable[..., Any], type: str, **fields: Any) -> Any:
        event = of(type=type, sequence_number=self._number, **fields)
        self._number += 1
        return event


def merged(events: Sequence[ChatEvent]) -> list[ChatEvent]:
    """The same answer in fewer events: pieces that follow each other as one."""
    runs: list[list[Any]] = []
    for event in events:
        if isinstance(event, MarkerEvent):
            continue
        mergeable = isinstance(event, TextEvent | ReasoningEvent | ArgumentsEvent)
        if mergeable and runs and type(runs[-1][0]) is type(event):
            runs[-1].append(event)
        else:
            runs.append([event])
    return [run[0] if len(run) == 1 else _one(run) for run in runs]


def _one(run: Sequence[Any]) -> ChatEvent:
    text = "".join(event.text for event in run)
    tokens = tuple(token_id for event in run for token_id in event.token_ids)
    first = run[0]
    return ArgumentsEvent(first.index, text, tokens) if isinstance(first, ArgumentsEvent) else type(first)(text, tokens)


def _text_part(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> ResponseOutputText:
    listed = [Logprob.model_validate(each) for each in logprobs]
    return ResponseOutputText(type="output_text", text=text, annotations=[], logprobs=listed)
