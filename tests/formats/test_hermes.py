"""Calls in `<tool_call>` tags, where the tags are tokens and where they are text."""

import json
from dataclasses import replace

import pytest
from transcripts import TIME, WEATHER, fold, play, spec_of, tokens_of, turn_of

from cai_runtime.formats.conversation import Answer
from cai_runtime.formats.events import ToolCallEvent
from cai_runtime.formats.hermes import HermesFormat

TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module", params=["tokens", "text"])
def made(request, make_byte_tokenizer):
    from tokenizers import AddedToken

    tokenizer = make_byte_tokenizer(tags=request.param == "tokens")
    tokenizer.chat_template += "<think></think><tool_call>"
    if request.param == "tokens":
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in TAGS[2:]])
    return tokenizer, HermesFormat(tokenizer)


def read(made, text, *, end=True, stop=(), **options):
    tokenizer, hermes = made
    tokens = tokens_of(tokenizer, text, TAGS) + ([tokenizer.eos_token_id] if end else [])
    return fold(play(hermes.output(turn_of(**options))(spec_of(tokenizer, stop=stop)), tokens))


def test_text_around_two_calls(made):
    text = f'Let me see.\n{CALL}\n<tool_call>\n{{"name": "get_time"}}\n</tool_call>\nDone. '
    found = read(made, text)
    assert found.calls == [["get_weather", '{"city": "Oslo"}'], ["get_time", "{}"]]
    assert (found.content, found.reason) == ("Let me see.\nDone. ", "tool_calls")


def test_nested_quotes_braces_and_tags(made):
    arguments = {"city": 'a "b" {c} \\ </tool_call> <tool_call> 🙂\n', "tags": ["]}", "{"], "where": {"lat": -1.5e3}}
    written = json.dumps(arguments).replace("<", "‹").replace(">", "›")
    found = read(made, f'<tool_call>{{"arguments": {written}, "name": "get_weather"}}</tool_call>')
    assert [(name, json.loads(text)) for name, text in found.calls] == [("get_weather", arguments)]
    assert found.content == ""


@pytest.mark.parametrize(
    "written", ['"{\\"city\\": \\"Oslo\\"}"', '{"city": "Oslo"', '{"city": "Oslo"}}}', '{"city": "Oslo"}, "id": 7}']
)
def test_slips_of_small_models(made, written):
    found = read(made, f'<tool_call>{{"name": "get_weather", "arguments": {written}}}</tool_call> Done.')
    assert [(name, json.loads(text)) for name, text in found.calls] == [("get_weather", {"city": "Oslo"})]
    assert found.content == "Done."


def test_a_line_break_in_a_string_is_escaped(made):
    found = read(made, CALL.replace("Oslo", "a\nb\tc"))
    assert json.loads(found.calls[0][1]) == {"city": "a\nb\tc"}


@pytest.mark.parametrize("length", [11, 12, 20, 34])
def test_an_opener_that_never_closes_is_content(made, length):
    for end in (True, False):
        found = read(made, "Hm " + CALL[:length], end=end)
        assert (found.content, found.calls, found.reason) == ("Hm " + CALL[:length], [], "length")


def test_a_call_that_was_told_stays_a_call(made):
    for end in (True, False):
        found = read(made, CALL[: CALL.index("lo")], end=end)
        assert found.calls == [["get_weather", '{"city": "Os']]
        assert (found.content, found.reason) == ("", "length")


@pytest.mark.parametrize("inside", ["what?", "{'name': 'f'}", '{"name": 3}', '{"arguments": {}}', "[]", "", "7"])
def test_what_is_no_call_is_content(made, inside):
    text = f"<tool_call>{inside}</tool_call>"
    found = read(made, f"{text} {CALL}")
    assert (found.content, found.reason) == (text, "tool_calls")
    assert found.calls == [["get_weather", '{"city": "Oslo"}']]


def test_without_tools_all_is_content(made):
    for options in ({"tools": ()}, {"tool_choice": "none"}):
        found = read(made, CALL, **options)
        assert (found.content, found.calls, found.reason) == (CALL, [], "stop")


def test_thought(made):
    found = read(made, f"<think>\nOne.\n\nTwo {CALL[:15].replace('<', '‹')}.\n</think>\n\nHello.\n{CALL}")
    assert found.reasoning == f"One.\n\nTwo {CALL[:15]}."
    assert (found.content, len(found.calls)) == ("Hello.", 1)


def test_a_thought_that_the_prompt_opened(made):
    found = read(made, "Hm.\n</think>\n\nHello <think>.", thinks=True)
    assert (found.reasoning, found.content) == ("Hm.", "Hello <think>.")


def test_a_text_that_ends_inside_a_thought(made):
    for end in (True, False):
        found = read(made, "Hm.\n", thinks=True, end=end, stop=["m"])
        assert (found.reasoning, found.content, found.reason) == ("Hm.", "", "length")


def test_a_stop_token_inside_a_thought_or_a_call(made):
    """A stop string that is a token ends the text wherever it comes, and is no honest end there."""
    tokenizer, hermes = made
    spec = replace(spec_of(tokenizer), ends={tokenizer.eos_token_id: "</s>"})
    for text in ("Hm.", f"Hm.</think>{CALL[: CALL.index('lo')]}"):
        tokens = [*tokens_of(tokenizer, text, TAGS), tokenizer.eos_token_id]
        assert fold(play(hermes.output(turn_of(thinks=True))(spec), tokens)).reason == "length"


def test_calls_have_ids_of_their_own(made):
    tokenizer, hermes = made
    text = CALL.replace('{"name"', '{"id": "c1", "name"')
    events = play(hermes.output(turn_of())(spec_of(tokenizer)), tokens_of(tokenizer, text + text, TAGS))
    ids = [event.call_id for event in events if isinstance(event, ToolCallEvent)]
    assert ids[0] == "c1" and len(set(ids)) == 2


def test_a_call_inside_a_thought(made):
    found = read(made, f"Hm. {CALL}", thinks=True)
    if made[1].markers.is_token("<tool_call>"):
        assert (found.reasoning, found.calls) == ("Hm.", [["get_weather", '{"city": "Oslo"}']])
    else:
        assert (found.reasoning, found.calls, found.reason) == (f"Hm. {CALL}", [], "length")


def test_stop_strings_are_of_content(made):
    found = read(made, f"Oslo?</think>a {CALL} b Oslo c", stop=["Oslo"], thinks=True)
    assert (found.reasoning, found.content, found.reason) == ("Oslo?", "a b ", "tool_calls")
    assert found.calls == [["get_weather", '{"city": "Oslo"}']]
    found = read(made, "a b  Oslo c", stop=["Oslo", "b "])
    assert (found.content, found.reason) == ("a ", "stop")


def test_a_call_of_an_unknown_function_is_told(made):
    assert read(made, CALL, tools=[TIME]).calls[0][0] == "get_weather"
    assert read(made, CALL, tools=[WEATHER]).calls[0][0] == "get_weather"


BARE = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
FENCED = '```json\n{\n  "name": "get_weather",\n  "arguments": {\n    "city": "Oslo"\n  }\n}\n```'


@pytest.mark.parametrize("text", [BARE, "\n" + BARE, FENCED, FENCED.replace("json", "")])
def test_a_bare_call(made, text):
    """What Qwen2.5-Coder-0.5B writes."""
    found = read(made, text)
    assert [(name, json.loads(text)) for name, text in found.calls] == [("get_weather", {"city": "Oslo"})]
    assert (found.content, found.reason) == ("", "tool_calls")
    assert read(made, f"{text} Done.").content == "Done."
    assert len(read(made, f"{text}\n{BARE}\n{CALL}").calls) == 3
    after_thought = read(made, f"Hm.</think>{text}", thinks=True)
    assert (after_thought.reasoning, len(after_thought.calls)) == ("Hm.", 1)


@pytest.mark.parametrize(
    "text",
    [
        f"It is {BARE}",
        f"{BARE[:30]}",
        BARE.replace("get_weather", "look"),
        BARE.replace("_", "\\u005f"),
        BARE.replace("arguments", "values"),
        '{"arguments": {}, "name": "get_time"}',
        f"`{BARE}`",
        f"```python\n{BARE}\n```",
        f"```\n[{BARE}]\n```",
        '```json\n{"name": "Bob"}\n```',
    ],
)
def test_what_is_no_bare_call_is_content(made, text):
    found = read(made, text)
    assert (found.content, found.calls) == (text, [])


def test_a_structured_answer_is_no_bare_call(made):
    assert read(made, BARE, answer=Answer("/.*/")).content == BARE


def test_a_stop_string_in_a_call_that_does_not_end_ends_the_text(made):
    """Only at the end does such a call turn out to be content."""
    text = '<tool_call>\n{"name": "get_weather", "query": "rain or snow'
    assert read(made, text).reason == "length"
    found = read(made, text, stop=["snow"])
    assert (found.content, found.reason) == (text.removesuffix("snow"), "stop")
