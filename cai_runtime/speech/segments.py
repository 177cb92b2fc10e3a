"""From the tokens of a window to pieces with times, and to where the next window begins.

The rules are those of OpenAI's long-form decoding (Radford et al. 2022, section 4.5; `transcribe.py`): text up to the last
pair of timestamps is final, and the next window begins there; without such a pair the whole window is one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cai_runtime.speech.steps import FRAMES_PER_SECOND
from cai_runtime.speech.tokens import SpeechTokens

FRAMES_PER_STEP = 2  # a timestamp's step is 0.02 s, a frame 0.01 s


@dataclass(frozen=True)
class Piece:
    """Tokens between two timestamps, those included. start, end: frames from the beginning of the window."""

    start: int
    end: int
    tokens: tuple[int, ...]

    def seconds(self, seek: int) -> tuple[float, float]:
        """(start, end) in seconds of the audio. seek: the window's first frame."""
        return (seek + self.start) / FRAMES_PER_SECOND, (seek + self.end) / FRAMES_PER_SECOND


@dataclass(frozen=True)
class Split:
    """pieces: in order, inside the window, not overlapping. advance: frames to the beginning of the next window, at least
    1. ends_open: the last piece ends with a single timestamp, behind which the model heard nothing."""

    pieces: tuple[Piece, ...]
    advance: int
    ends_open: bool


def split_by_times(token_ids: Sequence[int], tokens: SpeechTokens, frames: int) -> Split:
    """Cut a window's tokens at its timestamps.

    token_ids: the transcript without its end token. frames: of the window that hold audio, at least 1.
    """
    first = tokens.timestamp_begin
    is_time = [token >= first for token in token_ids]
    ends_open = len(token_ids) >= 2 and is_time[-1] and not is_time[-2]
    cuts = [i for i in range(1, len(token_ids)) if is_time[i] and is_time[i - 1]]
    if not cuts:
        times = [token for token in token_ids if token >= first]
        end = frames
        if times and times[-1] != first:
            end = _frame(times[-1] - first, frames)
        piece = Piece(0, max(end, 1), tuple(token_ids))
        return Split((piece,) if token_ids else (), frames, ends_open)
    if ends_open:
        cuts.append(len(token_ids))
    pieces: list[Piece] = []
    before, reached = 0, 0
    for cut in cuts:
        part = tuple(token_ids[before:cut])
        start = _frame(part[0] - first, frames) if part[0] >= first else reached
        start = max(start, reached)
        reached = max(_frame(part[-1] - first, frames), start)
        pieces.append(Piece(start, reached, part))
        before = cut
    last = FRAMES_PER_STEP * (token_ids[before - 1] - first)
    advance = last if 0 < last < frames and not ends_open else frames
    return Split(tuple(pieces), advance, ends_open)


def _frame(step: int, frames: int) -> int:
    """The frame of a timestamp, within the audio."""
    return min(FRAMES_PER_STEP * step, frames)
