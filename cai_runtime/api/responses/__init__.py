"""The endpoint /responses: checks a request, makes a conversation of its items, and builds the response and its events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from openai.types.responses import Response, ResponseTextConfig
from openai.types.shared import Reasoning as ReasoningEcho

from cai_runtime.api.conversations import characters, mask_of, rendered
from cai_runtime.api.errors import BadRequestError, as_api_errors, missing
from cai_runtime.api.host import ResolvedModel
from cai_runtime.api.media import with_media
from cai_runtime.api.open_model import OpenModel
from cai_runtime.api.params import sampling_params, without_iterators
from cai_runtime.api.responses.events import ResponseMachine
from cai_runtime.api.responses.items import Item, check_calls, new_id, parse_input
from cai_runtime.api.responses.messages import Turns, longest
from cai_runtime.api.responses.params import checked_params
from cai_runtime.api.responses.reply import ResponseGeneration, ResponseReply
from cai_runtime.api.responses.store import ResponseStore, Stored
from cai_runtime.api.responses.tools import ToolUse, parse_reasoning, parse_text, parse_tool_use
from cai_runtime.api.structured import param_of
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.formats.conversation import Conversation, Prepared
from cai_runtime.formats.messages import Message

# Where `truncation` is "auto" and there is no `max_output_tokens`, this share of the context is kept free for the answer.
FREE_SHARE = 8
_NAMES = {"messages": "input", "reasoning_effort": "reasoning.effort"}  # Chat's names of parameters and our own


@dataclass(frozen=True)
class ResponseRequest:
    """A checked call. `params` holds what was given, of the right types and ranges. items: the whole input, those of
    earlier responses first."""

    model: str | None
    items: tuple[Item, ...]
    conversation: Conversation
    tool_use: ToolUse
    text: ResponseTextConfig
    params: Mapping[str, Any]
    stream: bool


class ResponsesEndpoint:
    """What `api.serving` needs of an endpoint, with the store of one client."""

    def __init__(self, store: ResponseStore):
        self._store = store

    def parse(self, params: Mapping[str, Any]) -> ResponseRequest:
        """Check a call before anything is loaded.

        Raises:
            BadRequestError: naming the parameter at fault.
        """
        rest = checked_params(without_iterators(params))
        tool_use = parse_tool_use(rest.pop("tools", ()), rest.pop("tool_choice", "auto"))
        reasoning, (answer, text) = parse_reasoning(rest), parse_text(rest)
        previous = rest.get("previous_response_id")
        history: tuple[Item, ...] = () if previous is None else self._store.history(previous)
        with as_api_errors():
            new = parse_input(rest.pop("input", None), self._store.find_item)
            items = (*history, *new)
            if not items:
                raise missing("input")
            check_calls(items, len(new))
            messages = Turns(rest.get("instructions"), items, len(new)).parsed()
        if rest.get("store"):
            self._store.check_room(items)
        conversation = Conversation(
            tuple(messages),
            tools=tool_use.tools,
            tool_choice=tool_use.choice,
            parallel_tool_calls=rest.get("parallel_tool_calls", True),
            reasoning=reasoning,
            answer=answer,
            template=rest.get("chat_template"),
        )
        model, stream = rest.pop("model", None), rest.pop("stream", False)
        return ResponseRequest(model, items, conversation, tool_use, text, rest, stream)

    def prepare(self, request: ResponseRequest, model: ResolvedModel, opened: OpenModel) -> ResponseGeneration:
        """Render the conversation and settle how the answer is sampled.

        Raises:
            BadRequestError: the model lacks what the conversation asks for, its template refuses it, or it does not fit
                the context.
        """
        opened.require_head(model.name)
        conversation, auto = request.conversation, request.params.get("truncation") == "auto"
        if not auto:
            opened.check_characters(characters(conversation), "input")
        conversation = with_media(conversation, opened)
        grammar_param = "text.format" if "text" in request.params else param_of(request.params)
        if conversation.answer is None:
            grammar_param = "tools"
        with _own_names():
            if auto:
                prepared = _truncated(conversation, request.params.get("max_output_tokens"), model, opened)
            else:
                prepared = rendered(conversation, model, opened)
            mask = mask_of(prepared, opened, grammar_param)
        sampling = sampling_params(
            request.params,
            opened,
            prompt_tokens=len(prepared.prompt_ids),
            default_max=None,
            prompt_param="input",
        )
        if request.params["include"]:
            sampling = replace(sampling, logprobs=request.params.get("top_logprobs", 0))
        response = _response(request, model.name, sampling)
        machine = ResponseMachine(response, sampling.max_tokens)
        store = self._store if request.params.get("store") else None
        return ResponseGeneration(
            [Request(prepared.prompt_ids, sampling, request_id=response.id, output=prepared.output, mask=mask)],
            ResponseReply(machine, opened.engine.decoder, store),
            None if store is None else Stored(machine, request.items),
            store,
        )


@contextmanager
def _own_names() -> Iterator[None]:
    """Raise what a conversation's format refuses by the names of this endpoint's parameters."""
    try:
        yield
    except BadRequestError as error:
        name = _NAMES.get(error.param or "")
        if name is None:
            raise
        message = error.message.replace(f"'{error.param}'", f"'{name}'")
        raise BadRequestError(message, param=name, code=error.code) from error


def _truncated(
    conversation: Conversation, max_output_tokens: int | None, model: ResolvedModel, opened: OpenModel
) -> Prepared:
    """The conversation rendered without its oldest turns, as far as they have to go."""
    context = opened.engine.max_context
    wanted = context // FREE_SHARE if max_output_tokens is None else max_output_tokens

    def attempt(messages: Sequence[Message]) -> Prepared | None:
        shorter = replace(conversation, messages=tuple(messages))
        try:
            opened.check_characters(characters(shorter), "input")
        except BadRequestError:
            return None
        prepared = rendered(shorter, model, opened)
        return prepared if len(prepared.prompt_ids) + wanted <= context else None

    prepared = longest(conversation.messages, attempt)
    if prepared is None:
        raise BadRequestError(
            f"Even with truncation, the instructions, the last turn and {wanted} tokens for the answer don't fit the "
            f"{context} positions of the context: shorten the input, or ask for fewer tokens.",
            param="input",
            code="context_length_exceeded",
        )
    return prepared


def _response(request: ResponseRequest, name: str, sampling: SamplingParams) -> Response:
    """The response before its output. `store` is a field that OpenAI's replies have, and its types lack."""
    params = request.params
    given: dict[str, Any] = {"store": params.get("store", False)}
    effort: Any = request.conversation.reasoning.effort  # one of the type's literals: `parse_reasoning` has checked it
    return Response(
        id=new_id("resp"),
        object="response",
        created_at=float(int(time.time())),
        status="in_progress",
        background=False,
        error=None,
        incomplete_details=None,
        instructions=params.get("instructions"),
        max_output_tokens=params.get("max_output_tokens"),
        metadata=params.get("metadata", {}),
        model=name,
        output=[],
        parallel_tool_calls=request.conversation.parallel_tool_calls,
        previous_response_id=params.get("previous_response_id"),
        prompt_cache_key=params.get("prompt_cache_key"),
        reasoning=ReasoningEcho(effort=effort, summary=None),
        safety_identifier=params.get("safety_identifier"),
        service_tier="default",
        temperature=sampling.temperature,
        text=request.text,
        tool_choice=request.tool_use.choice_echo,
        tools=list(request.tool_use.tools_echo),
        top_logprobs=params.get("top_logprobs", 0),
        top_p=sampling.top_p,
        truncation=params.get("truncation", "disabled"),
        usage=None,
        user=params.get("user"),
        **given,
    )
