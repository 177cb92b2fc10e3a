"""The endpoint /chat/completions: checks a request, renders it, and builds the reply or its chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Required

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from pydantic import SkipValidation, TypeAdapter, with_config

from cai_runtime.api.errors import as_api_errors
from cai_runtime.api.generation import Generation
from cai_runtime.api.host import OpenModel
from cai_runtime.api.params import (
    STRICT,
    UNSUPPORTED,
    GenerationParams,
    choice_seed,
    sampling_params,
    validated,
)
from cai_runtime.api.usage import ReplyHead, usage_of
from cai_runtime.api.values import Flag
from cai_runtime.engine.request import Finished, Request
from cai_runtime.formats.conversation import Conversation
from cai_runtime.formats.events import ChatEvent, EndEvent, TextEvent
from cai_runtime.formats.messages import Message, parse_messages


@with_config(STRICT)
class ChatParams(GenerationParams, total=False):
    """Keyword arguments of `chat.completions.create`, besides `stream` (default false).

    messages: the conversation; see `cai_runtime.formats.messages.parse_messages`.
    chat_template: the name of one of the model's chat templates. Default: the one named "default", or the only one.
    parallel_tool_calls: accepted; there are no tool calls yet for it to govern.

    The others are those of GenerationParams. `tools`, `tool_choice`, `reasoning_effort`, `reasoning_enabled`,
    `response_format`, `logprobs` and `top_logprobs` are refused, but for the values that ask for nothing.
    """

    messages: Required[Annotated[Iterable[Any], SkipValidation]]  # parse_messages checks them: its errors name places
    chat_template: str | None
    parallel_tool_calls: Flag | None


@with_config(STRICT)
class _ChatCall(ChatParams, total=False):
    stream: Flag | None


_ADAPTER: TypeAdapter[Any] = TypeAdapter(_ChatCall)
_NAMES = frozenset(_ChatCall.__annotations__) | frozenset(UNSUPPORTED) - {"best_of", "suffix"}


@dataclass(frozen=True)
class ChatRequest:
    """A checked call. `params` holds what was given, of the right types and ranges."""

    model: str | None
    messages: list[Message]
    params: Mapping[str, Any]
    stream: bool


def parse(params: Mapping[str, Any]) -> ChatRequest:
    """Check a call before anything is loaded.

    Raises:
        BadRequestError: naming the parameter at fault.
    """
    if isinstance(params.get("messages"), Iterator):
        params = {**params, "messages": list(params["messages"])}  # it is looked at twice
    rest = validated(_ADAPTER, params, names=_NAMES)
    with as_api_errors():
        messages = parse_messages(rest.pop("messages"))
    return ChatRequest(rest.pop("model", None), messages, rest, rest.pop("stream", False))


def prepare(request: ChatRequest, name: str, opened: OpenModel) -> Generation[ChatCompletionChunk, ChatCompletion]:
    """Render the conversation and settle how each choice is sampled.

    Raises:
        BadRequestError: the model has no chat template or none of this name, its template refuses the messages, or
            they don't fit the context.
    """
    opened.check_characters(sum(_characters(message.content) for message in request.messages), "messages")
    with as_api_errors(), opened.tokenizer_lock:
        conversation = Conversation(tuple(request.messages), template=request.params.get("chat_template"))
        prepared = opened.format.prepare(conversation)
    sampling = sampling_params(
        request.params,
        prompt_tokens=len(prepared.prompt_ids),
        context=opened.engine.max_context,
        vocab_size=opened.engine.vocab_size,
        default_max=None,
        prompt_param="messages",
        defaults=opened.defaults,
        context_limit=opened.engine.context_limit,
    )
    head = ReplyHead.new("chatcmpl", name)
    choices = request.params.get("n", 1)
    requests = [
        Request(
            prepared.prompt_ids,
            replace(sampling, seed=choice_seed(sampling.seed, i)),
            request_id=f"{head.id}/{i}",
            output=prepared.output,
        )
        for i in range(choices)
    ]
    include_usage = (request.params.get("stream_options") or {}).get("include_usage") or False
    return Generation(requests, ChatReply(head, choices, include_usage))


def _characters(content: str | Sequence[str]) -> int:
    """Of a text, or of a list of texts."""
    return len(content) if isinstance(content, str) else sum(map(len, content))


class ChatReply:
    """Builds a ChatCompletion, or its chunks, from the events of `choices` sequences."""

    def __init__(self, head: ReplyHead, choices: int, include_usage: bool):
        self._head = head
        self._choices = choices
        self._include_usage = include_usage

    def opening(self) -> list[ChatCompletionChunk]:
        return [self._chunk(i, ChoiceDelta(role="assistant", content="")) for i in range(self._choices)]

    def chunks(self, index: int, event: ChatEvent) -> list[ChatCompletionChunk]:
        match event:
            case TextEvent():
                return [self._chunk(index, ChoiceDelta(content=event.text))]
            case EndEvent():
                return [self._chunk(index, ChoiceDelta(), event.finish_reason)]
            case _:
                raise AssertionError(f"{event!r} in a plain answer")

    def closing(self, choices: Sequence[Finished]) -> list[ChatCompletionChunk]:
        if not self._include_usage:
            return []
        usage = usage_of(choices, self._choices)
        return [ChatCompletionChunk(**vars(self._head), object="chat.completion.chunk", choices=[], usage=usage)]

    def fold(self, choices: Sequence[Finished]) -> ChatCompletion:
        return ChatCompletion(
            **vars(self._head),
            object="chat.completion",
            choices=[_fold_choice(index, choice.events) for index, choice in enumerate(choices)],
            usage=usage_of(choices, self._choices),
        )

    def _chunk(self, index: int, delta: ChoiceDelta, finish_reason: Any = None) -> ChatCompletionChunk:
        choice = ChunkChoice(index=index, delta=delta, finish_reason=finish_reason)
        return ChatCompletionChunk(**vars(self._head), object="chat.completion.chunk", choices=[choice])


def _fold_choice(index: int, events: Sequence[ChatEvent]) -> Choice:
    text = "".join(event.text for event in events if isinstance(event, TextEvent))
    (end,) = (event for event in events if isinstance(event, EndEvent))
    message = ChatCompletionMessage(role="assistant", content=text, refusal=None)
    return Choice(index=index, message=message, finish_reason=end.finish_reason, logprobs=None)
