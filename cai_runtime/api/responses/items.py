"""The items of a Responses request: checked, brought into the shape in which they are stored, put into messages.

An item is a dict in the shape of the `openai` package's ResponseItem, with an id. Items are never changed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cai_runtime.api.errors import BadRequestError, invalid, missing
from cai_runtime.api.responses.params import listed, mapping, refused, text_field
from cai_runtime.errors import ConversationError
from cai_runtime.formats.messages import PART_CAPABILITIES, refuse_media
from cai_runtime.scalars import shown

Item = Mapping[str, Any]
ROLES = ("user", "assistant", "system", "developer")
_STATUSES = ("in_progress", "completed", "incomplete")
_MEDIA_PARTS = ("input_image", "input_audio")
# What a part of another type would need of the model.
_CAPABILITIES = {"input_file": "file", **PART_CAPABILITIES}
# Of items that a reply or a listing has given, and of the `openai` package's `parse`.
_IGNORED_KEYS = ("status", "created_by", "caller", "parsed_arguments")


def new_id(prefix: str) -> str:
    """Such as "msg_" and 48 hexadecimal digits."""
    return f"{prefix}_{secrets.token_hex(24)}"


def parse_input(value: Any, find: Callable[[str], Item | None]) -> list[Item]:
    """The items of `input`.

    Args:
        value: a text, which is a user's message, or a list of items: dicts or the `openai` package's objects.
        find: the stored item of an id, for references.

    Raises:
        BadRequestError, ConversationError: `.param` names the place, such as `input[1].content[0]`.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [_message("user", [_input_text(value)], new_id("msg"))]
    items = [_parse_item(given, f"input[{i}]", find) for i, given in enumerate(listed(value, "input"))]
    if not items:
        raise invalid("input", "must hold at least one item")
    return items


def check_calls(items: Sequence[Item], new: int) -> None:
    """Every output answers a call before it, and every call has an output before the next message.

    Args:
        items: the whole conversation.
        new: how many of them, at the end, are the request's `input`.

    Raises:
        BadRequestError: naming the item.
    """
    before = len(items) - new
    waiting: dict[str, int] = {}  # a call without output -> where it is
    for i, item in enumerate(items):
        place = f"input[{i - before}]"
        call = item.get("call_id")
        if item["type"] == "function_call":
            if call in waiting:
                raise invalid(f"{place}.call_id", f"is {shown(call)}, which another call has")
            waiting[str(call)] = i
        elif item["type"] == "function_call_output":
            if call not in waiting:
                raise invalid(
                    f"{place}.call_id", f"is {shown(call)}, but there is no such call that waits for an output"
                )
            del waiting[str(call)]
        elif item["type"] == "message" and item["role"] != "assistant":
            _refuse_waiting(waiting)
    _refuse_waiting(waiting)


def _refuse_waiting(waiting: Mapping[str, int]) -> None:
    if waiting:
        raise invalid("input", f"has no function_call_output for the call {shown(next(iter(waiting)))}")


def remembered(items: Iterable[Item]) -> list[Item]:
    """What of a response's output the next one sees: a call that was cut off is no call."""
    return [item for item in items if item["type"] != "function_call" or item.get("status") != "incomplete"]


def _parse_item(given: Any, place: str, find: Callable[[str], Item | None]) -> Item:
    fields = mapping(given, place)
    kind = fields.get("type")
    if kind is None:
        kind = "message" if "role" in fields else "item_reference" if set(fields) == {"id"} else None
    match kind:
        case "message":
            return _parse_message(fields, place)
        case "function_call":
            return _parse_call(fields, place)
        case "function_call_output":
            return _parse_output(fields, place)
        case "reasoning":
            return _parse_reasoning(fields, place)
        case "item_reference":
            mapping(fields, place, ("type", "id"))
            item = find(text_field(fields, "id", place))
            if item is None:
                raise BadRequestError(
                    f"Invalid '{place}.id': no item {shown(fields['id'])} is stored in this client.",
                    param=f"{place}.id",
                    code="item_not_found",
                )
            return item
        case None:
            raise invalid(place, "needs a type, or a role if it is a message")
        case str():
            raise refused(f"{place}.type", f"{shown(kind)} items are not supported: their tools are not built in")
        case _:
            raise invalid(f"{place}.type", f"must be a string, got {shown(kind)}", "invalid_type")


def _parse_message(fields: dict[str, Any], place: str) -> Item:
    mapping(fields, place, ("type", "id", "role", "content", "phase", *_IGNORED_KEYS))
    role = text_field(fields, "role", place)
    if role not in ROLES:
        raise invalid(f"{place}.role", f"must be one of {', '.join(ROLES)}, got {shown(role)}")
    if "content" not in fields:
        raise missing(f"{place}.content")
    parts = _parts(fields["content"], f"{place}.content", role)
    if role != "assistant":
        if "phase" in fields:
            raise invalid(f"{place}.phase", "is of an assistant's messages alone")
        return _message(role, parts, _id(fields, place, "msg"), _status(fields, place))
    phase = fields.get("phase")
    if phase not in (None, "commentary", "final_answer"):
        raise invalid(f"{place}.phase", f"must be commentary or final_answer, got {shown(phase)}")
    return {
        "id": _id(fields, place, "msg"),
        "type": "message",
        "role": "assistant",
        "status": _status(fields, place),
        "content": [{"type": "output_text", "text": part["text"], "annotations": []} for part in parts],
        **({} if phase is None else {"phase": phase}),
    }


def _parse_call(fields: dict[str, Any], place: str) -> Item:
    mapping(fields, place, ("type", "id", "call_id", "name", "arguments", *_IGNORED_KEYS))
    return {
        "id": _id(fields, place, "fc"),
        "type": "function_call",
        "call_id": text_field(fields, "call_id", place),
        "name": text_field(fields, "name", place),
        "arguments": text_field(fields, "arguments", place),
        "status": _status(fields, place),
    }


def _parse_output(fields: dict[str, Any], place: str) -> Item:
    mapping(fields, place, ("type", "id", "call_id", "output", *_IGNORED_KEYS))
    call = text_field(fields, "call_id", place)
    if "output" not in fields:
        text_field(fields, "output", place)
    output = fields["output"]
    if not isinstance(output, str):
        output = _parts(output, f"{place}.output", "tool")
    return {
        "id": _id(fields, place, "fco"),
        "type": "function_call_output",
        "call_id": call,
        "output": output,
        "status": _status(fields, place),
    }


def _parse_reasoning(fields: dict[str, Any], place: str) -> Item:
    mapping(fields, place, ("type", "id", "summary", "content", "encrypted_content", *_IGNORED_KEYS))
    if "encrypted_content" in fields:
        raise refused(f"{place}.encrypted_content", "it can't be read here: leave it out, or send the content itself")
    parts: dict[str, list[dict[str, str]]] = {}
    for key, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        parts[key] = []
        for i, part in enumerate(listed(fields.get(key, []), f"{place}.{key}")):
            where = f"{place}.{key}[{i}]"
            part = mapping(part, where, ("type", "text"))
            if part.get("type") != kind:
                raise invalid(f"{where}.type", f"must be {kind!r}, got {shown(part.get('type'))}")
            parts[key].append({"type": kind, "text": text_field(part, "text", where)})
    return {"id": _id(fields, place, "rs"), "type": "reasoning", **parts, "status": _status(fields, place)}


def _parts(content: Any, place: str, role: str) -> list[dict[str, Any]]:
    """The parts of a message's content, or the one that a plain string is. Images and audio are checked as to their shape;
    what they hold is checked with the messages."""
    if isinstance(content, str):
        return [_input_text(str(content))]
    parts = listed(content, place)
    if not parts:
        raise invalid(place, "must hold at least one part")
    return [_part(mapping(part, f"{place}[{i}]"), f"{place}[{i}]", role) for i, part in enumerate(parts)]


def _part(part: dict[str, Any], place: str, role: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind in _MEDIA_PARTS:
        refuse_media(kind, role, place)
        return _image(part, place) if kind == "input_image" else mapping(part, place, ("type", "input_audio"))
    if isinstance(kind, str) and (capability := _CAPABILITIES.get(kind)):
        raise ConversationError(
            f"'{place}': this model can't take {kind} parts: it lacks the capability '{capability}'.",
            param=place,
            capability=capability,
        )
    if kind == "refusal":
        mapping(part, place, ("type", "refusal"))
        return _input_text(text_field(part, "refusal", place))
    if kind not in ("input_text", "output_text", "text"):
        raise invalid(f"{place}.type", f"must be input_text or output_text, got {shown(kind)}")
    mapping(part, place, ("type", "text", "annotations", "logprobs", "parsed"))
    return _input_text(text_field(part, "text", place))


def _image(part: dict[str, Any], place: str) -> dict[str, Any]:
    if "file_id" in part:
        raise refused(f"{place}.file_id", "no files are stored here: give image_url, such as a data URI")
    mapping(part, place, ("type", "image_url", "detail"))
    return {
        "type": "input_image",
        "image_url": text_field(part, "image_url", place),
        "detail": part.get("detail", "auto"),
    }


def _message(role: str, content: list[dict[str, Any]], item_id: str, status: str = "completed") -> Item:
    return {"id": item_id, "type": "message", "role": role, "status": status, "content": content}


def _input_text(text: str) -> dict[str, Any]:
    return {"type": "input_text", "text": text}


def _id(fields: Mapping[str, Any], place: str, prefix: str) -> str:
    return text_field(fields, "id", place) if "id" in fields else new_id(prefix)


def _status(fields: Mapping[str, Any], place: str) -> str:
    status = fields.get("status", "completed")
    if status not in _STATUSES:
        raise invalid(f"{place}.status", f"must be one of {', '.join(_STATUSES)}, got {shown(status)}")
    return str(status)
