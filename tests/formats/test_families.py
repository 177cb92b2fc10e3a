"""What holds in every format: calls, thoughts and content come out as they were written, however the text is cut."""

import json

import pytest
from families import FAMILIES, made, marker_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transcripts import Folded, fold, play, spec_of, tokens_of, turn_of

SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HARD = {"city": "a \"b\" {c} \\n [d] 🙂é\n <x> 'e'", "days": -3, "exact": True, "tags": ["]}", "{", ""], "limit": None}


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def parts(family, make_byte_tokenizer):
    return made(family, make_byte_tokenizer)


def read(parts, text, cuts=None, *, end=True, stop=(), **options):
    tokenizer, fmt = parts
    tokens = tokens_of(tokenizer, text, marker_texts(fmt)) + ([tokenizer.eos_token_id] if end else [])
    return fold(play(fmt.output(turn_of(**options))(spec_of(tokenizer, stop=stop)), tokens, cuts))


def decoded(folded):
    return [(name, json.loads(text)) for name, text in folded.calls]


def test_two_calls_with_nested_quotes_and_braces(family, parts):
    calls = [("get_weather", HARD), ("get_time", {}), ("get_weather", {"city": "Oslo", "where": {"lat": 1.5}})]
    found = read(parts, family.write(calls))
    assert decoded(found) == calls
    assert (found.content, found.reasoning, found.reason) == ("", "", "tool_calls")


def test_text_around_calls_and_a_thought(family, parts):
    calls = [("get_weather", {"city": "Oslo"}), ("get_time", {})]
    before = "" if family.bare else "Let me see."
    found = read(
        parts, family.thought("Hm,\n\nso.") + family.content(before) + family.write(calls) + family.final("Done.")
    )
    assert (decoded(found), found.reasoning) == (calls, "Hm,\n\nso.")
    assert found.content.split() == [*before.split(), "Done."] or found.content == before + "Done."


def test_plain_text(family, parts):
    text = " Hello [x](y) {z}\n 🙂 <b> \n"
    found = read(parts, family.final(text).removeprefix("<|start|>assistant"))
    assert found == Folded(text if family.format != "harmony" else text.lstrip(), reason="stop")


def test_without_tools_nothing_is_a_call(family, parts):
    text = family.write([("get_weather", {"city": "Oslo"})])
    for options in ({"tools": ()}, {"tool_choice": "none"}):
        found = read(parts, text, **options)
        assert not found.calls and "Oslo" in found.content and found.reason == "stop"


def test_a_text_that_was_cut(family, parts):
    """Wherever it is cut: no event is taken back, what was told of calls is a beginning of what was written."""
    calls = [("get_weather", HARD), ("get_time", {})]
    tokenizer, fmt = parts
    tokens = tokens_of(tokenizer, family.thought("Hm") + family.write(calls), marker_texts(fmt))
    whole = fold(play(fmt.output(turn_of())(spec_of(tokenizer)), tokens))
    assert whole.reason == "length"
    for length in range(len(tokens)):
        found = fold(play(fmt.output(turn_of())(spec_of(tokenizer)), tokens[:length]))
        assert found.reason == "length"
        # The beginning of a marker that is text may be the last of what a text holds.
        assert found.reasoning in ("", "H", "Hm") or (
            not parts[1].markers.is_token("</think>") and found.reasoning[:4] == "Hm\n<"
        )
        assert len(found.calls) <= 2
        for (name, text), (want, wanted) in zip(found.calls, whole.calls, strict=False):
            assert name == want and wanted.startswith(text.removesuffix("\ufffd"))


def test_arguments_that_begin_wrongly(family, parts):
    """What can't be a call is content, however the text before the mistake was cut."""
    text = family.write([("get_weather", {"city": "Oslo"})]).replace('{"city"', '{]"city"')
    tokenizer, fmt = parts
    tokens = [*tokens_of(tokenizer, text, marker_texts(fmt)), tokenizer.eos_token_id]
    one_by_one, whole = (
        fold(play(fmt.output(turn_of())(spec_of(tokenizer)), tokens, cuts)) for cuts in (None, [len(tokens)])
    )
    assert one_by_one == whole
    if '{]"city"' in text:
        assert not whole.calls and "Oslo" in whole.content


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{start}{end}{{"name": "get_time", "parameters": {{}}}}', "", 1),
        ('{start}I look.{end}{{"name": "get_time", "parameters": {{}}}}{{"name": "get_time"}}', "I look.", 2),
        ("{start}print(1){end}", "{start}print(1){end}", 0),
        ('{start}print(1){end} {{"name": "unknown"}}', '{start}print(1){end} {{"name": "unknown"}}', 0),
        ("{start}print(1)", "{start}print(1)", 0),
    ],
)
def test_calls_after_python_markers(make_byte_tokenizer, text, content, calls):
    """As Llama 4's own chat template writes them; code between the markers is content."""
    family = next(one for one in FAMILIES if one.write.__name__ == "python_start")
    text, content = (given.format(start="<|python_start|>", end="<|python_end|>") for given in (text, content))
    parts = made(family, make_byte_tokenizer)
    for cuts in (None, [3] * 99):
        found = read(parts, text, cuts)
        assert (found.content, found.calls) == (content, [["get_time", "{}"]] * calls)


@st.composite
def answers(draw):
    """Thoughts, calls and pieces of all of them, in any order."""
    word = st.sampled_from(
        ["a", " ", "\n", "é🙂", "{", "}", '"', "[", "]", "<", "(", ")", ",", ":", "=", "get_weather", "'"]
    )
    pieces = draw(st.lists(st.one_of(word, st.integers(0, 40)), max_size=14))
    return (
        pieces,
        draw(st.lists(st.integers(1, 9), max_size=30)),
        draw(st.lists(st.sampled_from(["a", "}\n", "{"]), max_size=1)),
    )


@given(answer=answers(), end=st.booleans(), thinks=st.booleans())
@SETTINGS
def test_the_fold_does_not_depend_on_the_cuts(family, parts, answer, end, thinks):
    """Also of malformed text; the parser takes everything."""
    pieces, cuts, stop = answer
    whole = family.write([("get_weather", {"city": "O{", "days": 2}), ("get_time", {})])
    units = [family.thought("Hm"), whole, whole[: len(whole) // 2], *marker_texts(parts[1]), whole[len(whole) // 2 :]]
    text = "".join(piece if isinstance(piece, str) else units[piece % len(units)] for piece in pieces)
    tokenizer, fmt = parts
    tokens = tokens_of(tokenizer, text, marker_texts(fmt)) + ([tokenizer.eos_token_id] if end else [])

    def run(groups):
        events = play(
            fmt.output(turn_of(thinks=thinks and family.thinks))(spec_of(tokenizer, stop=stop)), tokens, groups
        )
        for event in events:
            if hasattr(event, "call_id"):
                event.call_id = ""
        return events

    one_by_one = run(None)
    assert run(cuts) == one_by_one == run([len(tokens)])
    assert fold(one_by_one).reason in ("stop", "length", "tool_calls")
