"""Arguments that are written as text between tags, without quotes: their types are those of the function's schema."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.parsing.json_call import json_value
from cai_runtime.formats.parsing.malformed import Malformed
from cai_runtime.formats.parsing.python_literal import python_value
from cai_runtime.formats.parsing.stream import Stream
from cai_runtime.grammars.pointers import pointed

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.0+)?")
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_KINDS = {dict: "object", list: "array", bool: "boolean", type(None): "null", int: "number", float: "number"}
MAX_REFERENCES = 32


class Members:
    """Tells a call whose arguments are written one by one, once the first of them is complete.

    Args:
        name: the function's.
        tool: the function; None: an unknown one, whose arguments are strings.
    """

    def __init__(self, stream: Stream, name: str, tool: Tool | None):
        self._stream, self._name = stream, name
        self._schema = (tool.parameters if tool else None) or {}
        self._separator = "{"

    def add(self, name: str, text: str) -> None:
        """An argument whose element was closed."""
        self.add_json(name, typed(text, parameter_schema(self._schema, name), self._schema))

    def add_json(self, name: str, value: str) -> None:
        if self._separator == "{":
            self._stream.call(self._name, as_json=False)
        self._stream.arguments(f"{self._separator}{json.dumps(name, ensure_ascii=False)}: {value}")
        self._separator = ", "

    def close(self) -> None:
        """The call ends."""
        if self._separator == "{":
            self._stream.call(self._name)
        self._stream.arguments("{}" if self._separator == "{" else "}")
        self._stream.end_arguments()
        self._stream.end_call()


def parameter_schema(schema: Mapping[str, Any], name: str) -> Any:
    """The schema of one parameter, wherever the function's schema has it."""
    for part in schema_parts(schema, schema):
        properties = part.get("properties")
        if isinstance(properties, Mapping) and name in properties:
            return properties[name]
    return {}


def typed(text: str, schema: Any, root: Mapping[str, Any]) -> str:
    """The JSON of a value: of a type that the schema allows, or a string.

    Args:
        schema: of the value. root: what its references refer to.
    """
    types = value_types(schema, root)
    stripped = text.strip()
    value = _PYTHON.get(stripped, stripped)
    if "integer" in types and _INTEGER.fullmatch(value):
        return value.partition(".")[0]
    if types - {"string"}:
        for read in (_as_it_is, python_value):
            with contextlib.suppress(Malformed):
                written, kind = json_value(read(value))
                if kind in types:
                    return written
    return json.dumps(text, ensure_ascii=False)


def _as_it_is(text: str) -> str:
    return text


def value_types(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """JSON's names of the types that a schema names; empty if it names none, so that the value is a string."""
    found: set[str] = set()
    for part in schema_parts(schema, root):
        kind = part.get("type")
        found.update([kind] if isinstance(kind, str) else kind if isinstance(kind, (list, tuple)) else ())
        for value in [*(part.get("enum") or ()), *([part["const"]] if "const" in part else ())]:
            found.add(_KINDS.get(type(value), "string"))
        if part.get("nullable"):
            found.add("null")
    return found


def schema_parts(schema: Any, root: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schema and what it refers to and combines."""
    waiting, seen = [schema], 0
    while waiting and seen < MAX_REFERENCES:
        part = waiting.pop()
        if not isinstance(part, Mapping):
            continue
        seen += 1
        yield part
        for key in ("anyOf", "oneOf", "allOf"):
            waiting += part.get(key) or ()
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            waiting.append(resolved(reference, root))


def resolved(reference: str, root: Any) -> Any:
    """What a reference into the same document leads to; None if to nothing."""
    try:
        return pointed(reference.removeprefix("#"), root)
    except LookupError:
        return None
