"""What a whole answer must be, in llguidance's dialect of Lark: for answers and calls that are held to a schema.

A format says how it writes one call; what is around it is the same in all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cai_runtime.errors import ConversationError
from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.parsing.markers import Markers

if TYPE_CHECKING:
    from cai_runtime.formats.marked import MarkedFormat, Turn

ANY = r"/(?s:.+)/"  # of special tokens it holds none
OBJECT = {"type": "object"}


def literal(text: str) -> str:
    """A string of the grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


class Rules:
    """The rules of one grammar."""

    def __init__(self, markers: Markers):
        self._markers = markers
        self._bodies: dict[str, str] = {}

    def add(self, name: str, body: str, attributes: str = "") -> str:
        """A new rule; its name, which begins with this one."""
        known = [rule for rule, old in self._bodies.items() if old == attributes + ": " + body]
        if known:
            return known[0]
        name = f"{name}_{len(self._bodies)}"
        self._bodies[name] = f"{attributes}: {body}"
        return name

    def marker(self, text: str) -> str:
        """A marker: its token, or a string."""
        token_id = self._markers.token(text).token_id
        return literal(text) if token_id is None else f"<[{token_id}]>"

    def until(self, marker: str, without: str | None = None) -> str:
        """Any text up to a marker, and the marker. without: a regular expression that the text does not match."""
        if self._markers.is_token(marker):
            return f"({self.text_without(without)})? {self.marker(marker)}"
        body = r"/(?s:.*)/" if without is None else rf"/(?s:.*)/ & ~/{without}/"
        return self.add("until", body, f"[suffix={literal(marker)}]")

    def text_without(self, without: str | None) -> str:
        """Any text that does not match a regular expression."""
        # Only terminals, which have names in capitals, can be complements.
        return ANY if without is None else self.add("TEXT", f"{ANY} & ~/{without}/")

    def blank(self) -> str:
        """A line break, perhaps."""
        return '"\\n"?'

    def text(self, start: str) -> str:
        return "\n".join([f"start: {start}", *(f"{name}{body}" for name, body in self._bodies.items())])


def answer_grammar(format: MarkedFormat, turn: Turn) -> str | None:
    """The grammar of an answer; None: it may be anything.

    Raises:
        ConversationError: a function's schema can't be enforced; the message has the JSON pointer of the node.
    """
    conversation = turn.conversation
    choice, answer = conversation.tool_choice, conversation.answer
    must_call = isinstance(choice, Tool) or choice == "required"
    tools = [choice] if isinstance(choice, Tool) else conversation.tools if turn.may_call else ()
    held = must_call or any(tool.strict for tool in tools) or (bool(tools) and not conversation.parallel_tool_calls)
    if answer is None and not held:
        return None
    rules = Rules(format.markers)
    # A function that is named is called once, as by OpenAI's API.
    arguments: dict[str, str] = {}  # by the functions' names
    call, several = "", conversation.parallel_tool_calls and not isinstance(choice, Tool)
    if tools:
        places = {tool.name: f"tools[{i}].function.parameters" for i, tool in enumerate(conversation.tools)}
        for tool in tools:
            arguments[tool.name] = (
                format.arguments_rule(rules, tool, places.get(tool.name, "tools"))
                if must_call or tool.strict
                else format.any_arguments_rule(rules, tool)
            )
        call = rules.add("call", " | ".join(format.call_rule(rules, tool, arguments[tool.name]) for tool in tools))
    if must_call:
        body = format.calls_rule(rules, call, several)
    elif answer is not None:
        body = format.answer_rule(rules, rules.add("answer", answer.expression))
        if call:
            body = f"{format.calls_rule(rules, call, several)} | {body}"
    else:
        body = format.free_rule(rules, call, arguments, several)
    return rules.text(f"{format.thought_rule(rules, turn)} ({body})")


def json_call_rule(tool: Tool, arguments: str, *, key: str = "arguments", layout: str = "") -> str:
    """A call that is a JSON object of the function's name and its arguments. layout: around it."""
    head = f'{layout}{{"name": {json.dumps(tool.name)}, "{key}": '
    return f"{literal(head)} {arguments} {literal('}' + layout)}"


def enforced(schema: Mapping[str, Any], place: str, pointer: str = "") -> str:
    """An expression for JSON that is valid under a schema.

    Args:
        place: the parameter that the schema is part of. pointer: where in it; its definitions are those of the whole.

    Raises:
        ConversationError: a node can't be enforced.
    """
    from cai_runtime.errors import GrammarError
    from cai_runtime.grammars.expressions import json_schema
    from cai_runtime.grammars.schema import SchemaError

    try:
        return json_schema(dict(schema))
    except SchemaError as error:
        shared = error.pointer.startswith(("/$defs/", "/definitions/"))
        raise refusal(place, error.pointer if shared else pointer + error.pointer, error.reason) from error
    except GrammarError as error:
        raise ConversationError(f"Invalid '{place}': {error}.", param=place) from error


def refusal(place: str, pointer: str, reason: str) -> ConversationError:
    return ConversationError(
        f"Invalid '{place}': the schema can't be enforced at {pointer!r} (a JSON pointer): {reason}.", param=place
    )


def object_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object."""
    return {**OBJECT, **(tool.parameters or {"additionalProperties": False})}
