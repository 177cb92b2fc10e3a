"""Cutting a window's tokens at its timestamps."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from speech import WORDS, small_tokens

from cai_runtime.speech.segments import split_by_times

TOKENS = small_tokens()
T = TOKENS.timestamp_begin


def split(*tokens: int, frames: int = 3000):
    found = split_by_times(tokens, TOKENS, frames)
    return [(p.start, p.end, [t for t in p.tokens if t < T]) for p in found.pieces], found.advance


def test_next_window_begins_at_the_last_pair():
    pieces, advance = split(T, 1, T + 100, T + 100, 2, T + 250, T + 250, 3)
    assert pieces == [(0, 200, [1]), (200, 500, [2])]
    assert advance == 500  # the text behind it is heard again


def test_single_time_at_the_end_closes_the_window():
    pieces, advance = split(T + 10, 1, T + 100, T + 120, 2, T + 250)
    assert pieces == [(20, 200, [1]), (240, 500, [2])]
    assert advance == 3000


def test_without_a_pair_the_window_is_one_piece():
    assert split(T, 1, 2) == ([(0, 3000, [1, 2])], 3000)
    assert split(T, 1, T + 50) == ([(0, 100, [1])], 3000)
    assert split(1, 2, frames=700) == ([(0, 700, [1, 2])], 700)
    assert split() == ([], 3000)


def test_times_behind_the_audio_are_its_end():
    assert split(T, 1, T + 400, T + 400, 2, T + 900, frames=500) == ([(0, 500, [1]), (500, 500, [2])], 500)


def test_a_prefix_leaves_the_first_piece_without_its_time():
    assert split(1, T + 100, T + 100, 2, T + 200)[0] == [(0, 200, [1]), (200, 400, [2])]


@settings(max_examples=1000, deadline=None)
@given(
    tokens=st.lists(
        st.one_of(st.integers(0, WORDS - 1), st.integers(T, T + 1500), st.sampled_from([T, T + 1500])), max_size=20
    ),
    frames=st.integers(1, 3000),
)
def test_any_tokens_give_ordered_pieces_inside_the_window(tokens, frames):
    found = split_by_times(tokens, TOKENS, frames)
    assert 1 <= found.advance <= frames
    reached = 0
    for piece in found.pieces:
        assert reached <= piece.start <= piece.end <= frames
        reached = piece.end
    joined = [token for piece in found.pieces for token in piece.tokens]
    assert joined == tokens[: len(joined)]
