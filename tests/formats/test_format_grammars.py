"""Grammars of answers that are held to them: what each format writes is accepted whole, what is broken is refused."""

import pytest
from families import FAMILIES, made, marker_texts
from transcripts import TIME, WEATHER, tokens_of, turn_of

from cai_runtime.errors import ConversationError
from cai_runtime.formats.conversation import Answer, Reasoning, Tool
from cai_runtime.formats.parsing.grammar import answer_grammar
from cai_runtime.grammars import Grammars

CITY = Tool(
    "find",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "scale": {"enum": ["C", "F"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    strict=True,
)
ONE = ("find", {"city": "Os{lo", "days": 3})


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def parts(family, make_byte_tokenizer):
    return made(family, make_byte_tokenizer)


@pytest.fixture(scope="module")
def grammars(parts):
    tokenizer, _ = parts
    return Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


class Held:
    """How far a text is accepted under a turn's grammar."""

    def __init__(self, parts, grammars, **options):
        self.tokenizer, self.format = parts
        lark = answer_grammar(self.format, turn_of(**{"tools": [CITY], **options}))
        self.matcher = grammars.mask(lark).matcher.deep_copy()

    def accepts(self, text):
        self.matcher.reset()
        tokens = tokens_of(self.tokenizer, text, marker_texts(self.format))
        taken = self.matcher.try_consume_tokens(tokens)
        self.rest = self.tokenizer.decode(tokens[taken:])
        return taken == len(tokens) and self.matcher.is_accepting()


def written(family, calls):
    """Calls in the layout that a grammar has."""
    text = family.write(calls)
    if family.format == "harmony":
        text = text.removesuffix("<|call|>")
    if family.write.__name__ == "mistral_list":
        text = text.replace(', "id": "abcdef123"', "")
    return text.replace("'", '"') if family.write.__name__ in ("python_list", "python_start", "lfm2") else text


def skip_unwritten(family):
    if family.write.__name__ in ("mistral_ids", "python_tag", "python_start"):
        pytest.skip("a sibling that grammars don't write")
    if family.write.__name__ == "mistral_named" and not family.tokens:
        pytest.skip("without its tokens, grammars write the list")


@pytest.fixture
def layout(family):
    skip_unwritten(family)
    return lambda *calls: written(family, calls)


def test_a_required_call(family, parts, grammars, layout):
    held = Held(parts, grammars, tool_choice="required")
    assert held.accepts(layout(ONE)), held.rest
    assert held.accepts(layout(("find", {"city": "", "scale": "F"}))), held.rest
    assert held.accepts(family.thought("Hm <b>") + layout(ONE)), held.rest
    assert not held.accepts("") and not held.accepts("Hello")
    assert not held.accepts(layout(("look", {"city": "Oslo"})))
    assert not held.accepts(layout(("find", {"city": "Oslo", "scale": "K"})))
    assert not held.accepts(layout(("find", {"city": "Oslo", "days": 1.5})))
    assert not held.accepts(layout(("find", {"days": 3})))
    assert not held.accepts(layout(("find", {"city": "Oslo", "other": 3})))
    if family.format != "harmony":
        assert held.accepts(layout(ONE, ONE)), held.rest
        one = Held(parts, grammars, tool_choice="required", parallel_tool_calls=False)
        assert one.accepts(layout(ONE)) and not one.accepts(layout(ONE, ONE))


def test_a_named_function(family, parts, grammars, layout):
    held = Held(parts, grammars, tools=[CITY, TIME], tool_choice=TIME)
    assert held.accepts(layout(("get_time", {}))), held.rest
    assert not held.accepts(layout(ONE))


def test_auto_with_a_strict_tool(family, parts, grammars, layout):
    held = Held(parts, grammars, tools=[CITY, Tool("any")])
    final = family.final("Hi there").removeprefix("<|start|>assistant")
    assert held.accepts(final), held.rest
    assert held.accepts(layout(ONE)), held.rest
    if not family.bare:
        assert held.accepts(family.content("Let me see.") + layout(ONE)), held.rest
    assert not held.accepts(layout(("find", {"city": "Oslo", "scale": "K"})))
    assert not held.accepts(layout(("look", {})))
    assert held.accepts(layout(("any", {"whatever": "x"}))), held.rest


def test_an_answer_after_a_thought(family, parts, grammars):
    answer = Answer('%json {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}')
    final = family.final('{"a": 1}').removeprefix("<|start|>assistant")
    held = Held(parts, grammars, tools=(), answer=answer)
    assert held.accepts(final) and held.accepts(family.thought("{Hm}") + final), held.rest
    assert not held.accepts(final.replace("1", "x"))
    if family.thinks:
        opened = Held(parts, grammars, tools=(), answer=answer, thinks=True)
        assert opened.accepts('Hm\n</think>\n\n{"a": 1}') and not opened.accepts('{"a": 1}')
        for reasoning in (Reasoning(enabled=False), Reasoning(effort="none")):
            off = Held(parts, grammars, tools=(), answer=answer, reasoning=reasoning)
            assert off.accepts('{"a": 1}') and not off.accepts('<think>\nHm\n</think>\n\n{"a": 1}')


def test_the_schema_of_every_type(family, parts, grammars, layout):
    held = Held(parts, grammars, tools=[WEATHER], tool_choice="required")
    arguments = {"city": "é🙂\n", "days": 2, "exact": True, "where": {"lat": 1.5}, "tags": ["a"], "scale": "C"}
    if family.write.__name__ in ("python_list", "lfm2"):
        text = layout(("get_weather", {**arguments, "city": "é🙂"})).replace("True", "true")
    else:
        text = layout(("get_weather", arguments))
    assert held.accepts(text), held.rest


def test_what_can_not_be_enforced_is_refused(family, parts):
    tool = Tool("find", parameters={"type": "object", "properties": {"a": {"type": "string", "minLength": 2}}})
    both = Tool("find", parameters={"type": "object", "properties": {"a": {"type": ["string", "integer"]}}})
    never = Tool(
        "find", parameters={"type": "object", "properties": {"a": {"contains": {"const": 1}, "type": "array"}}}
    )
    _, fmt = parts
    for given, pointer in (
        (never, "/properties/a/contains"),
        (tool, "/properties/a/minLength"),
        (both, "/properties/a"),
    ):
        if given is not never and not family.unquoted:
            assert answer_grammar(fmt, turn_of(tools=[given], tool_choice="required"))
            continue
        with pytest.raises(ConversationError, match=f"'{pointer}'") as error:
            answer_grammar(fmt, turn_of(tools=[TIME, given], tool_choice="required"))
        assert error.value.param == "tools[1].function.parameters"


def test_no_grammar_without_need(parts):
    _, fmt = parts
    assert answer_grammar(fmt, turn_of()) is None
    assert answer_grammar(fmt, turn_of(tools=[CITY], tool_choice="none")) is None
    assert answer_grammar(fmt, turn_of(tools=[TIME], parallel_tool_calls=False)) is not None


def test_names_and_values_are_text_in_the_grammar(family, parts, grammars, layout):
    hard = "] | /x/ <[3]> # %json {} \\"
    tool = Tool("f", parameters={"type": "object", "properties": {"q": {"enum": [hard]}}, "required": ["q"]})
    held = Held(parts, grammars, tools=[tool], tool_choice="required")
    assert held.accepts(layout(("f", {"q": hard}))), held.rest
    assert not held.accepts(layout(("f", {"q": "x"})))


BARE = '{"name": "find", "arguments": {"city": "Oslo"}}'


@pytest.mark.parametrize("several", [True, False])
def test_bare_calls_are_held_where_a_tool_is_strict(family, parts, grammars, several):
    if family.format not in ("hermes", "generic"):
        pytest.skip("reads no bare calls, or nothing else")
    held = Held(parts, grammars, tools=[CITY, Tool("any")], parallel_tool_calls=several)
    for call in (BARE, "\n" + BARE.replace(": ", ":"), BARE.replace("find", "any").replace("city", "x")):
        for text in (call, f"```json\n{call}\n```", f"```{call}```"):
            assert held.accepts(text), held.rest
            assert held.accepts(f"{text}\n{BARE} Done.") == several
    for wrong in ("scale", "days"):
        assert not held.accepts(BARE.replace("city", wrong))
        assert not held.accepts(f"```json\n{BARE.replace('city', wrong)}\n```")
    assert not held.accepts('{"name": "find", "parameters": {"city": "Oslo"}}')
    for text in (
        '{"name": "Bob"}',
        "It is " + BARE.replace("city", "days"),
        "```python\n{}\n```",
        '{"a": "find"}',
        "`x`",
    ):
        assert held.accepts(text), held.rest
