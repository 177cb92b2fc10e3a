"""The parameters of `responses.create`: their types and ranges, and what is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, SkipValidation, TypeAdapter, with_config

from cai_runtime.api.errors import BadRequestError, invalid, missing, unknown
from cai_runtime.api.logprobs import MAX_CHAT_TOP
from cai_runtime.api.params import STRICT, SamplingOptions, validated
from cai_runtime.api.values import Flag, Whole
from cai_runtime.scalars import shown

_NOTHING_BUILT_IN = "no tools are built in; functions are called by the program itself"


@with_config(STRICT)
class ResponseParams(SamplingOptions, total=False):
    """Keyword arguments of `responses.create`, besides `stream` (default false).

    input: a text, or a list of items: messages, function calls and their outputs, reasoning, references to stored items.
    instructions: a system message before all else. Those of a previous response are not carried over.
    max_output_tokens: at least 1; reasoning counts. Default: the rest of the context.
    metadata: up to 16 strings by name, of at most 64 characters for a name and 512 for a value; comes back in the reply.
    store: keep the response in this client, for `retrieve` and `previous_response_id`. Default false.
    previous_response_id: of a stored response, whose input and output come before `input`.
    text: `{"format": ...}`: `{"type": "text"}`, `{"type": "json_object"}`, or
        `{"type": "json_schema", "name": ..., "schema": {...}, "strict": bool}`. `verbosity` can't be other than "medium".
    tools: functions, `{"type": "function", "name": ..., "parameters": {...}, "strict": bool}`. strict is false by default.
    tool_choice: "auto" (default), "none", "required", `{"type": "function", "name": ...}`, or
        `{"type": "allowed_tools", "mode": "auto" or "required", "tools": [...]}`: the model then sees these tools alone.
    parallel_tool_calls: whether one answer may have several calls. Default true.
    reasoning: `{"effort": ...}`: none, low, medium, high, xhigh, max. There are no summaries: the reasoning itself is
        the content of the response's reasoning items.
    truncation: "disabled" (default): input that does not fit the context is refused. "auto": the oldest turns are left
        out until it fits.
    include: ["message.output_text.logprobs"]: with the log probabilities of the text's tokens.
    top_logprobs: 0 to 20, with `include`: that many likeliest tokens beside each. Default 0.
    stream_options: `{"include_obfuscation": false}`, with `stream=True` only.
    chat_template, reasoning_enabled, reasoning_max_tokens: as in chat.
    regex, grammar, choice: what the answer must be, as in chat; none of them beside a `text.format` other than text.
    background: false. max_tool_calls, conversation, prompt, service_tier and the like: see `UNSUPPORTED`.

    The others are those of SamplingOptions, our extensions of the `openai` client among them.
    """

    input: Annotated[str | Iterable[Any], SkipValidation] | None  # items.py checks it: its errors name places
    instructions: str | None
    max_output_tokens: Annotated[Whole, Field(ge=1)] | None
    metadata: Annotated[Mapping[str, str], SkipValidation] | None
    store: Flag | None
    previous_response_id: str | None
    text: Annotated[Mapping[str, Any], SkipValidation] | None
    tools: Annotated[Iterable[Any], SkipValidation] | None
    tool_choice: Annotated[str | Mapping[str, Any], SkipValidation] | None
    parallel_tool_calls: Flag | None
    reasoning: Annotated[Mapping[str, Any], SkipValidation] | None
    truncation: Literal["auto", "disabled"] | None
    include: Annotated[Iterable[str], SkipValidation] | None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_CHAT_TOP)] | None
    stream_options: Annotated[Mapping[str, Any], SkipValidation] | None
    chat_template: str | None
    reasoning_enabled: Flag | None
    reasoning_max_tokens: Annotated[Whole, Field(ge=1)] | None
    regex: Annotated[str, SkipValidation] | None
    grammar: Annotated[str, SkipValidation] | None
    choice: Annotated[Sequence[str], SkipValidation] | None


@with_config(STRICT)
class _ResponseCall(ResponseParams, total=False):
    stream: Flag | None


UNSUPPORTED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "access_programs": ("there are no access programs in-process", ()),
    "background": ("run the call in a thread of your own, or use AsyncClient", (False,)),
    "background_options": ("there are no background responses", ()),
    "context_management": ("compaction is not supported; see `truncation`", ([], ())),
    "conversation": ("there are no stored conversations; see `previous_response_id`", ()),
    "image": ("images are not supported", ()),
    "max_tool_calls": (_NOTHING_BUILT_IN, ()),
    "moderation": ("moderation is not supported", ()),
    "prompt": ("there are no stored prompts; see `instructions`", ()),
    "prompt_cache_options": ("not supported", ()),
    "prompt_cache_retention": ("not supported", ()),
    "service_tier": ("there are no service tiers in-process", ("auto", "default")),
    "verbosity": ("it is a field of `text`, of which local models know 'medium' alone", ("medium",)),
}
INCLUDABLE: dict[str, str | None] = {  # why it is refused; None: it is served
    "message.output_text.logprobs": None,
    "reasoning.encrypted_content": "the reasoning is there as it is, in the content of reasoning items",
    "file_search_call.results": _NOTHING_BUILT_IN,
    "web_search_call.results": _NOTHING_BUILT_IN,
    "web_search_call.action.sources": _NOTHING_BUILT_IN,
    "code_interpreter_call.outputs": _NOTHING_BUILT_IN,
    "computer_call_output.output.image_url": _NOTHING_BUILT_IN,
    "message.input_image.image_url": "images are not supported",
}
_ADAPTER: TypeAdapter[Any] = TypeAdapter(_ResponseCall)
NAMES = frozenset(_ResponseCall.__annotations__) | frozenset(UNSUPPORTED)


def checked_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The given parameters; those with a shape of their own (input, tools, text, …) are checked by who reads them.

    Raises:
        BadRequestError: naming the parameter at fault.
    """
    checked = validated(_ADAPTER, params, names=NAMES, unsupported=UNSUPPORTED)
    if "metadata" in checked:
        checked["metadata"] = _metadata(checked["metadata"])
    include = checked["include"] = included(checked.get("include", []))
    if checked.get("top_logprobs") and not include:
        raise invalid("top_logprobs", "needs include=['message.output_text.logprobs']")
    options = mapping(checked.pop("stream_options", {}), "stream_options", ("include_obfuscation",))
    if options.get("include_obfuscation") not in (None, False):
        raise invalid("stream_options.include_obfuscation", "can't be true: no network carries these events")
    return checked


def refused(param: str, reason: str) -> BadRequestError:
    return BadRequestError(f"'{param}' can't be used: {reason}.", param=param, code="unsupported_parameter")


def mapping(value: Any, place: str, keys: Iterable[str] | None = None) -> dict[str, Any]:
    """An object's given fields, those that are None left out. keys: the fields that it may have; None: any."""
    if hasattr(value, "model_dump") and not isinstance(value, type):  # an object of the `openai` package
        value = value.model_dump(by_alias=True, exclude_unset=True)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise invalid(place, f"must be an object, got {shown(value)}", "invalid_type")
    fields = {key: field for key, field in value.items() if field is not None}
    if keys is not None and (others := [key for key in fields if key not in keys]):
        raise unknown(f"{place}.{others[0][:80]}")
    return fields


def listed(value: Any, place: str) -> list[Any]:
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise invalid(place, f"must be a list, got {shown(value)}", "invalid_type")
    return list(value)


def text_field(fields: Mapping[str, Any], key: str, place: str) -> str:
    """A text that must be there."""
    if key not in fields:
        raise missing(f"{place}.{key}")
    if not isinstance(fields[key], str):
        raise invalid(f"{place}.{key}", f"must be a string, got {shown(fields[key])}", "invalid_type")
    return str(fields[key])


def _metadata(value: Any) -> dict[str, str]:
    fields = mapping(value, "metadata")
    if len(fields) > 16:
        raise invalid("metadata", f"may have at most 16 names, got {len(fields)}")
    for key, text in fields.items():
        if not isinstance(text, str):
            raise invalid("metadata", f"must map names to strings, got {shown(text)} for {shown(key)}", "invalid_type")
        if len(key) > 64 or len(text) > 512:
            raise invalid("metadata", "may have names of 64 characters and values of 512, at most")
        if not (key + text).isprintable() and any("\ud800" <= char <= "\udfff" for char in key + text):
            raise invalid("metadata", "holds half of a surrogate pair, which is no text")
    return fields


def included(value: Any) -> list[str]:
    names = listed(value, "include")
    for name in names:
        if not isinstance(name, str) or name not in INCLUDABLE:
            raise invalid("include", f"may hold {', '.join(map(repr, INCLUDABLE))}, got {shown(name)}")
        if reason := INCLUDABLE[name]:
            raise refused("include", f"{name!r} can't be included: {reason}")
    return names
