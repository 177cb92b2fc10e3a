"""Checks a conversation as it came from a caller. What templates are given of it is in `history`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai_runtime.errors import ConversationError
from cai_runtime.formats.media import Media, RemoteMedia, parse_audio, parse_image
from cai_runtime.formats.traced_text import plain
from cai_runtime.scalars import shown

ROLES = ("system", "developer", "user", "assistant", "tool")
MEDIA_PARTS = {"image_url": parse_image, "input_audio": parse_audio}
MEDIA_ROLES = ("user",)
# What a part of another type would need, for the error.
PART_CAPABILITIES = {"image": "image", "audio": "audio", "file": "file"}
# Fields that replies carry as null or empty, and that mean nothing then.
_UNSERVED_FIELDS = {"audio": "audio", "refusal": None, "annotations": None}
_DEPRECATED = "is deprecated and not served: use 'tools', 'tool_calls' and messages of the role 'tool'."
MAX_DEPTH = 64  # of JSON values in one another


@dataclass(frozen=True)
class Call:
    """A function call in an assistant's message. arguments: a JSON object, as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    role: one of ROLES. content: a text, or its parts: texts, and of a user images and audio; None only beside `calls` or
    `reasoning`. calls, reasoning: of an assistant; the latter is its thought. call_id: of a tool's message, the call that it
    is the result of.
    """

    role: str
    content: str | tuple[str | Media | RemoteMedia, ...] | None
    name: str | None = None
    calls: tuple[Call, ...] = ()
    call_id: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        """The content's texts as one; parts are joined with a line break."""
        if isinstance(self.content, tuple):
            return "\n".join(self._texts)
        return self.content or ""

    @property
    def media(self) -> tuple[Media | RemoteMedia, ...]:
        """The images and audio of its content."""
        parts = self.content if isinstance(self.content, tuple) else ()
        return tuple(part for part in parts if not isinstance(part, str))

    @property
    def _texts(self) -> list[str]:
        parts = self.content if isinstance(self.content, tuple) else (self.content or "",)
        return [part for part in parts if isinstance(part, str)]

    @property
    def characters(self) -> int:
        """Of all its texts."""
        texts = [*self._texts, self.name, self.reasoning]
        texts += [text for call in self.calls for text in (call.name, call.arguments)]
        return sum(len(text) for text in texts if text)


def parse_messages(messages: Any) -> list[Message]:
    """A conversation as a list of Message.

    Args:
        messages: dicts (or of the `openai` package's message objects) with `role`: system, developer, user, assistant or
            tool; `content`: a string, or a list of `{"type": "text", "text": ...}` parts; a user's may be `image_url` and
            `input_audio` parts, too (see `formats.media`); and optionally `name`, a string.
            An assistant's message may have `tool_calls` and `reasoning_content`, and then no content. A tool's message has
            `tool_call_id`.

    Raises:
        ConversationError: `.param` names the place, such as `messages[1].content[0]`. Also where a call has no result, or
            a result no call.
    """
    if not isinstance(messages, Iterable) or isinstance(messages, (str, bytes, Mapping)):
        raise ConversationError(f"'messages' must be a list of messages, got {type(messages).__name__}.")
    messages = list(messages)
    if not messages:
        raise ConversationError("'messages' must hold at least one message.")
    parsed = [_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    _check_results(parsed)
    return parsed


def parse_arguments(arguments: Any, place: str) -> dict[str, Any]:
    """The object that a call's arguments are.

    Raises:
        ConversationError: they are no text of a JSON object, or one that nests too deeply or holds half of a character.
    """
    if not isinstance(arguments, str):
        raise ConversationError(
            f"'{place}' must be a string that holds a JSON object, got {type(arguments).__name__}.", param=place
        )
    try:
        value = json.loads(arguments, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"'{place}' must hold a JSON object, and is no JSON: {error}.", param=place) from None
    if not isinstance(value, dict):
        raise ConversationError(f"'{place}' must hold a JSON object, such as {{}}.", param=place)
    check_json(value, place)
    return value


def check_json(value: Any, place: str, depth: int = MAX_DEPTH) -> None:
    """Refuse what is no JSON: other types, keys that are no texts, texts with half of a character, numbers that are not
    finite, and more than MAX_DEPTH levels.

    Raises:
        ConversationError: naming the place.
    """
    if depth == 0:
        raise ConversationError(f"'{place}' nests more than {MAX_DEPTH} levels.", param=place)
    if isinstance(value, str):
        _parse_text(value, place)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _parse_text(key, place)
            check_json(item, f"{place}.{key[:40]}", depth - 1)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_json(item, f"{place}[{i}]", depth - 1)
    elif not (value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and value - value == 0)):
        raise ConversationError(f"'{place}' is no JSON value: {type(value).__name__}.", param=place)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def given_fields(value: Any, place: str, what: str = "") -> dict[str, Any]:
    """The fields that are given of an object, which may be one of the `openai` package's.

    Args:
        what: the fields that it must have, for errors.

    Raises:
        ConversationError: it is none.
    """
    if hasattr(value, "model_dump") and not isinstance(value, type):  # an object of it, not its class
        value = value.model_dump(exclude_none=True)
    if not isinstance(value, Mapping):
        fields = f" with {what}" if what else ""
        raise ConversationError(f"'{place}' must be an object{fields}, got {shown(value)}.", param=place)
    return {key: item for key, item in value.items() if item is not None}


def _parse_message(message: Any, place: str) -> Message:
    fields = given_fields(message, place, "role and content")
    given = fields.pop("role", None)
    if given is None:
        raise ConversationError.missing(f"{place}.role")
    # An array compares element by element, a subclass of str as it likes.
    role = str.__str__(given) if isinstance(given, str) else None
    if role == "function":
        raise ConversationError(f"'{place}.role': the role 'function' {_DEPRECATED}", param=f"{place}.role")
    if role not in ROLES:
        raise ConversationError(
            f"'{place}.role' must be one of {', '.join(ROLES)}, got {shown(given)}.", param=f"{place}.role"
        )
    name, content = fields.pop("name", None), fields.pop("content", None)
    calls, reasoning = fields.pop("tool_calls", None), fields.pop("reasoning_content", None)
    call_id = fields.pop("tool_call_id", None)
    fields.pop("parsed", None)  # the openai package's own reading of the content, in replies of its `parse`
    for key, value in fields.items():
        if key == "function_call":
            raise ConversationError(f"'{place}.function_call' {_DEPRECATED}", param=f"{place}.function_call")
        if key not in _UNSERVED_FIELDS:
            raise ConversationError.unknown(f"{place}.{key}")
        if not (isinstance(value, (list, tuple)) and not value):
            raise ConversationError(
                f"'{place}.{key}' is not supported.", param=f"{place}.{key}", capability=_UNSERVED_FIELDS[key]
            )
    for key, value in (("tool_calls", calls), ("reasoning_content", reasoning)):
        is_empty = value is None or (isinstance(value, (str, list, tuple)) and not value)
        if not is_empty and role != "assistant":
            raise ConversationError(f"'{place}.{key}': only messages of the assistant have it.", param=f"{place}.{key}")
    if call_id is not None and role != "tool":
        raise ConversationError(
            f"'{place}.tool_call_id': only messages of the role 'tool' have it.", param=f"{place}.tool_call_id"
        )
    parsed = Message(
        role,
        None if content is None else _parse_content(content, f"{place}.content", role),
        None if name is None else _parse_text(name, f"{place}.name"),
        _parse_calls(calls, f"{place}.tool_calls"),
        None if call_id is None else _parse_text(call_id, f"{place}.tool_call_id"),
        _parse_text(reasoning, f"{place}.reasoning_content") if reasoning else None,
    )
    if parsed.content is None and not parsed.calls and parsed.reasoning is None:
        raise ConversationError.missing(f"{place}.content")
    if role == "tool" and not call_id:
        note = ", the id of the call that this is the result of"
        raise ConversationError.missing(f"{place}.tool_call_id", note)
    return parsed


def _parse_calls(calls: Any, place: str) -> tuple[Call, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes, bytearray)):
        raise ConversationError(f"'{place}' must be a list of tool calls.", param=place)
    parsed = tuple(_parse_call(call, f"{place}[{i}]") for i, call in enumerate(calls))
    seen: set[str] = set()
    for i, call in enumerate(parsed):
        if call.id in seen:
            raise ConversationError(
                f"'{place}[{i}].id' is that of another call of this message: {call.id!r}.", param=f"{place}[{i}].id"
            )
        seen.add(call.id)
    return parsed


def _parse_call(call: Any, place: str) -> Call:
    fields = given_fields(call, place, "id, type and function")
    fields.pop("index", None)  # of a streamed call that was put together by hand
    kind = fields.pop("type", "function")
    if kind != "function":
        raise ConversationError(
            f"'{place}.type' must be 'function', got {kind!r}: custom tools are not supported.",
            param=f"{place}.type",
            capability="custom_tools" if kind == "custom" else None,
        )
    function = given_fields(fields.pop("function", None), f"{place}.function", "name and arguments")
    function.pop("parsed_arguments", None)  # the openai package's own reading of the arguments
    for inner, allowed, where in ((fields, ("id",), place), (function, ("name", "arguments"), f"{place}.function")):
        for key in allowed:
            if key not in inner:
                raise ConversationError.missing(f"{where}.{key}")
        for key in inner:
            if key not in allowed:
                raise ConversationError.unknown(f"{where}.{key}")
    parse_arguments(function["arguments"], f"{place}.function.arguments")
    texts = [_parse_text(fields["id"], f"{place}.id"), _parse_text(function["name"], f"{place}.function.name")]
    for text, where in zip(texts, (f"{place}.id", f"{place}.function.name"), strict=True):
        if not text:
            raise ConversationError(f"'{where}' must not be empty.", param=where)
    return Call(texts[0], texts[1], plain(function["arguments"]))


def _check_results(messages: Sequence[Message]) -> None:
    """Each call has one result, and the results follow the message of their calls."""
    called, open_ids, place = set[str](), dict[str, None](), ""
    for i, message in enumerate(messages):
        if message.role == "tool":
            if message.call_id not in open_ids:
                why = (
                    "has its result already"
                    if message.call_id in called
                    else "is that of no call in the message before"
                )
                raise ConversationError(
                    f"'messages[{i}].tool_call_id' {why}: {message.call_id!r}.", param=f"messages[{i}].tool_call_id"
                )
            del open_ids[message.call_id]
            continue
        _refuse_open(open_ids, place)
        place = f"messages[{i}].tool_calls"
        open_ids = dict.fromkeys(call.id for call in message.calls)
        called = set(open_ids)
    _refuse_open(open_ids, place)


def _refuse_open(open_ids: Iterable[str], place: str) -> None:
    if missing := list(open_ids):
        raise ConversationError(
            f"'{place}' must be followed by a message of the role 'tool' for each of its calls: there is none with the "
            f"tool_call_id {', '.join(map(repr, missing[:8]))}.",
            param=place,
        )


def _parse_content(content: Any, place: str, role: str) -> str | tuple[str | Media | RemoteMedia, ...]:
    if isinstance(content, str):
        return _parse_text(content, place)
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise ConversationError(f"'{place}' must be a string or a list of content parts.", param=place)
    if not content:
        raise ConversationError(f"'{place}' must hold at least one part.", param=place)
    return tuple(_parse_part(part, f"{place}[{i}]", role) for i, part in enumerate(content))


def _parse_part(part: Any, place: str, role: str) -> str | Media | RemoteMedia:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ConversationError(f"'{place}' must be an object with a type.", param=place)
    kind = part["type"]
    if parse := MEDIA_PARTS.get(kind):
        refuse_media(kind, role, place)
        return parse(part, place)
    if capability := PART_CAPABILITIES.get(kind):
        raise ConversationError(
            f"'{place}': this model can't take {kind} parts: it lacks the capability '{capability}'.",
            param=place,
            capability=capability,
        )
    if kind != "text":
        raise ConversationError(
            f"'{place}.type' must be 'text'{_or_media(role)}, got {shown(kind)}.", param=f"{place}.type"
        )
    if unknown := [key for key in part if key not in ("type", "text")]:
        raise ConversationError.unknown(f"{place}.{unknown[0]}")
    return _parse_text(part.get("text"), f"{place}.text")


def _or_media(role: str) -> str:
    return "".join(f" or {kind!r}" for kind in MEDIA_PARTS) if role in MEDIA_ROLES else ""


def refuse_media(kind: str, role: str, place: str) -> None:
    """Refuse a part that is no text in messages of a role that can't have it.

    Raises:
        ConversationError: naming the role.
    """
    if role not in MEDIA_ROLES:
        raise ConversationError(
            f"'{place}': messages of the role '{role}' can't have {kind} parts; put it into a user's message.",
            param=place,
        )


def _parse_text(text: Any, place: str) -> str:
    if not isinstance(text, str):
        raise ConversationError(f"'{place}' must be a string.", param=place)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"'{place}' holds half of a surrogate pair at character {error.start}, which is no text: it was cut inside "
            "a character, or decoded with errors='surrogateescape'.",
            param=place,
        ) from None
    return plain(text)
