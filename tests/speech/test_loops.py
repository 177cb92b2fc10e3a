"""Loops of tokens: found from the count of turns on that the docstring says, cut behind the first turn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_runtime.speech.loops import find_loop, loops_at_end

SEVERAL = st.lists(st.integers(0, 50), min_size=1, max_size=12, unique=True)


@pytest.mark.parametrize(
    ("turn", "turns"), [([1], 11), ([1, 2], 6), ([1, 2, 3, 4, 5], 3), (list(range(30)), 3)], ids=lambda x: str(x)[:12]
)
def test_fewest_turns(turn, turns):
    before, behind = [90, 91], [92, 93]
    loop = find_loop([*before, *turn * turns, *behind])
    assert (loop.begin, loop.period, loop.end) == (2, len(turn), 2 + turns * len(turn))
    assert loop.cut == 2 + len(turn)
    assert loop.turns == turns
    assert find_loop([*before, *turn * (turns - 1), *behind]) is None


def test_nothing_repeats():
    assert find_loop([]) is None
    assert find_loop(range(200)) is None
    assert find_loop([1, 2, 1, 2, 3, 1, 2, 3, 4, 1, 2, 3, 4, 5]) is None


def test_first_of_two_loops():
    assert find_loop([0, *[1, 2] * 8, 3, *[4, 5, 6] * 9]).begin == 1
    assert find_loop([*[7] * 20, *[1, 2] * 8]).cut == 1


@given(st.lists(st.integers(100, 120), max_size=20), SEVERAL, st.integers(11, 20), st.integers(0, 11))
def test_a_loop_is_cut_behind_its_first_turn(before, turn, turns, more):
    tokens = [*before, *turn * turns, *turn[: more % len(turn)]]
    loop = find_loop(tokens)
    assert loop.period <= len(turn)
    if loop.begin >= len(before):  # else the text before loops, too
        assert tokens[: loop.cut] == [*before, *turn]
        assert loop.end == len(tokens)
    assert loops_at_end(tokens)


@given(st.lists(st.integers(0, 1), max_size=40))
def test_both_searches_agree(tokens):
    first = next((n for n in range(len(tokens) + 1) if loops_at_end(tokens[:n])), None)
    assert (first is None) == (find_loop(tokens) is None)
