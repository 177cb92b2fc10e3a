"""Grammars of arguments that are written one by one, not as a JSON object: in elements, or with Python's keywords."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.parsing.grammar import Rules, enforced, literal, object_schema, refusal
from cai_runtime.formats.parsing.typed import value_types

_DEFINITIONS = ("$defs", "definitions")
# Of an object's schema, what holds by itself where its properties are written in their order and no others are.
_SERVED = ("type", "properties", "required", "additionalProperties", *_DEFINITIONS, "title", "description", "$schema",
           "$comment", "examples", "default")  # fmt: skip
_OF_STRINGS = ("minLength", "maxLength", "pattern", "format", "allOf", "not", "if")


def members_of(tool: Tool, place: str) -> list[tuple[str, Mapping[str, Any], bool]]:
    """(name, schema with the definitions that it may refer to, whether it is required) of a function's parameters.

    Raises:
        ConversationError: the function's schema asks for more than each property's own schema does.
    """
    schema = object_schema(tool)
    for key in schema:
        if key not in _SERVED:
            raise refusal(place, f"/{key}", f"{key!r} of all arguments together is not enforced in this model's format")
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    for i, name in enumerate(required):
        if name not in properties:
            raise refusal(place, f"/required/{i}", f"{name!r} is required and is no property")
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    found: list[tuple[str, Mapping[str, Any], bool]] = []
    for name, part in properties.items():
        if part is False:
            continue
        part = {} if part is True else part
        found.append((name, {**part, **definitions}, name in required))
    return found


def text_value(rules: Rules, schema: Mapping[str, Any], place: str, pointer: str, end: str) -> str:
    """A value without quotes, and the marker that ends it. See `typed.typed`.

    Args:
        end: the marker.

    Raises:
        ConversationError: the schema can't be enforced in such a text.
    """
    types = value_types(schema, schema)
    if not types - {"string", "null"}:
        for key in _OF_STRINGS:
            if key in schema:
                raise refusal(place, f"{pointer}/{key}", "strings are written without quotes in this model's format")
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        if choices is None:
            if "$ref" in schema or any(key in schema for key in ("anyOf", "oneOf")):
                return _free_union(rules, schema, place, pointer, end)
            return rules.until(end)
        texts = ["null" if choice is None else str(choice) for choice in choices]
        return f"({' | '.join(map(literal, texts))}) {rules.blank()} {rules.marker(end)}"
    if "string" in types:
        raise refusal(place, pointer, "a string and another type can't be told apart in this model's format")
    value = rules.add("value", enforced(schema, place, pointer))
    return f"{value} {rules.blank()} {rules.marker(end)}"


def _free_union(rules: Rules, schema: Mapping[str, Any], place: str, pointer: str, end: str) -> str:
    """A string or null, whichever: any text, unless one of them is constrained."""
    from cai_runtime.formats.parsing.typed import schema_parts

    for part in schema_parts(schema, schema):
        for key in (*_OF_STRINGS, "enum", "const"):
            if key in part:
                raise refusal(place, pointer, f"{key!r} of an alternative is not enforced in this model's format")
    return rules.until(end)


def keywords(rules: Rules, members: list[tuple[str, str, bool]]) -> str:
    """Arguments with commas between them, the required ones first.

    Args:
        members: (name, expression with the name, whether it is required).
    """
    required = [expression for _, expression, needed in members if needed]
    optional = [expression for _, expression, needed in members if not needed]
    rest = [rules.add("more", f'(", " {expression})?') for expression in optional]
    if required:
        return " ".join([' ", " '.join(required), *rest])
    firsts = [" ".join([expression, *rest[i + 1 :]]) for i, expression in enumerate(optional)]
    return f"({' | '.join(firsts)})?" if firsts else ""
