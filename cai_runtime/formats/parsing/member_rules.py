"""Grammars of arguments that are written one by one, not as a JSON object: in elements, or with Python's keywords."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.parsing.grammar import Rules, enforced, literal, object_schema, refusal
from cai_runtime.formats.parsing.typed import resolved, schema_parts, typed, value_types
from cai_runtime.grammars.pointers import escaped

NEWLINE = literal("\n")
_DEFINITIONS = ("$defs", "definitions")
_NOTES = (*_DEFINITIONS, "title", "description", "$schema", "$comment", "examples", "default")
# Of an object's schema, what holds by itself where its properties are written in their order and no others are.
_SERVED = ("type", "properties", "required", "additionalProperties", *_NOTES)
_OF_STRINGS = ("minLength", "maxLength", "pattern", "format", "allOf")
# Names between tags.
_TAGGED_NAME = re.compile(r"[^<>\s](?:[^<>\n]*[^<>\s])?")


@dataclass(frozen=True)
class Member:
    """A function's parameter. schema: with the definitions that it may refer to. pointer: of it, in the function's."""

    name: str
    schema: Mapping[str, Any]
    required: bool
    pointer: str


def members_of(tool: Tool, place: str, names: re.Pattern[str]) -> list[Member]:
    """A function's parameters, in the order of its schema.

    Args:
        names: those that the format can write, and read back.

    Raises:
        ConversationError: the function's schema asks for more than each property's own schema does, or the format can't
            write a name.
    """
    schema = object_schema(tool)
    enforced(schema, place)
    for key in schema:
        if key not in _SERVED:
            raise refusal(place, f"/{key}", f"{key!r} of all arguments together is not enforced in this model's format")
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    for i, name in enumerate(required):
        if properties.get(name, False) is False:
            raise refusal(place, f"/required/{i}", f"{name!r} is required and is no property that may have a value")
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    found = []
    for name, part in properties.items():
        if part is False:
            continue
        pointer = f"/properties/{escaped(name)}"
        if not names.fullmatch(name):
            raise refusal(place, pointer, f"this model's format can't write an argument's name like {name!r}")
        found.append(Member(name, {**({} if part is True else part), **definitions}, name in required, pointer))
    return found


def tagged_arguments(
    rules: Rules, tool: Tool, place: str, head: Callable[[str], str], end: str, layout: str = ""
) -> str:
    """Arguments in elements, in the order of the function's schema, with a line break behind each.

    Args:
        head: the expression of what is before a value, by the argument's name.
        end: the marker behind a value. layout: see `_text_value`.

    Raises:
        ConversationError: as `members_of`, and for a schema that can't be enforced in a value without quotes.
    """
    parts = []
    for member in members_of(tool, place, _TAGGED_NAME):
        value = _text_value(rules, member, place, end, layout)
        part = rules.add("argument", f"{head(member.name)} {value} {NEWLINE}")
        parts.append(part if member.required else f"({part})?")
    return " ".join(parts)


def _text_value(rules: Rules, member: Member, place: str, end: str, layout: str) -> str:
    """A value without quotes, and the marker that ends it. See `typed.typed`.

    Args:
        end: the marker.
        layout: what is written between a text and the marker, and is no part of it.

    Raises:
        ConversationError: the schema can't be enforced in such a text.
    """
    schema, pointer = member.schema, member.pointer
    expression = enforced(schema, place, pointer)
    types = value_types(schema, schema)
    if types and "string" not in types:
        return f"{rules.add('value', expression)} {rules.blank()} {rules.marker(end)}"
    if types - {"string", "null"}:
        raise refusal(place, pointer, "a string and another type can't be told apart in this model's format")
    texts: list[str] = []
    is_free = False
    for leaf in _leaves(schema, schema):
        for key in _OF_STRINGS:
            if key in leaf:
                raise refusal(place, f"{pointer}/{key}", "strings are written without quotes in this model's format")
        key = "const" if "const" in leaf else "enum"
        if key in leaf:
            texts += _choices(leaf, key)
        elif value_types(leaf, schema) == {"null"}:
            texts.append("null")
        elif any("enum" in part or "const" in part for part in schema_parts(leaf, schema)):
            raise refusal(place, pointer, "such a combination of texts is not enforced in this model's format")
        else:
            is_free = True
    if is_free:
        return rules.until(end)
    for text in texts:
        if end in text or json.loads(typed(text, schema, schema)) != (None if text == "null" else text):
            raise refusal(place, pointer, f"this model's format can't write the text {text!r}")
    return f"({' | '.join(map(literal, texts))}) {literal(layout) if layout else ''} {rules.marker(end)}"


def _leaves(schema: Any, root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A schema's alternatives, through references."""
    if not isinstance(schema, Mapping):  # true; false was refused
        return [{}]
    says = schema.keys() - set(_NOTES)
    if says == {"$ref"}:
        return _leaves(resolved(schema["$ref"], root), root)
    if says in ({"anyOf"}, {"oneOf"}):
        return [leaf for part in schema[says.pop()] for leaf in _leaves(part, root)]
    return [schema]


def _choices(leaf: Mapping[str, Any], key: str) -> list[str]:
    """The texts of an enum's or a const's values, those that the schema's type allows."""
    values = [leaf["const"]] if key == "const" else leaf["enum"]
    kinds = value_types({"type": leaf["type"]}, leaf) if "type" in leaf else {"string", "null"}
    return ["null" if v is None else v for v in values if ("null" if v is None else "string") in kinds]


def keywords(rules: Rules, members: list[tuple[str, bool]]) -> str:
    """Arguments with commas between them, the required ones first.

    Args:
        members: (expression of an argument, whether it is required).
    """
    required = [expression for expression, needed in members if needed]
    optional = [expression for expression, needed in members if not needed]
    rest = [rules.add("more", f'(", " {expression})?') for expression in optional]
    if required:
        return " ".join([' ", " '.join(required), *rest])
    firsts = [" ".join([expression, *rest[i + 1 :]]) for i, expression in enumerate(optional)]
    return f"({' | '.join(firsts)})?" if firsts else ""
