"""Text invented over silence."""

from __future__ import annotations

import pytest

from cai_runtime.speech.record import Timed
from cai_runtime.speech.results import Word
from cai_runtime.speech.silences import drop_invented, is_anomalous


def piece(start: float, end: float, *, probability=0.9) -> Timed:
    count = round(2 * (end - start))
    step = (end - start) / count
    words = [Word(start + k * step, start + (k + 1) * step, f" w{k}", probability) for k in range(count)]
    return Timed(start, end, (1,), tuple(words))


def dropped(*pieces, threshold=2.0, before=0.0, start=0.0, end=30.0, last=False):
    kept, again = drop_invented(
        pieces, threshold=threshold, before=before, start=start, end=end, window=30.0, last=last
    )
    return len(kept), again


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([Word(0, 0.4, " a", 0.9)] * 3, False),
        ([Word(0, 0.4, " a", 0.1)] * 3, True),
        ([Word(0, 0.4, " a", 0.1)] * 3 + [Word(0, 0.4, " a", 0.9)] * 9, True),
        ([Word(0, 0.4, " a", 0.1)] * 2 + [Word(0, 0.4, " a", 0.9)] * 9, False),
        ([Word(0, 3.5, " a", 0.9)], True),
        ([Word(0, 0.0, " a", 0.9)] * 2, True),
        ([Word(0, 0.4, " a", 0.1), Word(1, 1.4, " ...", 0.9)], True),
        ([], False),
    ],
)
def test_what_looks_invented(words, expected):
    assert is_anomalous(words) is expected


def test_likely_text_stays_whatever_surrounds_it():
    assert dropped(piece(10, 11), piece(20, 21)) == (2, None)


def test_silence_before_an_invented_beginning_is_skipped():
    assert dropped(piece(10, 11, probability=0.1), piece(12, 13)) == (0, 10)
    assert dropped(piece(1, 2, probability=0.1), piece(2.1, 3)) == (2, None)  # speech follows at once


def test_an_invented_piece_between_silences_is_dropped_and_heard_again():
    odd = piece(10, 11, probability=0.1)
    assert dropped(piece(0, 5), odd, piece(15, 16)) == (1, 10)
    assert dropped(piece(0, 9), odd, piece(15, 16)) == (3, None)  # behind speech
    assert dropped(piece(0, 5), odd, piece(11.5, 16)) == (3, None)  # before speech
    assert dropped(piece(0, 5), odd, piece(11.5, 16, probability=0.1)) == (1, 10)


def test_an_invented_end_of_the_audio_ends_it():
    odd = piece(28, 29, probability=0.1)
    assert dropped(piece(0, 5), odd, end=30.0, last=True) == (1, 30.0)
    assert dropped(piece(0, 5), odd, end=30.0) == (1, 28)
