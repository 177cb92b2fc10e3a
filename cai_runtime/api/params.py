"""The parameters of a request: their types, ranges and defaults, checked before anything runs.

One definition serves twice: `ChatParams` and `CompletionParams` type the keyword arguments of `create` for editors and
type checkers, and pydantic validates a call against the same classes, strictly. What is refused raises BadRequestError
with `param` naming the parameter; nothing is dropped in silence. None, and the `openai` package's NOT_GIVEN and omit,
mean "not given" everywhere.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from openai import NotGiven, Omit
from pydantic import ConfigDict, Field, SkipValidation, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from cai_runtime.api.errors import BadRequestError, missing, unknown
from cai_runtime.api.values import (
    Flag,
    Ignored,
    LogitBias,
    ModelName,
    Number,
    Penalty,
    Seconds,
    Stop,
    TokenIds,
    Whole,
    surrogate_place,
)
from cai_runtime.engine.request import SamplingParams
from cai_runtime.scalars import shown
from cai_runtime.slim.generation_defaults import PENALTY_MAX, PENALTY_MIN

if TYPE_CHECKING:
    from cai_runtime.api.open_model import OpenModel

MAX_CHOICES = 128  # OpenAI's limit on n
SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1
STRICT = ConfigDict(strict=True, extra="forbid")


@with_config(STRICT)
class StreamOptions(TypedDict, total=False):
    """`include_usage`: one more chunk at the end, with `choices: []` and the usage."""

    include_usage: Flag | None


class CallOptions(TypedDict, total=False):
    """What every method takes.

    timeout: seconds, or the `openai` package's Timeout, whose `read` counts; the client's by default, and None is no
        limit. A whole reply must be done, and each chunk of a stream must come, within it. Methods that generate nothing
        take no time: there it is checked alone.
    extra_headers, extra_query: accepted for compatibility; no HTTP request is sent that could carry them.
    extra_body: further parameters, merged into these, as the `openai` client does.
    """

    timeout: Seconds | None
    extra_headers: Ignored | None
    extra_query: Ignored | None
    extra_body: dict[str, Any] | None


class SamplingOptions(CallOptions, total=False):
    """What every endpoint that generates text has in common.

    model: a name given with `Client(models=...)`, a checkpoint directory, or a catalogue id. Default: the client's.
    temperature: 0 to 2, default 1; 0 is greedy. Where the checkpoint's generation_config.json has a temperature, top_p,
        top_k, min_p or repetition_penalty, that is the default, unless `Client(generation_config="none")`.
    top_p: 0 < p <= 1, default 1; an explicit 0 means "not given", as in the CompactifAI API.
    min_tokens: until then neither the model's end of text nor a stop string ends the answer. Default 0.
    stop: up to 16 strings; the text ends before the first that appears. The text of a special token, such as
        "<|im_end|>", stands for that token.
    stop_token_ids: tokens that end the text, as the model's own end-of-text tokens do. Default none.
    frequency_penalty, presence_penalty: -2 to 2, default 0 (OpenAI's definition).
    repetition_penalty: 1e-6 to 1e6, default 1 (Keskar et al. 2019).
    logit_bias: token id to -100...100, added to its logit.
    top_k: keep the k likeliest tokens; 0, the default, and -1 keep all.
    min_p: 0 to 1, default 0; keep the tokens at least this likely relative to the likeliest.
    seed: the same seed gives the same text, alone or in a batch. Default: drawn for each choice. Choice 0 uses the seed
        itself, choice i > 0 one derived from it.
    ignore_eos: the end-of-text token is an ordinary token. Default false.
    user, safety_identifier, prompt_cache_key: accepted for compatibility; labels with no effect.
    """

    model: ModelName | None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None
    min_tokens: Annotated[Whole, Field(ge=0)] | None
    stop: Stop | None
    stop_token_ids: TokenIds | None
    frequency_penalty: Penalty | None
    presence_penalty: Penalty | None
    repetition_penalty: Annotated[Number, Field(ge=PENALTY_MIN, le=PENALTY_MAX)] | None
    logit_bias: LogitBias | None
    top_k: Annotated[Whole, Field(ge=-1)] | None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None
    seed: Annotated[Whole, Field(ge=SEED_MIN, le=SEED_MAX)] | None
    ignore_eos: Flag | None
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None


class GenerationParams(SamplingOptions, total=False):
    """What chat and text completions have in common beyond SamplingOptions.

    max_tokens, max_completion_tokens: at least 1; the latter wins. Default: 16 for text completions, the rest of the
        context for chat.
    n: 1 to 128 choices for each prompt, default 1, each sampled on its own.
    metadata: accepted for compatibility; a label with no effect.
    stream_options: `{"include_usage": bool}`, with `stream=True` only.
    """

    max_tokens: Annotated[Whole, Field(ge=1)] | None
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None
    n: Annotated[Whole, Field(ge=1, le=MAX_CHOICES)] | None
    metadata: Ignored | None
    stream_options: StreamOptions | None


class GrammarParams(GenerationParams, total=False):
    """Our own ways to say what the answer must be; `cai_runtime.api.structured` checks them. At most one of them and of
    `response_format`.

    regex: a regular expression that the whole answer matches.
    grammar: a grammar of the answer, in llguidance's dialect of Lark.
    choice: a list of texts; the answer is one of them.
    """

    regex: Annotated[str, SkipValidation] | None
    grammar: Annotated[str, SkipValidation] | None
    choice: Annotated[Sequence[str], SkipValidation] | None


class AnswerParams(GrammarParams, total=False):
    """And OpenAI's.

    response_format: `{"type": "text"}`, the default; `{"type": "json_object"}`, any JSON object; or `{"type":
        "json_schema", "json_schema": {"name": ..., "schema": {...}}}`, JSON that is valid under the schema (`strict` and
        `description` are accepted; a schema is always enforced, whole).
    """

    response_format: Annotated[Mapping[str, Any], SkipValidation] | None


# Parameters of the schema that this version does not serve: what it would take, and the values that ask for nothing.
Unsupported = Mapping[str, tuple[str, tuple[Any, ...]]]
UNSUPPORTED: Unsupported = {
    "functions": ("deprecated: use 'tools'", ([], ())),
    "function_call": ("deprecated: use 'tool_choice'", ("none", "auto")),
    "audio": ("audio output is not supported", ()),
    "modalities": ("only text output is supported", (["text"],)),
    "prediction": ("predicted outputs are not supported", ()),
    "web_search_options": ("web search is not supported: nothing here uses the network", ()),
    "store": ("stored completions are not supported", (False,)),
    "moderation": ("moderation is not supported", ()),
    "service_tier": ("there are no service tiers in-process", ("auto", "default")),
    "verbosity": ("not supported", ("medium",)),
    "prompt_cache_options": ("not supported", ()),
    "prompt_cache_retention": ("not supported", ()),
}


def validated(
    adapter: TypeAdapter[Any],
    params: Mapping[str, Any],
    *,
    names: frozenset[str],
    unsupported: Unsupported = UNSUPPORTED,
) -> dict[str, Any]:
    """The given parameters of a call, checked; those not given are absent.

    Args:
        adapter: of the endpoint's TypedDict.
        params: keyword arguments as they came.
        names: every parameter of the endpoint's schema; another one is unknown, not unsupported.
        unsupported: parameters of the schema that are not served, as in UNSUPPORTED.

    Raises:
        BadRequestError: naming the first parameter that is unknown, unsupported, of a wrong type or out of range.
    """
    given = {key: value for key, value in _with_extra_body(params).items() if not _is_unset(value)}
    for name in [*given]:
        if name not in unsupported or name not in names:
            continue
        reason, neutral = unsupported[name]
        if not any(_is_same(given[name], value) for value in neutral):
            raise BadRequestError(f"'{name}' can't be used: {reason}.", param=name, code="unsupported_parameter")
        del given[name]
    for name in given:
        if name not in names:
            raise _unknown(name, names)
        if name not in _LABELS and (place := surrogate_place(given[name], name)):
            raise BadRequestError(
                f"Invalid '{place}': the text holds a lone surrogate, which is half of a character: send whole ones.",
                param=place,
                code="invalid_value",
            )
    try:
        checked = adapter.validate_python(given)
    except ValidationError as error:
        _refuse(error, names)
    if checked.get("stream_options") is not None and not checked.get("stream"):
        raise BadRequestError(
            "'stream_options' is only allowed when 'stream' is true.", param="stream_options", code="invalid_value"
        )
    return checked


@with_config(STRICT)
class _EveryCall(CallOptions, total=False):
    pass


_EVERY_CALL: TypeAdapter[Any] = TypeAdapter(_EveryCall)


def call_options(options: Mapping[str, Any], names: tuple[str, ...] = ()) -> dict[str, Any]:
    """The given ones of a method's own options, for methods that generate nothing. Those of CallOptions are checked.

    Args:
        options: keyword arguments as they came.
        names: the method's own; the method checks their values.

    Raises:
        BadRequestError: naming the first option that is unknown, or one of CallOptions that has a wrong value.
    """
    given = {key: value for key, value in _with_extra_body(options).items() if not _is_unset(value)}
    known = frozenset(CallOptions.__annotations__)
    for name in given:
        if name not in names and name not in known:
            raise _unknown(name, known | frozenset(names))
    try:
        _EVERY_CALL.validate_python({name: given[name] for name in given if name in known})
    except ValidationError as error:
        _refuse(error, known)
    return {name: given[name] for name in given if name in names}


def without_iterators(params: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that looks at them twice: what can be read once alone is a list."""
    return {key: list(value) if isinstance(value, Iterator) else value for key, value in params.items()}


def wants_usage(params: Mapping[str, Any]) -> bool:
    """Whether a stream ends with its usage."""
    return bool((params.get("stream_options") or {}).get("include_usage"))


def sampling_params(
    params: Mapping[str, Any], opened: OpenModel, *, prompt_tokens: int, default_max: int | None, prompt_param: str
) -> SamplingParams:
    """What the engine needs to know of validated parameters, for one prompt.

    Args:
        opened: the model: its context, its vocabulary, and its defaults of what the request does not name.
        prompt_tokens: length of the prompt.
        default_max: max_tokens when not given, cut to the context; None is the whole rest of the context.
        prompt_param: the parameter that the prompt came in, for errors.
    """
    context, vocab_size, defaults = opened.engine.max_context, opened.engine.vocab_size, opened.defaults
    room = context - prompt_tokens
    limit = opened.engine.context_limit or f"the model's context holds {context} positions"
    limit_name = next((name for name in _LIMITS if name in params), "max_tokens")
    max_tokens = params.get(limit_name)
    if room < 1 and not (room == 0 == max_tokens):
        raise BadRequestError(
            f"The prompt has {prompt_tokens} tokens and the answer needs at least one, but {limit}. Shorten the prompt.",
            param=prompt_param,
            code="context_length_exceeded",
        )
    if max_tokens is None:
        max_tokens = room if default_max is None else min(default_max, room)
    elif max_tokens > room:
        raise BadRequestError(
            f"The prompt has {prompt_tokens} tokens and '{limit_name}' asks for {shown(max_tokens)} more, but {limit}. "
            f"Ask for at most {room}, or shorten the prompt.",
            param=limit_name,
            code="context_length_exceeded",
        )
    min_tokens = params.get("min_tokens", 0)
    if min_tokens > max_tokens:
        raise BadRequestError(
            f"'min_tokens' is {shown(min_tokens)}, more than the {max_tokens} tokens that the answer may have.",
            param="min_tokens",
            code="invalid_value",
        )
    logit_bias = params.get("logit_bias", {})
    stop_token_ids = tuple(params.get("stop_token_ids", ()))
    for name, tokens in (("logit_bias", logit_bias), ("stop_token_ids", stop_token_ids)):
        if outside := [token for token in tokens if token >= vocab_size]:
            raise BadRequestError(
                f"'{name}' names token {shown(outside[0])}, but this model's token ids end at {vocab_size - 1}.",
                param=name,
                code="invalid_value",
            )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=float(params.get("temperature", defaults.temperature)),
        top_p=float(params.get("top_p", 0.0)) or defaults.top_p,  # an explicit 0 is "not given"
        top_k=min(max(params.get("top_k", defaults.top_k), 0), vocab_size),  # of more, NumPy's integers overflow
        min_p=float(params.get("min_p", defaults.min_p)),
        frequency_penalty=float(params.get("frequency_penalty", 0.0)),
        presence_penalty=float(params.get("presence_penalty", 0.0)),
        repetition_penalty=float(params.get("repetition_penalty", defaults.repetition_penalty)),
        logit_bias=logit_bias,
        seed=params.get("seed"),
        stop=tuple(params.get("stop", ())),
        stop_token_ids=stop_token_ids,
        ignore_eos=params.get("ignore_eos", False),
    )


_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")  # the first that is given counts


def choice_seed(seed: int | None, index: int) -> int | None:
    """The seed of choice `index`: `seed` itself for choice 0, so that asking for more choices leaves the first as it
    was; 63 bits of SHA-256 over (seed, index) for the others. None stays None: the engine draws one."""
    if seed is None or index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "little") >> 1


def _is_unset(value: Any) -> bool:
    return value is None or isinstance(value, (NotGiven, Omit))


def _is_same(given: Any, neutral: Any) -> bool:
    # type() besides ==, for 0 == False.
    try:
        return type(given) is type(neutral) and bool(given == neutral)
    except ValueError:  # arrays in a list have no truth value
        return False


_LABELS = ("model", "user", "metadata", "safety_identifier", "prompt_cache_key", "extra_headers", "extra_query")


def _with_extra_body(params: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(params)
    extra = merged.pop("extra_body", None)
    if _is_unset(extra):
        return merged
    if not isinstance(extra, Mapping) or not all(isinstance(key, str) for key in extra):
        raise BadRequestError(
            f"Invalid 'extra_body': must map names to values, got {shown(extra)}.",
            param="extra_body",
            code="invalid_type",
        )
    if not _is_unset(extra.get("extra_body")):
        raise BadRequestError("'extra_body' can't hold an 'extra_body'.", param="extra_body", code="invalid_value")
    if twice := [key for key in extra if not _is_unset(merged.get(key))]:
        raise BadRequestError(
            f"'{twice[0]}' is given twice, as an argument and in 'extra_body'.", param=twice[0], code="invalid_value"
        )
    return {**merged, **extra}


def _unknown(param: str, names: frozenset[str]) -> BadRequestError:
    param = param if len(param) <= 80 else param[:77] + "..."
    close = difflib.get_close_matches(param, names, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return unknown(param, hint)


def _refuse(error: ValidationError, names: frozenset[str]) -> NoReturn:
    """Turn pydantic's first complaint into a BadRequestError."""
    first = error.errors(include_url=False)[0]
    param = str(first["loc"][0])
    for part in first["loc"][1:]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part in StreamOptions.__annotations__ or first["type"] == "extra_forbidden":
            param += f".{part}"
    kind, message = first["type"], first["msg"]
    if kind == "missing":
        raise missing(param)
    if kind == "extra_forbidden":
        raise _unknown(param, frozenset())
    message = (
        message.removeprefix("Input ")
        .replace("should be", "must be")
        .replace(" a valid ", " a ")
        .replace(" a integer", " an integer")
    )
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    raise BadRequestError(f"Invalid '{param}': {message}, got {shown(first['input'])}.", param=param, code=code)
