"""Headers of harmony that go wrong."""

import pytest
from families import Family, harmony, made, marker_texts
from transcripts import fold, play, spec_of, tokens_of, turn_of


@pytest.fixture(scope="module")
def parts(make_byte_tokenizer):
    return made(Family("harmony", harmony), make_byte_tokenizer)


def read(parts, text, *, end=True, stop=(), **options):
    """The same whole and token by token."""
    tokenizer, fmt = parts
    tokens = tokens_of(tokenizer, text, marker_texts(fmt)) + ([tokenizer.eos_token_id] if end else [])
    whole, pieces = (
        fold(play(fmt.output(turn_of(**options))(spec_of(tokenizer, stop=stop)), tokens, cuts))
        for cuts in ([len(tokens)], None)
    )
    assert whole == pieces
    return whole


@pytest.mark.parametrize("end", [True, False], ids=["end of text", "cut"])
@pytest.mark.parametrize(
    "header",
    ["<|channel|>final It rains in Oslo.", "<|start|>assistant", "to=functions.get_weather {}", "to=5 kg, I think."],
)
def test_a_header_that_does_not_end_is_content(parts, header, end):
    found = read(parts, header, end=end)
    assert (found.content, found.reasoning, found.calls, found.reason) == (header, "", [], "length")
    after = read(parts, f"<|channel|>analysis<|message|>Hm.<|end|>{header}", end=end)
    assert (after.content, after.reasoning, after.reason) == (header, "Hm.", "length")


def test_a_stop_string_in_such_a_header_ends_the_text(parts):
    found = read(parts, "<|channel|>final It rains.", stop=["rains"])
    assert (found.content, found.reason) == ("<|channel|>final It ", "stop")
