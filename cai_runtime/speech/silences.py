"""Drops text that was invented over silence, by how its words look: unlikely, too short, too long.

The scores and the conditions are those of OpenAI's `hallucination_silence_threshold` (whisper/transcribe.py).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from cai_runtime.speech.record import Timed
from cai_runtime.speech.results import Word

_UNLIKELY = 0.15  # probability of a word below which it counts as a whole anomaly
_SHORT, _SHORT_WEIGHT = 0.133, 15  # seconds of a word; what a second less counts
_LONG = 2.0  # seconds of a word; a second more counts as a whole anomaly
_LOOKED_AT = 8  # words of a piece
_ENOUGH = 3  # anomalies that make a piece one
_EDGE = 2.0  # seconds from the window's edge within which silence is taken for granted


def is_anomalous(words: Sequence[Word]) -> bool:
    """Whether a piece looks invented. Words of punctuation alone do not count."""
    spoken = [word for word in words if not _is_punctuation(word.word)][:_LOOKED_AT]
    score = sum(map(_anomaly, spoken))
    return bool(words) and (score >= _ENOUGH or score + 0.01 >= len(spoken))


def drop_invented(
    pieces: Sequence[Timed], *, threshold: float, before: float, start: float, end: float, window: float, last: bool
) -> tuple[list[Timed], float | None]:
    """(the pieces that stay, the second from which the audio is to be heard again; None: as the tokens say).

    pieces: of a window, with words. threshold: seconds of silence. before: where the last word before the window ended.
    start, end: of the window's audio. window: seconds of a whole window. last: whether the audio ends with the window.
    """
    spoken = [(number, piece) for number, piece in enumerate(pieces) if piece.words]
    if spoken and is_anomalous(spoken[0][1].words or ()) and spoken[0][1].start - start > threshold:
        return [], spoken[0][1].start  # it may be real: it is heard again without the silence
    for at, (number, piece) in enumerate(spoken):
        if is_anomalous(piece.words or ()):
            following = spoken[at + 1][1] if at + 1 < len(spoken) else None
            silent_before = piece.start - before > threshold or piece.start < threshold or piece.start - start < _EDGE
            silent_after = (
                (end if following is None else following.start) - piece.end > threshold
                or (following is not None and is_anomalous(following.words or ()))
                or start + window - piece.end < _EDGE
            )
            if silent_before and silent_after:
                ends = last and end - piece.end < threshold
                return list(pieces[:number]), end if ends else max(start + 1, piece.start)
        before = piece.end
    return list(pieces), None


def _anomaly(word: Word) -> float:
    seconds = word.end - word.start
    score = 1.0 if word.probability < _UNLIKELY else 0.0
    return score + max(_SHORT - seconds, 0.0) * _SHORT_WEIGHT + max(seconds - _LONG, 0.0)


def _is_punctuation(text: str) -> bool:
    return not any(unicodedata.category(char)[0] in "LNS" for char in text)
