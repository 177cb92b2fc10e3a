"""Tokens to words: nothing lost, nothing torn."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cai_runtime.speech.word_split import split_words


def byte_tokens(text):
    return list(text.encode())


def decode_bytes(tokens):
    return bytes(tokens).decode(errors="replace")


class Pieces:
    """A tokenizer whose tokens are given pieces of bytes."""

    def __init__(self, *pieces):
        self.pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
        self.tokens = range(len(pieces))

    def __call__(self, tokens):
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")


def texts(*pieces, **options):
    decode = Pieces(*pieces)
    return [word.text for word in split_words(decode.tokens, decode, **options)]


def check_nothing_is_lost(tokens, decode, words):
    assert "".join(word.text for word in words) == decode(tokens)
    assert [word.begin for word in words] == [0, *(word.end for word in words[:-1])]
    assert words[-1].end == len(tokens)
    assert all(word.begin <= word.first < word.last <= word.end for word in words)


@given(st.text(max_size=30), st.sampled_from([None, "en", "zh", "ja", "th"]))
@example(" \r0", "zh")
def test_every_token_is_in_one_word(text, language):
    tokens = byte_tokens(text)
    words = split_words(tokens, decode_bytes, language)
    if text.strip():
        check_nothing_is_lost(tokens, decode_bytes, words)
        assert all(word.text.strip() for word in words)
    else:
        assert not words


@given(st.binary(max_size=30), st.sampled_from([None, "zh"]), st.sampled_from(["", ".,"]))
def test_bytes_that_are_no_text_are_kept(data, language, append):
    words = split_words(list(data), decode_bytes, language, append=append)
    if decode_bytes(data).strip():
        check_nothing_is_lost(list(data), decode_bytes, words)


@given(st.lists(st.integers(0, 30), max_size=12), st.randoms())
def test_tokens_of_several_bytes(cuts, random):
    data = " Größe, naïve 👩‍🚀 (ok) “so” 3.5% — ill-disposed".encode()
    edges = sorted({0, len(data), *(min(cut * 2, len(data)) for cut in cuts)})
    decode = Pieces(*(data[a:b] for a, b in pairwise(edges)))
    check_nothing_is_lost(decode.tokens, decode, split_words(decode.tokens, decode, random.choice([None, "ja"])))


def test_words_stand_between_spaces():
    assert texts(" ill", "-", "dis", "posed", ".", " He") == [" ill-disposed.", " He"]
    assert texts("It", "'s", " 3", ".", "5", " %", "!") == ["It's", " 3.5", " %!"]


def test_punctuation_joins_its_word():
    assert texts(" Yes", ' "', " No", '"', ".") == [" Yes", ' " No".']
    assert texts(" Yes", ",", " ...", " no") == [" Yes,", " ...", " no"]
    assert texts(" a", ".", " b", append="") == [" a", ".", " b"]


def test_time_bearing_tokens_leave_punctuation_out():
    decode = Pieces(" (", "so", "-", "called", ")", ".")
    (word,) = split_words(decode.tokens, decode)
    assert (word.first, word.last) == (1, 4)


def test_languages_without_spaces_are_split_at_tokens():
    assert texts("今日", "は", "、", "晴", "れ", "。", language="ja") == ["今日", "は、", "晴", "れ。"]
    assert texts("我", "用", "Wh", "isper", "3", "。", language="zh") == ["我", "用", "Whisper3。"]
    assert texts("他", "说", "“", "好", "”", language="zh") == ["他", "说", "“好”"]


def test_marks_stay_with_their_letter():
    assert texts("ก", "า", "ร", "ี", "ย", language="th") == ["ก", "า", "รี", "ย"]


@pytest.mark.parametrize("language", [None, "zh"])
def test_a_character_of_several_tokens_is_whole(language):
    star = "👩‍🚀".encode()
    words = texts(" a", b" " + star[:2], star[2:5], star[5:], " b", language=language)
    assert words[0] == " a"
    assert words[-1] == " b"
    assert "�" not in "".join(words)


def test_invalid_bytes_do_not_swallow_what_follows():
    assert texts(b"\xf0\x9f", " next", " one") == ["�", " next", " one"]
    assert texts(b"\xf0", b"\x9f", " next", " one") == ["�", " next", " one"]
    assert texts("�", " next") == ["�", " next"]


def test_spaces_alone_are_no_word():
    assert texts(" ", "  ") == []
    assert texts(" ", "yes", " ") == [" yes "]
    assert split_words([], decode_bytes) == []
