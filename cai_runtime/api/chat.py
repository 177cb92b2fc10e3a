"""The endpoint /chat/completions: checks a request, renders it, and builds the reply or its chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Required

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta, ChoiceDeltaToolCall, ChoiceDeltaToolCallFunction
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_message_function_tool_call import (
    ChatCompletionMessageFunctionToolCall,
    Function,
)
from openai.types.chat.chat_completion_message_tool_call import ChatCompletionMessageToolCallUnion
from pydantic import Field, SkipValidation, TypeAdapter, with_config

from cai_runtime.api.conversations import characters, mask_of, rendered
from cai_runtime.api.errors import as_api_errors
from cai_runtime.api.generation import Generation
from cai_runtime.api.host import ResolvedModel
from cai_runtime.api.logprobs import (
    MAX_CHAT_TOP,
    EventLogprobs,
    aligned,
    chat_count,
    chat_entries,
    chat_logprobs,
)
from cai_runtime.api.media import with_media
from cai_runtime.api.open_model import OpenModel
from cai_runtime.api.params import (
    STRICT,
    UNSUPPORTED,
    AnswerParams,
    GrammarParams,
    choice_seed,
    sampling_params,
    validated,
    wants_usage,
    without_iterators,
)
from cai_runtime.api.structured import answer_of, param_of
from cai_runtime.api.usage import ReplyHead, usage_of
from cai_runtime.api.values import Flag, Whole
from cai_runtime.engine.detokenizer import TokenDecoder
from cai_runtime.engine.request import Finished, Request
from cai_runtime.formats.conversation import Conversation, Reasoning
from cai_runtime.formats.events import (
    ArgumentsEvent,
    ChatEvent,
    EndEvent,
    MarkerEvent,
    ReasoningEvent,
    TextEvent,
    ToolCallEvent,
)
from cai_runtime.formats.messages import parse_messages
from cai_runtime.formats.tools import parse_tools


class ChatOptions(GrammarParams, total=False):
    """Keyword arguments of `chat.completions.create`, `parse` and `stream`, besides `response_format` and `create`'s
    `stream`.

    messages: the conversation; see `cai_runtime.formats.messages.parse_messages`.
    chat_template: the name of one of the model's chat templates. Default: the one named "default", or the only one; with
        tools the one named "tool_use", if there is one.
    tools: functions that the model may call, `{"type": "function", "function": {...}}`. A model whose chat template takes
        no tools gets them as text in the system's message.
    tool_choice: "auto" (the default with tools), "none" (the model is told of no tools), "required", `{"type": "function",
        "function": {"name": ...}}`, or `{"type": "allowed_tools", ...}`, which leaves the other tools out.
    parallel_tool_calls: whether the answer may hold several calls. Default true.
    reasoning_enabled: whether the model thinks before it answers. Default: as its chat template has it, and true for models
        named with -r.
    reasoning_effort: none, low, medium, high, xhigh or max; the levels that the model has. A model without reasoning takes
        "none".
    reasoning_max_tokens: at least 1; the thought is closed after so many tokens. Default: no limit of its own.

    logprobs: whether the reply lists the logprob of each token of the visible content. Default false.
    top_logprobs: 0 to 20, with `logprobs`: that many of the likeliest tokens beside each. Default 0.

    The others are those of GrammarParams and GenerationParams. `functions` and `function_call`, which are deprecated, are
    refused, but for the values that ask for nothing.
    """

    # Checked by parse_messages and parse_tools: their errors name places.
    messages: Required[Annotated[Iterable[Any], SkipValidation]]
    tools: Annotated[Iterable[Any], SkipValidation] | None
    tool_choice: Annotated[str | Mapping[str, Any], SkipValidation] | None
    chat_template: str | None
    parallel_tool_calls: Flag | None
    reasoning_enabled: Flag | None
    reasoning_effort: Literal["none", "low", "medium", "high", "xhigh", "max"] | None
    reasoning_max_tokens: Annotated[Whole, Field(ge=1)] | None
    logprobs: Flag | None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_CHAT_TOP)] | None


class ChatParams(ChatOptions, AnswerParams, total=False):
    """Keyword arguments of `chat.completions.create`, besides `stream` (default false)."""


@with_config(STRICT)
class _ChatCall(ChatParams, total=False):
    stream: Flag | None


_ADAPTER: TypeAdapter[Any] = TypeAdapter(_ChatCall)
_NAMES = frozenset(_ChatCall.__annotations__) | frozenset(UNSUPPORTED)


@dataclass(frozen=True)
class ChatRequest:
    """A checked call. `params` holds what was given, of the right types and ranges."""

    model: str | None
    conversation: Conversation
    params: Mapping[str, Any]
    stream: bool


def parse(params: Mapping[str, Any]) -> ChatRequest:
    """Check a call before anything is loaded.

    Raises:
        BadRequestError: naming the parameter at fault.
    """
    rest = validated(_ADAPTER, without_iterators(params), names=_NAMES)
    with as_api_errors():
        messages = parse_messages(rest.pop("messages"))
        tools = parse_tools(*(rest.pop(name, None) for name in ("tools", "tool_choice", "parallel_tool_calls")))
    reasoning = Reasoning(*(rest.pop(f"reasoning_{name}", None) for name in ("enabled", "effort", "max_tokens")))
    chat_count(rest)
    template, answer = rest.pop("chat_template", None), answer_of(rest)
    conversation = Conversation(tuple(messages), **tools, reasoning=reasoning, answer=answer, template=template)
    return ChatRequest(rest.pop("model", None), conversation, rest, rest.pop("stream", False))


def prepare(
    request: ChatRequest, model: ResolvedModel, opened: OpenModel
) -> Generation[ChatCompletionChunk, ChatCompletion]:
    """Render the conversation and settle how each choice is sampled.

    Raises:
        BadRequestError: the model has no chat template or none of this name, its template refuses the messages, or
            they don't fit the context; or it lacks the reasoning or the tools that the request asks for.
    """
    opened.require_head(model.name)
    opened.check_characters(characters(request.conversation), "messages")
    conversation = with_media(request.conversation, opened)
    prepared = rendered(conversation, model, opened)
    mask = mask_of(prepared, opened, "tools" if conversation.answer is None else param_of(request.params))
    sampling = sampling_params(
        request.params,
        opened,
        prompt_tokens=len(prepared.prompt_ids),
        default_max=None,
        prompt_param="messages",
    )
    sampling = replace(sampling, logprobs=chat_count(request.params))
    head = ReplyHead.new("chatcmpl", model.name)
    choices = request.params.get("n", 1)
    requests = [
        Request(
            prepared.prompt_ids,
            replace(sampling, seed=choice_seed(sampling.seed, i)),
            request_id=f"{head.id}/{i}",
            output=prepared.output,
            mask=mask,
        )
        for i in range(choices)
    ]
    return Generation(requests, ChatReply(head, choices, wants_usage(request.params), opened.engine.decoder))


class ChatReply:
    """Builds a ChatCompletion, or its chunks, from the events of `choices` sequences. decoder: of the engine."""

    def __init__(self, head: ReplyHead, choices: int, include_usage: bool, decoder: TokenDecoder):
        self._decoder = decoder
        self._head = head
        self._choices = choices
        self._include_usage = include_usage
        self._begun: set[int] = set()  # choices of which a stream has shown something
        self._listed: set[int] = set()  # and of which it has listed logprobs

    def opening(self) -> list[ChatCompletionChunk]:
        return [self._chunk(i, ChoiceDelta(role="assistant")) for i in range(self._choices)]

    def chunks(self, index: int, event: ChatEvent, logprobs: EventLogprobs | None = None) -> list[ChatCompletionChunk]:
        match event:
            case TextEvent() if logprobs is not None:
                self._begun.add(index)
                self._listed.add(index)
                entries = chat_entries(self._decoder, logprobs.tokens)
                return [self._chunk(index, _delta(event), logprobs=ChunkLogprobs(content=entries, refusal=None))]
            case TextEvent() | ReasoningEvent() | ToolCallEvent() | ArgumentsEvent():
                self._begun.add(index)
                return [self._chunk(index, _delta(event))]
            case EndEvent():
                # An answer of nothing at all is an empty text, and one of no text has an empty list of logprobs, in the
                # stream as in the reply.
                delta = ChoiceDelta() if index in self._begun else ChoiceDelta(content="")
                unlisted = logprobs is not None and index not in self._listed
                empty = ChunkLogprobs(content=[], refusal=None) if unlisted else None
                return [self._chunk(index, delta, event.finish_reason, empty)]
            case MarkerEvent():
                return []

    def closing(self, choices: Sequence[Finished]) -> list[ChatCompletionChunk]:
        if not self._include_usage:
            return []
        usage = usage_of(choices, self._choices)
        return [ChatCompletionChunk(**vars(self._head), object="chat.completion.chunk", choices=[], usage=usage)]

    def fold(self, choices: Sequence[Finished]) -> ChatCompletion:
        return ChatCompletion(
            **vars(self._head),
            object="chat.completion",
            choices=[_fold_choice(index, choice, self._decoder) for index, choice in enumerate(choices)],
            usage=usage_of(choices, self._choices),
        )

    def _chunk(
        self, index: int, delta: ChoiceDelta, finish_reason: Any = None, logprobs: ChunkLogprobs | None = None
    ) -> ChatCompletionChunk:
        choice = ChunkChoice(index=index, delta=delta, finish_reason=finish_reason, logprobs=logprobs)
        return ChatCompletionChunk(**vars(self._head), object="chat.completion.chunk", choices=[choice])


def _delta(event: TextEvent | ReasoningEvent | ToolCallEvent | ArgumentsEvent) -> ChoiceDelta:
    match event:
        case TextEvent():
            return ChoiceDelta(content=event.text)
        case ReasoningEvent():
            thought: dict[str, Any] = {"reasoning_content": event.text}  # beyond OpenAI's fields, as elsewhere
            return ChoiceDelta(**thought)
        case ToolCallEvent():
            function = ChoiceDeltaToolCallFunction(name=event.name, arguments="")
            call = ChoiceDeltaToolCall(index=event.index, id=event.call_id, type="function", function=function)
        case ArgumentsEvent():
            call = ChoiceDeltaToolCall(index=event.index, function=ChoiceDeltaToolCallFunction(arguments=event.text))
    return ChoiceDelta(tool_calls=[call])


def _fold_choice(index: int, done: Finished, decoder: TokenDecoder) -> Choice:
    events = done.events
    text = "".join(event.text for event in events if isinstance(event, TextEvent))
    thought = "".join(event.text for event in events if isinstance(event, ReasoningEvent))
    calls = _fold_calls(events)
    (end,) = (event for event in events if isinstance(event, EndEvent))
    more: dict[str, Any] = {"reasoning_content": thought or None}
    message = ChatCompletionMessage(
        role="assistant",
        content=None if not text and (thought or calls) else text,
        refusal=None,
        tool_calls=calls or None,
        **more,
    )
    return Choice(
        index=index, message=message, finish_reason=end.finish_reason, logprobs=chat_logprobs(decoder, aligned(done))
    )


def _fold_calls(events: Sequence[ChatEvent]) -> list[ChatCompletionMessageToolCallUnion]:
    """The calls of an answer, whole, in their order."""
    arguments: dict[int, list[str]] = {}
    for event in events:
        if isinstance(event, ArgumentsEvent):
            arguments.setdefault(event.index, []).append(event.text)
    return [
        ChatCompletionMessageFunctionToolCall(
            id=event.call_id,
            type="function",
            function=Function(name=event.name, arguments="".join(arguments.get(event.index, ()))),
        )
        for event in events
        if isinstance(event, ToolCallEvent)
    ]
