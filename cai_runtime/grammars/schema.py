"""Makes a JSON schema one that llguidance enforces whole, or says which node can't be.

llguidance refuses most of what it can't enforce, without saying where. It takes some things that it does not enforce: those
are refused here, or put in other words that it enforces. What is left is its own refusals, whose node is looked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from cai_runtime.errors import GrammarError
from cai_runtime.grammars.ecma import rust_regex
from cai_runtime.grammars.numbers import MAX_MULTIPLE, common_multiple, exact_bound, inexact_number, is_number
from cai_runtime.grammars.pointers import escaped, way
from cai_runtime.grammars.string_formats import FORMATS, LABELS
from cai_runtime.scalars import shown

MAX_DEPTH = 64  # of schemas in schemas
MAX_CHAIN = 256  # of schemas that lie in, or are referred to by, the one before: llguidance's stack grows with it
# One space may follow a comma and a colon, as models write it; no other whitespace, for that could go on for ever.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")
_PLAIN = (
    "$ref", "const", "enum", "type", "minItems", "maxItems", "required", "minProperties", "maxProperties", "minLength",
    "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
)  # fmt: skip
_PLACES = (*_MAPS, *_LISTS, *_SINGLE)  # keywords under which there are schemas
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength")
# Words about a value that constrain nothing. Only the first line's are known to llguidance.
_KEPT_NOTES = ("$schema", "$comment", "title", "description", "default", "examples", "readOnly", "writeOnly")
_NOTES = ("deprecated", "example", "discriminator", "externalDocs", "xml", "contentMediaType", "contentEncoding",
          "contentSchema", "id", "$id", "$anchor")  # fmt: skip
# Keywords whose neutral values ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,), "unevaluatedItems": (True, {}), "unevaluatedProperties": (True, {}),
    "propertyNames": (True, {}), "not": (False,), "dependentRequired": ({},), "dependentSchemas": ({},),
    "dependencies": ({},), "nullable": (False,),
}  # fmt: skip
_REFUSED = (
    "contains", "minContains", "maxContains", "if", "then", "else", "$dynamicRef", "$dynamicAnchor", "$recursiveRef",
    "$recursiveAnchor", "$vocabulary",
)  # fmt: skip
_DRAFTS = ("draft/2020-12", "draft/2019-09", "draft-07", "draft-06", "draft-04")


class SchemaError(GrammarError):
    """A schema can't be enforced. `.pointer` is the JSON pointer of the node at fault."""

    def __init__(self, reason: str, pointer: str):
        self.pointer, self.reason = pointer, reason
        super().__init__(f"the schema can't be enforced at {pointer!r} (a JSON pointer): {reason}")


def make_enforceable(schema: Any) -> None:
    """Put a schema into words that llguidance enforces, in place.

    Args:
        schema: of JSON's types, as `json.loads` makes them.

    Raises:
        SchemaError: a node has what can't be enforced.
    """
    walk = _Walk(schema)
    walk.check(schema, "", 0)
    walk.check_circles()
    walk.check_multiples()
    walk.check_chains()


class _Walk:
    """Checks a document's schemas, and changes them in place."""

    def __init__(self, root: Any):
        self._pointers: dict[int, str] = {}  # by the id() of the schemas that were checked
        self._same: dict[int, list[int]] = {}  # the schemas that the same value must fit: id() -> id()s
        self._within: dict[int, list[int]] = {}  # the schemas in a schema, and the one that it refers to
        self._multiples: dict[int, Any] = {}  # id() -> multipleOf
        self.document = root
        self._id = root.get("$id") if isinstance(root, dict) else None

    def check(self, node: Any, pointer: str, depth: int) -> None:
        if isinstance(node, bool):
            return
        if not isinstance(node, dict):
            raise SchemaError(f"a schema is an object or a boolean, got {shown(node)}", pointer)
        if id(node) in self._pointers:
            return
        self._pointers[id(node)] = pointer
        if depth > MAX_DEPTH:
            raise SchemaError(f"schemas are nested more than {MAX_DEPTH} deep", pointer)
        self._check_keywords(node, pointer)
        self._check_properties_count(node, pointer)
        same = self._same[id(node)] = []
        within = self._within[id(node)] = []
        for name, child in [*_children(node)]:
            self.check(child, f"{pointer}/{name}", depth + 1)
            within.append(id(child))
            if name.startswith(("allOf/", "anyOf/", "oneOf/")):
                same.append(id(child))
        if "$ref" in node:
            same.append(id(self._referenced(node["$ref"], f"{pointer}/$ref")))
            within.append(same[-1])
        if "format" in node:
            _rewrite_format(node, pointer)

    def _check_keywords(self, node: dict[str, Any], pointer: str) -> None:
        for key in [*node]:
            value, place = node[key], f"{pointer}/{escaped(key)}"
            if key in _MAPS:
                if not isinstance(value, dict):
                    raise SchemaError(f"must be an object of schemas, got {shown(value)}", place)
                if key == "patternProperties":
                    node[key] = {_rust_regex(pattern, place): child for pattern, child in value.items()}
            elif key in _LISTS:
                if not isinstance(value, list) or not value:
                    raise SchemaError(f"must be a list of schemas, at least one, got {shown(value)}", place)
            elif key == "$schema":
                uri = str(value).removeprefix("http").removeprefix("s").removesuffix("#")
                if uri not in [f"://json-schema.org/{draft}/schema" for draft in _DRAFTS]:
                    raise SchemaError(f"the dialect {shown(value)} is not known", place)
            elif key == "$id" and not isinstance(value, str):
                raise SchemaError(f"must be a text, got {shown(value)}", place)
            elif key in ("$id", "$anchor") and node is not self.document:
                raise SchemaError("a schema inside another has a name of its own: refer to it by '#/...'", place)
            elif key == "required":
                if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                    raise SchemaError(f"must be a list of names, got {shown(value)}", place)
            elif key in ("const", "enum"):
                if (number := inexact_number(value)) is not None:
                    raise SchemaError(f"the number {shown(number)} is beyond 2^53 and can't be kept exactly", place)
            elif key in _BOUNDS and is_number(value):
                bound = exact_bound(value, is_lower=key in _BOUNDS[:2])
                if bound is None:
                    raise SchemaError(f"no number beyond 2^62 can be enforced, got {shown(value)}", place)
                node[key] = bound
            elif key == "multipleOf" and is_number(value):
                if value <= 0:
                    raise SchemaError(f"must be above 0, got {shown(value)}", place)
                self._multiples[id(node)] = value
            elif key in _NEUTRAL:
                if not any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL[key]):
                    raise SchemaError(f"'{key}' can't be enforced while a text is generated: leave it out", place)
                del node[key]
            elif key in _REFUSED:
                raise SchemaError(f"'{key}' can't be enforced while a text is generated: leave it out", place)
            elif key in _NOTES or key.startswith("x-"):
                del node[key]
            elif key in _COUNTS and isinstance(value, float) and value.is_integer():
                node[key] = int(value)
            elif key == "pattern":
                node[key] = _rust_regex(value, place)
            elif key not in _SINGLE and key not in _PLAIN and key not in _KEPT_NOTES:
                raise SchemaError(f"'{key}' is not a keyword that is known here, so it can't be enforced", place)

    def _check_properties_count(self, node: dict[str, Any], pointer: str) -> None:
        """Keys that `properties` does not name may come twice in a text, and count once in what it means."""
        least = node.get("minProperties", 0)
        if isinstance(least, (int, float)) and least > 1:
            free = node.get("additionalProperties", True) is not False or node.get("patternProperties")
            if free and least > len(set(map(str, node.get("required", ())))):
                raise SchemaError(
                    "a 'minProperties' above 1 can't be enforced where properties may have any name: name them in "
                    "'required'",
                    f"{pointer}/minProperties",
                )

    def check_circles(self) -> None:
        """Refuse a schema that asks of a value that it fits this very schema: that says nothing."""
        done: set[int] = set()
        for start in self._same:
            way = [(start, iter(self._same[start]))]
            under_way = {start}
            while way:
                node, left = way[-1]
                following = next((n for n in left if n in self._same and n not in done), None)
                if following is None:
                    done.add(node)
                    under_way.discard(node)
                    way.pop()
                elif following in under_way:
                    raise SchemaError("the schema refers to itself for the same value", self._pointers[following])
                else:
                    under_way.add(following)
                    way.append((following, iter(self._same[following])))

    def check_multiples(self) -> None:
        """Refuse steps that are too many together, where the same value may have to be a multiple of all."""
        beside: dict[int, set[int]] = {}
        for node, others in self._same.items():
            for other in others:
                beside.setdefault(node, set()).add(other)
                beside.setdefault(other, set()).add(node)
        left = dict(self._multiples)
        while left:
            start, step = left.popitem()
            steps, seen, way = [step], {start}, [start]
            while way:
                new = beside.get(way.pop(), set()) - seen
                seen |= new
                way += new
                steps += [left.pop(node) for node in new if node in left]
            if common_multiple(steps) > MAX_MULTIPLE:
                raise SchemaError(
                    f"a 'multipleOf' of more than {MAX_MULTIPLE} steps can't be enforced, nor several that are so together",
                    f"{self._pointers[start]}/multipleOf",
                )

    def check_chains(self) -> None:
        """Refuse what would overflow a stack, which ends the process."""
        lengths: dict[int, int] = {}  # of the longest chain that begins at a schema; 0 while it is looked for
        for start in self._within:
            way = [start] if start not in lengths else []
            while way:
                node = way[-1]
                following = [n for n in self._within[node] if n in self._within]
                if node not in lengths:
                    lengths[node] = 0
                    way += [n for n in following if n not in lengths]
                    continue
                way.pop()
                lengths[node] = 1 + max((lengths[n] for n in following), default=0)
                if lengths[node] > MAX_CHAIN:
                    raise SchemaError(f"more than {MAX_CHAIN} schemas follow each other", self._pointers[node])

    def _referenced(self, target: Any, place: str) -> Any:
        """The schema that a `$ref` leads to. It is one of the document's, so that the walk comes to it."""
        if not isinstance(target, str):
            raise SchemaError(f"must be a text, got {shown(target)}", place)
        if self._id and target.startswith(self._id):
            target = target[len(self._id) :] or "#"
        if not target.startswith("#"):
            raise SchemaError(f"{shown(target)} is in another document, and nothing is fetched: put it in here", place)
        if unquote(target[1:])[:1] not in ("", "/"):
            raise SchemaError(f"{shown(target)} is an anchor: refer to it by '#/...'", place)
        node: Any = self.document
        is_schema = True  # and not a list or a map of schemas
        try:
            for step, node in way(target[1:], self.document):
                if is_schema and step not in _PLACES:
                    raise LookupError("its values are no schemas")
                is_schema = not is_schema or (step in _SINGLE and not isinstance(node, list))
        except LookupError:
            is_schema = False
        if not is_schema:
            raise SchemaError(f"there is no schema at {shown(target)}", place)
        return node


def _rust_regex(pattern: Any, place: str) -> str:
    if not isinstance(pattern, str):
        raise SchemaError(f"must be a text, got {shown(pattern)}", place)
    try:
        return rust_regex(pattern)
    except ValueError as error:
        raise SchemaError(str(error), place) from error


def _rewrite_format(node: dict[str, Any], pointer: str) -> None:
    name = node.pop("format")
    if not isinstance(name, str) or (name not in FORMATS and name not in LABELS):
        known = ", ".join(sorted(FORMATS))
        raise SchemaError(f"the format {shown(name)} can't be enforced; these can: {known}", f"{pointer}/format")
    if name in LABELS:
        return
    patterns, most = FORMATS[name]
    parts: list[dict[str, Any]] = [{"pattern": f"^(?:{pattern})$"} for pattern in patterns]
    if most is not None:
        parts.append({"maxLength": most})
    node["allOf"] = [*node.get("allOf", ()), *parts]


def _children(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas in a schema, with their pointers from there."""
    for key in _MAPS:
        for name, child in node.get(key, {}).items():
            yield f"{key}/{escaped(name)}", child
    for key in _LISTS:
        for i, child in enumerate(node.get(key, ())):
            yield f"{key}/{i}", child
    for key in _SINGLE:
        value = node.get(key)
        if isinstance(value, list):  # `items` before draft 2020-12
            for i, child in enumerate(value):
                yield f"{key}/{i}", child
        elif key in node:
            yield key, value


def node_at_fault(schema: Any, refusal: Callable[[Any], str | None]) -> SchemaError | None:
    """The deepest schema that is refused alone. refusal: what is said against a schema, None for nothing."""
    reason = refusal(schema)
    if reason is None:
        return None
    pointer, node = "", schema
    shared = {
        key: schema[key] for key in ("$schema", "$defs", "definitions") if isinstance(schema, dict) and key in schema
    }
    while isinstance(node, dict):
        found = _child_at_fault(node, shared, refusal)
        if found is None:
            break
        name, node, reason = found
        pointer = f"{pointer}/{name}"
    return SchemaError(reason, pointer)


def _child_at_fault(
    node: Mapping[str, Any], shared: Mapping[str, Any], refusal: Callable[[Any], str | None]
) -> tuple[str, Any, str] | None:
    """The first child that is refused alone: its pointer from the node, itself, the reason. Found by halves, since there may
    be thousands. Children that refer to places other than `shared` can't be asked about."""
    left = [
        (name, child) for name, child in _children(node) if isinstance(child, dict) and _stands_alone(child, shared)
    ]
    while len(left) > 1:
        half = left[: len(left) // 2]
        group = {str(i): child for i, (_, child) in enumerate(half)}
        together = refusal({**shared, "type": "object", "properties": group, "required": [*group]})
        left = left[len(half) :] if together is None else half
    for name, child in left:
        reason = refusal({**shared, **child})
        if reason is not None:
            return name, child, reason
    return None


_REFERENCE = re.compile(r'"\$ref": "#/?([^/"]*)')


def _stands_alone(child: Any, shared: Mapping[str, Any]) -> bool:
    return all(key in shared for key in _REFERENCE.findall(json.dumps(child)))
