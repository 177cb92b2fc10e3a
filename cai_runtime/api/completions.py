"""The endpoint /completions: checks a request, tokenizes its prompts, and builds the reply or its chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Required

from openai.types import Completion as TextCompletion
from openai.types import CompletionChoice, CompletionUsage
from pydantic import PlainValidator, TypeAdapter, with_config
from pydantic_core import PydanticCustomError

from cai_runtime.api.errors import BadRequestError
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
from cai_runtime.api.values import TOKEN_LIMIT, Flag, without_arrays
from cai_runtime.engine.request import Finished, Request
from cai_runtime.formats.events import ChatEvent, EndEvent, TextEvent
from cai_runtime.scalars import as_integer

DEFAULT_MAX_TOKENS = 16
_AS_IT_IS = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """One prompt or several, each a text or token ids, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    value = _listed(value)
    if value:
        if all(isinstance(item, str) for item in value):
            return list(value)
        if None not in (ids := _token_ids(value)):
            return [ids]
        several: list[Prompt] = [_token_ids(_listed(item)) for item in value]
        if all(ids and None not in ids for ids in several):
            return several
    raise PydanticCustomError("prompt_type", "must be a string, a list of strings, token ids, or a list of token ids")


def _listed(value: Any) -> Sequence[Any]:
    """A list or tuple as it is, NumPy's and torch's arrays as lists, nothing else."""
    value = without_arrays(value)
    return value if isinstance(value, (list, tuple)) else ()


def _token_ids(items: Sequence[Any]) -> list[Any]:
    """Token ids as ints; None for what is none."""
    found = (as_integer(item) for item in items)
    return [token if token is not None and 0 <= token < TOKEN_LIMIT else None for token in found]


@with_config(STRICT)
class CompletionParams(GenerationParams, total=False):
    """Keyword arguments of `completions.create`, besides `stream` (default false).

    prompt: a text, a list of texts, token ids, or a list of token ids; a tokenizer's own start token is put before
        texts. Unlike in chat, a text that spells a control token gives that token. With several prompts and `n` choices
        each, choice j of prompt i has the index i n + j.
    echo: put the prompt's text before the answer. Default false.

    The others are those of GenerationParams. `suffix`, `best_of`, `logprobs`, `tools` and `tool_choice` are refused,
    but for the values that ask for nothing.
    """

    prompt: Required[Annotated[str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], PlainValidator(_prompts)]]
    echo: Flag | None


@with_config(STRICT)
class _CompletionCall(CompletionParams, total=False):
    stream: Flag | None


_ADAPTER: TypeAdapter[Any] = TypeAdapter(_CompletionCall)
_NAMES = frozenset(_CompletionCall.__annotations__) | {"best_of", "suffix", "logprobs", "tools", "tool_choice"}
assert _NAMES - frozenset(_CompletionCall.__annotations__) <= frozenset(UNSUPPORTED)


class CompletionChunkChoice(CompletionChoice):
    """A choice of a streamed piece. OpenAI streams a null finish reason until the last piece, though its type says
    that there always is one."""

    finish_reason: Literal["stop", "length", "content_filter"] | None = None  # type: ignore[assignment]


class CompletionChunk(TextCompletion):
    """A streamed piece of a text completion."""

    choices: list[CompletionChunkChoice]  # type: ignore[assignment]


@dataclass(frozen=True)
class CompletionRequest:
    """A checked call. `params` holds what was given, of the right types and ranges."""

    model: str | None
    prompts: list[Prompt]
    params: Mapping[str, Any]
    stream: bool


def parse(params: Mapping[str, Any]) -> CompletionRequest:
    """Check a call before anything is loaded.

    Raises:
        BadRequestError: naming the parameter at fault.
    """
    rest = validated(_ADAPTER, params, names=_NAMES)
    return CompletionRequest(rest.pop("model", None), rest.pop("prompt"), rest, rest.pop("stream", False))


def prepare(request: CompletionRequest, name: str, opened: OpenModel) -> Generation[CompletionChunk, TextCompletion]:
    """Tokenize the prompts and settle how each choice is sampled.

    Raises:
        BadRequestError: a prompt is empty, names a token that the model does not have, or does not fit the context.
    """
    choices = request.params.get("n", 1)
    head = ReplyHead.new("cmpl", name)
    requests: list[Request] = []
    echoes: list[str] = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            opened.check_characters(len(prompt), "prompt")
        with opened.tokenizer_lock:
            prompt_ids = _encode(prompt, opened)
            if request.params.get("echo"):
                echo = prompt if isinstance(prompt, str) else opened.tokenizer.decode(prompt_ids, **_AS_IT_IS)
                echoes += [echo] * choices
        sampling = sampling_params(
            request.params,
            prompt_tokens=len(prompt_ids),
            context=opened.engine.max_context,
            vocab_size=opened.engine.vocab_size,
            default_max=DEFAULT_MAX_TOKENS,
            prompt_param="prompt",
            defaults=opened.defaults,
            context_limit=opened.engine.context_limit,
        )
        for i in range(choices):
            seed = choice_seed(sampling.seed, i)  # the same for every prompt: a list gives what one by one gives
            request_id = f"{head.id}/{len(requests)}"
            requests.append(Request(prompt_ids, replace(sampling, seed=seed), request_id=request_id))
    include_usage = (request.params.get("stream_options") or {}).get("include_usage") or False
    return Generation(requests, CompletionReply(head, choices, echoes, include_usage))


def _encode(prompt: Prompt, opened: OpenModel) -> list[int]:
    """Token ids of a prompt. It is the caller's own, whole: control tokens that it spells are control tokens."""
    if isinstance(prompt, str):
        ids = opened.tokenizer.encode(prompt, verbose=False)  # no warning about its length: that is checked here
        if not ids and opened.tokenizer.bos_token_id is not None:
            ids = [opened.tokenizer.bos_token_id]  # nothing at all: start a text of its own
        if not ids:
            raise BadRequestError(
                "Invalid 'prompt': it is empty, and this model has no token that starts a text.",
                param="prompt",
                code="invalid_value",
            )
        return ids
    if (highest := max(prompt)) >= opened.engine.vocab_size:
        raise BadRequestError(
            f"Invalid 'prompt': it holds token {highest}, but this model's token ids end at {opened.engine.vocab_size - 1}.",
            param="prompt",
            code="invalid_value",
        )
    return prompt


class CompletionReply:
    """Builds a text completion, or its chunks, from the events of its sequences.

    Args:
        choices_per_prompt: sequences of each prompt, `n`.
        echoes: for every sequence the text to put before it; empty without echo.
    """

    def __init__(self, head: ReplyHead, choices_per_prompt: int, echoes: Sequence[str], include_usage: bool):
        self._head = head
        self._choices_per_prompt = choices_per_prompt
        self._echoes = echoes
        self._include_usage = include_usage

    def opening(self) -> list[CompletionChunk]:
        return [self.chunk(index, TextEvent(echo)) for index, echo in enumerate(self._echoes)]

    def chunk(self, index: int, event: ChatEvent) -> CompletionChunk:
        match event:
            case TextEvent():
                choice = CompletionChunkChoice(index=index, text=event.text)
            case EndEvent():
                choice = CompletionChunkChoice(index=index, text="", finish_reason=event.finish_reason)
        return self._piece([choice])

    def closing(self, choices: Sequence[Finished]) -> list[CompletionChunk]:
        if not self._include_usage:
            return []
        return [self._piece([], usage_of(choices, self._choices_per_prompt))]

    def fold(self, choices: Sequence[Finished]) -> TextCompletion:
        return TextCompletion(
            **vars(self._head),
            object="text_completion",
            choices=[self._fold_choice(index, choice.events) for index, choice in enumerate(choices)],
            usage=usage_of(choices, self._choices_per_prompt),
        )

    def _piece(self, choices: list[CompletionChunkChoice], usage: CompletionUsage | None = None) -> CompletionChunk:
        return CompletionChunk(**vars(self._head), object="text_completion", choices=choices, usage=usage)

    def _fold_choice(self, index: int, events: Sequence[ChatEvent]) -> CompletionChoice:
        text = "".join(event.text for event in events if isinstance(event, TextEvent))
        (end,) = (event for event in events if isinstance(event, EndEvent))
        echo = self._echoes[index] if self._echoes else ""
        return CompletionChoice(index=index, text=echo + text, finish_reason=end.finish_reason, logprobs=None)
