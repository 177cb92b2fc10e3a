"""Checks a conversation as it came from a caller and brings it into the one shape that chat templates take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cai_runtime.errors import ConversationError
from cai_runtime.formats.traced_text import content, own
from cai_runtime.scalars import shown

ContentForm = Literal["text", "parts", "both"]
ROLES = ("system", "user", "assistant")
# What a part of another type would need, for the error.
PART_CAPABILITIES = {"image_url": "image", "image": "image", "input_audio": "audio", "audio": "audio", "file": "file"}
# Fields that our own replies carry as null, and that mean nothing then.
_LATER_FIELDS = {
    "tool_calls": "tools",
    "function_call": "tools",
    "tool_call_id": "tools",
    "audio": "audio",
    "refusal": None,
    "annotations": None,
    "reasoning_content": None,
}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `role` is system, user or assistant; `content` a text, or the texts of its parts."""

    role: str
    content: str | tuple[str, ...]
    name: str | None = None

    def for_template(self, takes: ContentForm = "text") -> dict[str, Any]:
        """The dict a chat template sees: the role as the template's own text, all else as a caller's.

        Args:
            takes: the kind of content that the template takes for this role. "text": parts are joined with a line
                break. "parts": a list of `{"type": "text", "text": ...}`. "both": the kind that the caller gave.
        """
        turn: dict[str, Any] = {"role": own(self.role)}
        if takes == "parts" or (takes == "both" and not isinstance(self.content, str)):
            parts = (self.content,) if isinstance(self.content, str) else self.content
            turn["content"] = [{"type": own("text"), "text": content(part)} for part in parts]
        else:
            turn["content"] = content(self.content if isinstance(self.content, str) else "\n".join(self.content))
        return turn if self.name is None else {**turn, "name": content(self.name)}


def parse_messages(messages: Any) -> list[Message]:
    """A conversation as a list of Message.

    Args:
        messages: dicts (or of the `openai` package's message objects) with `role`: system, developer (the
            same as system), user or assistant; `content`: a string, or a list of `{"type": "text", "text": ...}`
            parts; and optionally `name`, a string.

    Raises:
        ConversationError: `.param` names the place, such as `messages[1].content[0]`.
    """
    if not isinstance(messages, Iterable) or isinstance(messages, (str, bytes, Mapping)):
        raise ConversationError(f"'messages' must be a list of messages, got {type(messages).__name__}.")
    messages = list(messages)
    if not messages:
        raise ConversationError("'messages' must hold at least one message.")
    return [_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _parse_message(message: Any, place: str) -> Message:
    # A reply's message, put back into the conversation; not its class.
    if hasattr(message, "model_dump") and not isinstance(message, type):
        message = message.model_dump(exclude_none=True)
    if not isinstance(message, Mapping):
        raise ConversationError(f"'{place}' must be an object with role and content.", param=place)
    fields = {key: value for key, value in message.items() if value is not None}
    given = fields.get("role")
    if given is None:
        raise ConversationError(f"Missing required parameter: '{place}.role'.", param=f"{place}.role")
    # An array compares element by element, a subclass of str as it likes.
    role = str.__str__(given) if isinstance(given, str) else None
    if role in ("tool", "function"):
        raise ConversationError(
            f"'{place}.role': {role} messages are not supported yet.", param=f"{place}.role", capability="tools"
        )
    if role == "developer":
        role = "system"
    if role not in ROLES:
        raise ConversationError(
            f"'{place}.role' must be one of {', '.join(ROLES)}, got {shown(given)}.", param=f"{place}.role"
        )
    for key in fields:
        if key in _LATER_FIELDS:
            if not (isinstance(fields[key], (list, tuple)) and not fields[key]):
                raise ConversationError(
                    f"'{place}.{key}' is not supported yet.", param=f"{place}.{key}", capability=_LATER_FIELDS[key]
                )
        elif key not in ("role", "content", "name"):
            raise ConversationError(f"Unknown parameter: '{place}.{key}'.", param=f"{place}.{key}")
    name = fields.get("name")
    if name is not None:
        name = _parse_text(name, f"{place}.name")
    if "content" not in fields:
        raise ConversationError(f"Missing required parameter: '{place}.content'.", param=f"{place}.content")
    return Message(role, _parse_content(fields["content"], f"{place}.content"), name)


def _parse_content(content: Any, place: str) -> str | tuple[str, ...]:
    if isinstance(content, str):
        return _parse_text(content, place)
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise ConversationError(f"'{place}' must be a string or a list of content parts.", param=place)
    if not content:
        raise ConversationError(f"'{place}' must hold at least one part.", param=place)
    return tuple(_parse_part(part, f"{place}[{i}]") for i, part in enumerate(content))


def _parse_part(part: Any, place: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ConversationError(f"'{place}' must be an object with a type.", param=place)
    kind = part["type"]
    if capability := PART_CAPABILITIES.get(kind):
        raise ConversationError(
            f"'{place}': this model can't take {kind} parts: it lacks the capability '{capability}'.",
            param=place,
            capability=capability,
        )
    if kind != "text":
        raise ConversationError(f"'{place}.type' must be 'text', got {kind!r}.", param=f"{place}.type")
    if unknown := [key for key in part if key not in ("type", "text")]:
        raise ConversationError(f"Unknown parameter: '{place}.{unknown[0]}'.", param=f"{place}.{unknown[0]}")
    return _parse_text(part.get("text"), f"{place}.text")


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
    return str(text)
