"""Pieces of grammars: what they take, and what is refused with its place."""

import datetime
import ipaddress
import json
import random
import re
import urllib.parse
import uuid

import jsonschema
import pytest

from cai_runtime.errors import GrammarError
from cai_runtime.grammars import expressions
from cai_runtime.grammars.schema import SchemaError
from cai_runtime.grammars.string_formats import FORMATS


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("[0-9]{3}", ["123"], ["12", "1234", "x123"]), ("", [""], ["a"]), ("a/b\nc", ["a/b\nc"], ["a/b c"]),
        ("^x$|y", ["x", "y"], ["xy"]), ("(?i)ab", ["aB"], ["ac"]), (r"\d\s", ["1 "], ["a "]), ("é.", ["éx", "éé"], ["é\n"]),
    ],
)  # fmt: skip
def test_regex(accepts, pattern, good, bad):
    expression = expressions.regex(pattern)
    assert all(accepts(expression, text) for text in good) and not any(accepts(expression, text) for text in bad)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "unclosed group"), ("(?=a)", "look-around"), (r"(a)\1", "backreferences"), (r"a\b", "lookarounds")],
)
def test_a_regex_that_can_not_be_used(pattern, message):
    with pytest.raises(GrammarError, match=message):
        expressions.regex(pattern)


def test_choice(accepts):
    texts = ["yes", "no", 'a "quoted" \\ one', "line\nbreak\x7f", "é/<|im_end|>", "", "a|b", "(x)*"]
    expression = expressions.choice(texts)
    assert all(accepts(expression, text) for text in texts)
    assert not any(accepts(expression, text) for text in ("yesno", "a", "b", "x", "()", "ye"))
    with pytest.raises(GrammarError, match="at least one"):
        expressions.choice([])


def test_a_users_rules_are_in_a_scope_of_their_own(accepts):
    inner = expressions.lark('start: rule // with a comment at its end\nrule: "b" rule | "c"')
    assert accepts(f'rule {inner}\nrule: "a"', "abbc") and not accepts(f'rule {inner}\nrule: "a"', "ba")
    for bad, message in [
        ('start: "a" }\nevil: %lark { start: "b"', "malformed"), ("rule: /a/", "malformed"), ("start: x", "unknown name"),
        ('start: x\nx[max_tokens=3]: /a+/', "max_tokens"), ('start: x "b"\nx[stop="c"]: /a+/', "stop"),
    ]:  # fmt: skip
        with pytest.raises(GrammarError, match=message):
            expressions.lark(bad)
    for bad, message in [('start: %json {"format": "nope"}', "'/format'"), ('start: %json {', "no JSON"),
                         ('%llguidance {"no_forcing": true}\nstart: "a"', "options")]:  # fmt: skip
        with pytest.raises(GrammarError, match=message):
            expressions.lark(bad)
    name = expressions.lark('start: "%json {" x // %json {\nx: %json {"type": "string", "format": "hostname"}')
    assert accepts(name, '%json {"a.b"') and not accepts(name, '%json {"a b"'), "enforced, as elsewhere"
    assert expressions.lark('start: "[stop]: max_tokens"'), "in quotes it is text"


def test_whitespace_is_bounded(accepts):
    expression = expressions.json_schema({"type": "object", "properties": {"a": {"type": "array"}}})
    for text in ('{"a":[1,2]}', '{"a": [1, 2]}', '{"a": [1,2], "b":{}}', "{}"):
        assert accepts(expression, text)
    for text in ('{"a":  1}', '{ "a":[]}', '{"a":[] }', '{\n"a":[]}', ' {"a":[]}', '{"a":[]}\n', '{"a" :[]}', "[]"):
        assert not accepts(expression, text)
    assert accepts(expressions.json_object(), '{"x": [{"y": null}]}') and not accepts(expressions.json_object(), "[1]")


@pytest.mark.parametrize(
    ("schema", "pointer", "message"),
    [
        ({"properties": {"a": {"items": {"not": {}}}}}, "/properties/a/items/not", "'not' can't be enforced"),
        ({"properties": {"x/y~": {"format": "hostnam"}}}, "/properties/x~1y~0/format", "the format 'hostnam'"),
        ({"anyOf": [{}, {"uniqueItems": True}]}, "/anyOf/1/uniqueItems", "'uniqueItems'"),
        ({"type": "string", "minLenght": 3}, "/minLenght", "not a keyword that is known"),
        ({"type": "string", "pattern": "(?=a)"}, "/pattern", "lookahead"),
        ({"type": "string", "pattern": "a\\b"}, "/pattern", "escape"),
        ({"$ref": "other.json"}, "/$ref", "another document"), ({"$ref": "#/nowhere"}, "/$ref", "no schema at"),
        ({"$ref": "#"}, "", "refers to itself"), ({"minProperties": 2}, "/minProperties", "can't be enforced where"),
        ({"$defs": {"d": {"oneOf": [{"type": "string"}, {"const": "a"}]}}, "$ref": "#/$defs/d"}, "/$defs/d", "may overlap"),
        ({"type": "object", "properties": {"a": {"minimum": 5, "maximum": 2, "type": "integer"}}, "required": ["a"]},
         "/properties/a", "greater than"),
        ({"items": 3}, "/items", "an object or a boolean"), ({"properties": []}, "/properties", "an object of schemas"),
        ({"$schema": "http://example.com/x"}, "/$schema", "dialect"), ([], "", "an object or a boolean"),
        ({"const": float("nan")}, "", "no JSON"), ({"$id": 5, "$ref": "#/$defs/a", "$defs": {"a": {}}}, "/$id", "a text"),
        ({"minProperties": 2, "required": 3}, "/required", "a list of names"), ({"required": [1]}, "/required", "a list of"),
        # What a reference leads to is no schema: a value, notes, a map of schemas.
        ({"const": {"x-a": 1}, "items": {"$ref": "#/const"}}, "/items/$ref", "no schema at"),
        ({"x-defs": {"a": {}}, "items": {"$ref": "#/x-defs/a"}}, "/items/$ref", "no schema at"),
        ({"$defs": {"a": {}}, "items": {"$ref": "#/$defs"}}, "/items/$ref", "no schema at"),
        ({"anyOf": [{}], "items": {"$ref": "#/anyOf/1"}}, "/items/$ref", "no schema at"),
        ({"$defs": {"a": {}}, "items": {"$ref": "#a"}}, "/items/$ref", "an anchor"),
        # Numbers that a double or a 64-bit integer can't hold.
        ({"const": -(2**63)}, "/const", "beyond 2\\^53"), ({"enum": [1, {"a": [2**53 + 1]}]}, "/enum", "beyond 2\\^53"),
        ({"const": -1e19}, "/const", "beyond 2\\^53"), ({"minimum": 2**63}, "/minimum", "beyond 2\\^62"),
        ({"exclusiveMaximum": -1e300}, "/exclusiveMaximum", "beyond 2\\^62"), ({"minimum": 10**400}, "/minimum", "beyond"),
        ({"multipleOf": 999983}, "/multipleOf", "steps"), ({"multipleOf": 0}, "/multipleOf", "above 0"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 998}]}, "/allOf/", "several"),
    ],
)  # fmt: skip
def test_what_can_not_be_enforced_is_refused_with_its_place(schema, pointer, message):
    with pytest.raises(SchemaError, match=message) as caught:
        expressions.json_schema(schema)
    assert caught.value.pointer.startswith(pointer) and f"at {caught.value.pointer!r}" in str(caught.value)


def test_deep_schemas_are_refused():
    schema = {"type": "string"}
    for _ in range(2000):
        schema = {"items": schema}
    with pytest.raises(SchemaError, match="no JSON|nested"):
        expressions.json_schema(schema)


def test_the_node_at_fault_is_found_among_many(monkeypatch):
    asked = []
    real = expressions._refusal
    monkeypatch.setattr(expressions, "_refusal", lambda schema: asked.append(schema) or real(schema))
    bad = {"type": "array", "items": {"type": "integer", "minimum": 3, "maximum": 1}, "minItems": 1}
    properties = {f"p{i}": bad if i == 700 else {"$ref": "#/properties/p0"} if i % 3 else {} for i in range(1000)}
    with pytest.raises(SchemaError) as caught:
        expressions.json_schema({"type": "object", "properties": properties, "required": ["p700"]})
    assert caught.value.pointer == "/properties/p700/items" and "minimum" in caught.value.reason
    assert len(asked) < 20


def test_bounds_are_kept_or_made_tighter(accepts):
    """Where a double has no such number, and where llguidance has none."""
    for bounds, good, bad in [
        ({"minimum": 2**53 + 1}, [2**53 + 2], [2**53]), ({"maximum": 2**60 + 1}, [2**60], [2**60 + 2]),
        ({"minimum": -(2**63), "maximum": 2**63 - 1}, [-(2**62), 2**62, 0], [-(2**63) - 1, 2**63]),
        ({"minimum": -(2**63), "maximum": -(2**62) + 512}, [-(2**62)], [-(2**61)]), ({"minimum": -(10**400)}, [-5], []),
    ]:  # fmt: skip
        expression = expressions.json_schema({"type": "integer", **bounds})
        assert all(accepts(expression, str(number)) for number in good), bounds
        assert not any(accepts(expression, str(number)) for number in bad), bounds


def test_chains_of_references_are_no_nesting(accepts):
    chain = {f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(100)}
    expression = expressions.json_schema({"$ref": "#/$defs/a0", "$defs": {**chain, "a100": {"type": "integer"}}})
    assert accepts(expression, '{"x": {"x": {}}}') and not accepts(expression, '{"x": {"x": 3}}')
    for step in (1, -1):  # in either order it would overflow a stack, which ends the process
        long = {f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(2000)[::step]}
        with pytest.raises(SchemaError, match="follow each other"):
            expressions.json_schema({"$ref": "#/$defs/a0", "$defs": {**long, "a2000": {}}})
    ring = {f"a{i}": {"items": {"$ref": f"#/$defs/a{(i + 1) % 2000}"}} for i in range(2000)}
    with pytest.raises(SchemaError, match="follow each other"):
        expressions.json_schema({"$ref": "#/$defs/a0", "$defs": ring})


def test_steps_in_different_places_are_counted_apart(takes):
    steps = {f"p{step}": {"type": "integer", "multipleOf": step} for step in (997, 998, 86_400_000)}
    assert takes(expressions.json_schema({"properties": steps}), {"p997": 997 * 3})


def test_words_that_ask_for_nothing(takes):
    schema = {
        "type": "object", "title": "T", "x-more": 1, "deprecated": True, "uniqueItems": False, "additionalProperties": False,
        "properties": {"id": {"type": "integer", "examples": [1]}, "not": {"type": "string", "format": "password"}},
    }  # fmt: skip
    expression = expressions.json_schema(schema)
    assert takes(expression, {"id": 3, "not": "x"}) and not takes(expression, {"id": "3"})


def label_ok(name):
    return all(0 < len(label) < 64 and label.strip("-") == label for label in name.split(".")) and len(name) < 254


CHECKS = {
    "date": datetime.date.fromisoformat, "time": datetime.time.fromisoformat, "date-time": datetime.datetime.fromisoformat,
    "duration": lambda text: re.fullmatch(r"P(?=.)(\d+Y)?(\d+M)?(\d+W)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?", text)[0],
    "email": lambda text: 1 / (len(text.split("@")[0]) <= 64 and label_ok(text.split("@")[1])),
    "hostname": lambda text: 1 / label_ok(text), "ipv4": ipaddress.IPv4Address, "ipv6": ipaddress.IPv6Address,
    "uuid": uuid.UUID, "uri": lambda text: 1 / len(urllib.parse.urlsplit(text).scheme),
    "json-pointer": lambda text: 1 / (text == "" or text[0] == "/"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats(write, name):
    """Texts that no model would write, held against other judges."""
    rng = random.Random(1)
    expression = expressions.json_schema({"type": "string", "format": name})
    texts = {write(expression, rng) for _ in range(60)} - {None}
    assert len(texts) > 15
    for text in texts:
        assert CHECKS[name](json.loads(text)) is not None, text


def test_leap_years():
    (pattern,), _ = FORMATS["date"]
    for year in range(1, 10000):
        leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        assert bool(re.fullmatch(pattern, f"{year:04}-02-29")) == leap
    assert not re.fullmatch(pattern, "0000-01-01")


def test_random_texts_of_random_schemas_are_valid(schema_of, write):
    refused = valid = 0
    for seed in range(250):
        rng = random.Random(seed)
        schema = schema_of(rng)
        try:
            expression = expressions.json_schema(schema)
        except SchemaError:
            refused += 1
            continue
        text = write(expression, rng)
        if text is not None:
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
            valid += 1
    assert valid > 180 and refused < 70
