"""The endpoint /completions: checks a request, tokenizes its prompts, and builds the reply or its chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Required

from openai.types import Completion as TextCompletion
from openai.types import CompletionChoice, CompletionUsage
from pydantic import Field, TypeAdapter, with_config

from cai_runtime.api.errors import BadRequestError, as_api_errors
from cai_runtime.api.generation import Generation
from cai_runtime.api.host import ResolvedModel
from cai_runtime.api.logprobs import (
    MAX_COMPLETION_TOP,
    CompletionLogprobs,
    EventLogprobs,
    PromptLogprobs,
    aligned,
    joined,
    mean_logprob,
)
from cai_runtime.api.open_model import OpenModel
from cai_runtime.api.params import (
    MAX_CHOICES,
    STRICT,
    UNSUPPORTED,
    AnswerParams,
    choice_seed,
    sampling_params,
    validated,
    wants_usage,
)
from cai_runtime.api.structured import answer_of, param_of
from cai_runtime.api.usage import ReplyHead, usage_of
from cai_runtime.api.values import Flag, Prompts, Whole
from cai_runtime.engine.request import Finished, Request
from cai_runtime.formats.conversation import Answer
from cai_runtime.formats.events import ChatEvent, EndEvent, TextEvent
from cai_runtime.formats.infill import Infill

DEFAULT_MAX_TOKENS = 16
_AS_IT_IS = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
Prompt = str | list[int]


@with_config(STRICT)
class CompletionParams(AnswerParams, total=False):
    """Keyword arguments of `completions.create`, besides `stream` (default false).

    prompt: a text, a list of texts, token ids, or a list of token ids; a tokenizer's own start token is put before
        texts. Unlike in chat, a text that spells a control token gives that token. With several prompts and `n` choices
        each, choice j of prompt i has the index i n + j.
    echo: put the prompt's text before the answer. Default false.
    max_tokens: at least 0; 0 with `echo` alone: the reply is the prompt, such as for its logprobs. Default 16.
    logprobs: 0 to 5: the reply lists each token's logprob, and that many of the likeliest tokens beside it; with `echo`
        the prompt's, too, which then takes nothing from the prefix cache. Default: none.
    best_of: `n` to 128; so many answers are made for each prompt, and the `n` with the highest mean logprob are given.
        Not with `stream`. Default: `n`.
    suffix: the text behind the answer, for models with infill tokens. Prompt and suffix are then content, in which control
        tokens that they spell stay text. Not with `echo`. Default: none.

    The others are those of AnswerParams and GenerationParams. `tools` and `tool_choice` are refused, but for the values
    that ask for nothing: a prompt is the caller's own, whole, and has no place for tools.
    """

    prompt: Required[Prompts]
    echo: Flag | None
    max_tokens: Annotated[Whole, Field(ge=0)] | None
    logprobs: Annotated[Whole, Field(ge=0, le=MAX_COMPLETION_TOP)] | None
    best_of: Annotated[Whole, Field(ge=1, le=MAX_CHOICES)] | None
    suffix: str | None


@with_config(STRICT)
class _CompletionCall(CompletionParams, total=False):
    stream: Flag | None


_ADAPTER: TypeAdapter[Any] = TypeAdapter(_CompletionCall)
_NAMES = frozenset(_CompletionCall.__annotations__) | {"tools", "tool_choice"}
_NO_TOOLS = "a text completion has no conversation in which a tool could be called: use chat.completions"
_UNSUPPORTED = {**UNSUPPORTED, "tools": (_NO_TOOLS, ([], ())), "tool_choice": (_NO_TOOLS, ("none", "auto"))}
assert _NAMES - frozenset(_CompletionCall.__annotations__) <= frozenset(_UNSUPPORTED)


class TextChoice(CompletionChoice):
    """A choice whose logprobs may be a prompt's."""

    logprobs: PromptLogprobs | None = None


class TextReply(TextCompletion):
    """A text completion."""

    choices: list[TextChoice]  # type: ignore[assignment]


class CompletionChunkChoice(TextChoice):
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
    answer: Answer | None = None


def parse(params: Mapping[str, Any]) -> CompletionRequest:
    """Check a call before anything is loaded.

    Raises:
        BadRequestError: naming the parameter at fault.
    """
    rest = validated(_ADAPTER, params, names=_NAMES, unsupported=_UNSUPPORTED)
    _check_together(rest)
    answer = answer_of(rest)
    return CompletionRequest(rest.pop("model", None), rest.pop("prompt"), rest, rest.pop("stream", False), answer)


def _check_together(params: Mapping[str, Any]) -> None:
    """Raises BadRequestError for parameters that exclude each other."""
    choices, echo = params.get("n", 1), params.get("echo")
    wrong = None
    if params.get("max_tokens") == 0 and not echo:
        wrong = "max_tokens", "'max_tokens' must be at least 1, or 0 with 'echo', where the reply is the prompt alone."
    elif params.get("best_of", choices) < choices:
        wrong = "best_of", f"'best_of' must be at least 'n', which is {choices}."
    elif params.get("best_of", choices) > choices and params.get("stream"):
        wrong = "best_of", "'best_of' can't be streamed: the best answer is known when all are done."
    elif params.get("suffix") and echo:
        wrong = "suffix", "'suffix' can't be used with 'echo': the prompt does not stand right before the answer."
    if wrong is not None:
        raise BadRequestError(wrong[1], param=wrong[0], code="invalid_value")


def prepare(
    request: CompletionRequest, model: ResolvedModel, opened: OpenModel
) -> Generation[CompletionChunk, TextCompletion]:
    """Tokenize the prompts and settle how each choice is sampled.

    Raises:
        BadRequestError: a prompt is empty, names a token that the model does not have, or does not fit the context; or
            the grammar of the answer takes too much to compile.
    """
    opened.require_head(model.name)
    mask = None
    if request.answer is not None:
        with as_api_errors():
            mask = opened.grammars.mask(f"start: {request.answer.expression}", param_of(request.params))
    params = request.params
    choices, echo, suffix = params.get("n", 1), params.get("echo"), params.get("suffix")
    candidates, wanted = params.get("best_of", choices), params.get("logprobs")
    infill = _infill(opened) if suffix else None
    head = ReplyHead.new("cmpl", model.name)
    requests: list[Request] = []
    echoes: list[str] = []
    lists: list[CompletionLogprobs] = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            opened.check_characters(len(prompt) + len(suffix or ""), "prompt")
        with opened.tokenizer_lock, as_api_errors():
            prompt_ids, text, added = _encode(prompt, opened, suffix, infill), "", 0
            if echo:
                text = prompt if isinstance(prompt, str) else opened.tokenizer.decode(prompt_ids, **_AS_IT_IS)
                echoes += [text] * candidates
            if echo and wanted is not None and isinstance(prompt, str):
                added = _added(prompt, prompt_ids, opened.tokenizer)
        sampling = sampling_params(
            params,
            opened,
            prompt_tokens=len(prompt_ids),
            default_max=DEFAULT_MAX_TOKENS,
            prompt_param="prompt",
        )
        if infill is not None and not sampling.ignore_eos:
            sampling = replace(sampling, stop_token_ids=sampling.stop_token_ids + infill.ends)
        if wanted is not None:
            sampling = replace(sampling, logprobs=wanted, prompt_logprobs=wanted if echo else None)
        elif candidates > choices:
            sampling = replace(sampling, logprobs=0)
        for i in range(candidates):
            seed = choice_seed(sampling.seed, i)  # the same for every prompt: a list gives what one by one gives
            request_id = f"{head.id}/{len(requests)}"
            requests.append(Request(prompt_ids, replace(sampling, seed=seed), request_id=request_id, mask=mask))
            if wanted is not None:
                lists.append(CompletionLogprobs(opened.engine.decoder, prompt_ids, text, added))
    return Generation(requests, CompletionReply(head, choices, candidates, echoes, lists, wants_usage(params)))


def _infill(opened: OpenModel) -> Infill:
    with opened.tokenizer_lock:
        infill = opened.infill
    if infill is None:
        raise BadRequestError(
            "'suffix' can't be used: this model has no infill tokens, such as <|fim_prefix|>, <|fim_suffix|> and "
            "<|fim_middle|>. Use a model of code that has them.",
            param="suffix",
            code="unsupported_parameter",
        )
    return infill


def _added(prompt: str, prompt_ids: list[int], tokenizer: Any) -> int:
    """How many tokens the tokenizer put before the text's own."""
    own = list(tokenizer.encode(prompt, add_special_tokens=False, verbose=False))
    places = range(len(prompt_ids) - len(own) + 1)
    return next((place for place in places if prompt_ids[place : place + len(own)] == own), 0)


def _encode(prompt: Prompt, opened: OpenModel, suffix: str | None, infill: Infill | None) -> list[int]:
    """Token ids of a prompt. It is the caller's own, whole: control tokens that it spells are control tokens, but for an
    infill's, which is content."""
    if infill is not None and isinstance(prompt, str):
        return infill.encode(prompt, suffix or "")
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
    return prompt if infill is None else infill.encode(prompt, suffix or "")


class CompletionReply:
    """Builds a text completion, or its chunks, from the events of its sequences.

    Args:
        choices: of each prompt, `n`.
        candidates: sequences of each prompt, of which the likeliest become its choices.
        echoes: for every sequence the text to put before it; empty without echo.
        lists: for every sequence what writes its logprobs; empty where none are wanted.
    """

    def __init__(
        self,
        head: ReplyHead,
        choices: int,
        candidates: int,
        echoes: Sequence[str],
        lists: Sequence[CompletionLogprobs],
        include_usage: bool,
    ):
        self._head = head
        self._choices, self._candidates = choices, candidates
        self._echoes, self._lists = echoes, lists
        self._include_usage = include_usage
        self._listed: set[int] = set()  # sequences of which a stream has shown logprobs

    def opening(self) -> list[CompletionChunk]:
        if self._lists:  # an echo comes with its logprobs, in the chunk of the first event
            return []
        echoed = enumerate(self._echoes)
        return [self._piece([CompletionChunkChoice(index=index, text=text)]) for index, text in echoed]

    def chunks(self, index: int, event: ChatEvent, logprobs: EventLogprobs | None = None) -> list[CompletionChunk]:
        reason = _reason(event) if isinstance(event, EndEvent) else None
        text, written = self._written(index, event, logprobs)
        if written is None and reason is not None and self._lists and index not in self._listed:
            written = joined([])  # an answer of no text has empty lists, in the stream as in the reply
        if written is not None:
            self._listed.add(index)
        return [self._piece([CompletionChunkChoice(index=index, text=text, finish_reason=reason, logprobs=written)])]

    def closing(self, choices: Sequence[Finished]) -> list[CompletionChunk]:
        if not self._include_usage:
            return []
        return [self._piece([], usage_of(choices, self._candidates))]

    def fold(self, choices: Sequence[Finished]) -> TextReply:
        kept = [place for first in range(0, len(choices), self._candidates) for place in self._best(choices, first)]
        return TextReply(
            **vars(self._head),
            object="text_completion",
            choices=[self._fold_choice(index, place, choices[place]) for index, place in enumerate(kept)],
            usage=usage_of(choices, self._candidates),
        )

    def _best(self, choices: Sequence[Finished], first: int) -> Sequence[int]:
        """Which of the sequences of a prompt, the first of which is `first`, become choices."""
        places = range(first, first + self._candidates)
        if self._choices == self._candidates:
            return places
        return sorted(places, key=lambda place: -mean_logprob(choices[place]))[: self._choices]

    def _piece(self, choices: list[CompletionChunkChoice], usage: CompletionUsage | None = None) -> CompletionChunk:
        return CompletionChunk(**vars(self._head), object="text_completion", choices=choices, usage=usage)

    def _written(self, index: int, event: ChatEvent, found: EventLogprobs | None) -> tuple[str, PromptLogprobs | None]:
        """The text and the logprobs of an event of sequence `index`; each event is asked for once, in order."""
        if not isinstance(event, (TextEvent, EndEvent)):
            raise AssertionError(f"{event!r} in a text completion")
        shown = isinstance(event, TextEvent)
        text = event.text if isinstance(event, TextEvent) else ""
        if found is None or not self._lists:
            return text, None
        if found.prompt is not None:
            text = self._echoes[index] + text
        elif not shown:
            return text, None
        return text, self._lists[index].piece(found if shown else replace(found, tokens=()))

    def _fold_choice(self, index: int, place: int, done: Finished) -> TextChoice:
        pieces = [self._written(place, event, found) for event, found in aligned(done)]
        (end,) = (event for event in done.events if isinstance(event, EndEvent))
        written = joined([lists for _, lists in pieces if lists is not None]) if self._lists else None
        echo = self._echoes[place] if self._echoes and not self._lists else ""
        text = echo + "".join(text for text, _ in pieces)
        return TextChoice(index=index, text=text, finish_reason=_reason(end), logprobs=written)


def _reason(end: EndEvent) -> Literal["stop", "length"]:
    assert end.finish_reason != "tool_calls"
    return end.finish_reason
