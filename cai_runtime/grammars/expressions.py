"""Pieces of grammars: expressions of llguidance's dialect of Lark, which stand for themselves wherever they are put.

Each is checked alone, so that an error speaks of what the caller wrote, and so that nothing in it can reach the grammar
around it: rules of a user's grammar are in a scope of their own.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from cai_runtime.errors import GrammarError
from cai_runtime.grammars.compiler import LIMITS, check_size, readable
from cai_runtime.grammars.schema import LAYOUT, SchemaError, make_enforceable, node_at_fault


def json_object() -> str:
    """Any JSON object."""
    return json_schema({"type": "object"})


def json_schema(schema: Any) -> str:
    """JSON that is valid under a schema (draft 2020-12, or what its `$schema` says). Properties come in the schema's order;
    one space may follow a comma and a colon, and there is no other whitespace.

    Raises:
        SchemaError: a node can't be enforced.
        GrammarError: the schema is too large.
    """
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"the schema is no JSON: {error}", "") from error
    check_size(text, "schema")
    return _json_schema(text)


@functools.lru_cache(maxsize=64)
def _json_schema(text: str) -> str:
    schema = json.loads(text)
    make_enforceable(schema)
    fault = node_at_fault(schema, _refusal)
    if fault is not None:
        raise fault
    return _inline(schema)


def _inline(schema: Any) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return f"%json {json.dumps({**schema, 'x-guidance': LAYOUT})}"


def _refusal(schema: Any) -> str | None:
    reason = refusal(f"start: {_inline(schema)}")
    if reason is None:
        return None
    if "oneOf constraints" in reason:
        return "the alternatives of 'oneOf' may overlap: use 'anyOf', or tell them apart by a 'const' property"
    return reason.removeprefix("failed to compile JSON schema: ")


def regex(pattern: str) -> str:
    r"""A text that matches a regular expression as a whole: the syntax of Rust's `regex`, without lookaround,
    backreferences and boundaries. `\d`, `\w` and `\s` know Unicode; `.` is anything but a newline.

    Raises:
        GrammarError: it is malformed or uses what is not there.
    """
    import llguidance

    check_size(pattern, "regex")
    if not pattern:
        return '""'
    expression = f"/{llguidance.regex_to_lark(pattern, '')}/".replace("\n", "\\n")
    return _checked(expression, "the regular expression")


def lark(grammar: str) -> str:
    """A user's grammar, with a rule `start`. Special tokens may be named in it. The schemas of `%json` are enforced as by
    `json_schema`.

    Raises:
        GrammarError: it is malformed, or sets max_tokens, temperature, stop or options, which a mask can't do.
        SchemaError: a schema in it can't be enforced.
    """
    check_size(grammar, "grammar")
    bare = _LITERAL.sub(" ", grammar)
    if _ATTRIBUTE.search(bare):
        raise GrammarError("rules can't set max_tokens, temperature, stop or capture stops: only 'lazy' and 'suffix'")
    if "%llguidance" in bare:
        raise GrammarError("a grammar can't set options with '%llguidance'")
    grammar = _with_enforced_schemas(grammar)
    reason = refusal(grammar)
    if reason is not None:
        raise GrammarError(f"the grammar is malformed: {reason}")
    return _checked("%lark {\n" + grammar + "\n}", "the grammar")


def _with_enforced_schemas(grammar: str) -> str:
    """The same with every `%json` in words that are enforced: llguidance takes some that it does not enforce."""
    parts, at = [], 0
    for found in _JSON_OR_LITERAL.finditer(grammar):
        if found.start() < at or not found.group("json"):
            continue
        try:
            schema, end = json.JSONDecoder().raw_decode(grammar, found.end())
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the grammar is malformed: no JSON after '%json': {error}") from error
        parts += [grammar[at : found.start()], json_schema(schema)]
        at = end
    return "".join([*parts, grammar[at:]])


_LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|#[^\n]*|//[^\n]*')
_JSON_OR_LITERAL = re.compile(rf"(?P<json>%json\b\s*)|{_LITERAL.pattern}")
_ATTRIBUTE = re.compile(r"\[[^\]]*\b(?:max_tokens|temperature|stop|stop_capture)\b[^\]]*\]\s*:")


def choice(texts: Sequence[str]) -> str:
    """One of some texts.

    Raises:
        GrammarError: there is none, or they are too large together.
    """
    if not texts:
        raise GrammarError("there must be at least one text to choose")
    check_size("".join(texts), "choice")
    # One lexeme: as alternatives of a rule, each would be an item of the parser.
    return _checked(f"/(?:{'|'.join(map(_literal, dict.fromkeys(texts)))})/", "the choice")


def _literal(text: str) -> str:
    """A regular expression of this text alone."""
    return "".join(c if c.isalnum() and c.isascii() else f"\\x{{{ord(c):x}}}" for c in text)


def _checked(expression: str, what: str) -> str:
    reason = refusal(f"start: {expression}")
    if reason is not None:
        raise GrammarError(f"{what} can't be used: {reason}")
    return expression


@functools.lru_cache(maxsize=32)  # a grammar may be a megabyte
def refusal(grammar: str) -> str | None:
    """What llguidance says against a grammar; None if nothing. Special tokens pass: they are the model's."""
    import llguidance

    limits = llguidance.LLParserLimits(**LIMITS)  # type: ignore[arg-type]
    is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
        llguidance.LLMatcher.grammar_from_lark(grammar), limits=limits
    )
    return readable(messages[0]) if is_error else None
