"""Sound without enough text: `unheard_seconds`, and `slow_rate` of a piece."""

import numpy as np
import pytest
from speech import small_tokens

from cai_runtime.speech.segments import split_by_times
from cai_runtime.speech.sounding import sounding_spans
from cai_runtime.speech.unheard import slow_rate, unheard_seconds

TOKENS = small_tokens()
T = TOKENS.timestamp_begin


def unheard(token_ids, sounding=((0, 3000),), frames=3000):
    features = np.full((frames, 4), -0.8, np.float32)
    for begin, end in sounding:
        features[begin:end] = 0.9
    return unheard_seconds(split_by_times(token_ids, TOKENS, frames), sounding_spans(features), TOKENS.eot)


def piece(start, end, words):
    return [T + start // 2, *[1] * words, T + end // 2]


@pytest.mark.parametrize(
    ("tokens", "sounding", "seconds"),
    [
        (piece(0, 3000, 60), [(0, 3000)], 0),
        (piece(0, 3000, 31), [(0, 3000)], 0),
        (piece(0, 3000, 2), [(0, 3000)], 30),
        (piece(0, 3000, 2), [(0, 300), (2700, 3000)], 6),  # two spans in one piece
        (piece(0, 3000, 2), [(0, 100), (2900, 3000)], 0),  # short sounds
        (piece(0, 1000, 30) + piece(2000, 3000, 30), [(0, 3000)], 10),  # between pieces
        (piece(1000, 2000, 30) + piece(2000, 3000, 30), [(0, 3000)], 10),  # before the first
        (piece(0, 1000, 30), [(0, 3000)], 20),  # behind the last, which ends the window
        ([*piece(0, 1000, 30), T + 500], [(0, 3000)], 0),  # behind the last, where the next window begins
        (piece(0, 1000, 30) + piece(1000, 2000, 1), [(0, 3000)], 20),
        (piece(0, 1000, 30), [(0, 1000)], 0),  # silence needs no text
        ([], [(0, 3000)], 30),
    ],
)
def test_seconds(tokens, sounding, seconds):
    # spans begin earlier and end later, by a margin
    assert unheard(tokens, sounding) == pytest.approx(seconds, abs=0.35)


def test_a_window_of_a_frame():
    assert unheard([], [(0, 1)], frames=1) == 0


@pytest.mark.parametrize(
    ("span", "tokens", "sounding", "rate"),
    [
        ((0, 30), 3, [(0, 30)], 0.1),
        ((0, 30), 3, [(0, 10), (20, 30)], 0.15),
        ((0, 30), 30, [(0, 30)], None),  # slow speech
        ((0, 30), 3, [(0, 3), (28, 29)], None),  # words between silences
        ((0, 4.9), 1, [(0, 30)], None),  # a word that is drawn out
        ((0, 30), 3, [], None),
    ],
)
def test_rate(span, tokens, sounding, rate):
    assert slow_rate(span, tokens, sounding) == (None if rate is None else pytest.approx(rate))
