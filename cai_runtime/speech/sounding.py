"""Finds where a window of log-mel features sounds, and where it pauses, by its energy alone."""

from __future__ import annotations

import numpy as np

from cai_runtime.speech.steps import FRAMES_PER_SECOND

Span = tuple[float, float]  # seconds

FLAT = 12.0  # dB between quiet and loud frames below which a window has no silence to be found
SILENCE = 0.3  # seconds of quiet that part two spans: shorter pauses occur within words
CLICK = 0.05  # seconds: a shorter sound is no word
SPEECH_RANGE = 25.0  # dB between a span's loud frames and its first and last ones
SMOOTHED = 5  # frames over which loudness is averaged to find pauses
LONG_PAUSE = 60  # frames: of pauses from 0.6 s on, the last is best; the next window has what is behind 0.3 s of it
MARGIN = 0.04  # seconds that a span begins earlier and ends later: soft consonants at a word's ends


def frame_levels(features: np.ndarray) -> np.ndarray:
    """Energy of each frame in dB, without an absolute zero.

    features: fp32 [frames, mels], Whisper's: (log10(power) clamped to 8 below the greatest, + 4) / 4.
    """
    power = np.power(10.0, 4.0 * features.astype(np.float64) - 4.0)
    return 10.0 * np.log10(np.maximum(power.mean(axis=1), 1e-12))


def sounding_spans(features: np.ndarray) -> list[Span]:
    """Spans of a window that are louder than its quiet parts, in seconds from the first frame, in order, apart.

    features: fp32 [frames, mels], audio alone, no padding. The whole window is one span when it is evenly loud.
    """
    frames = len(features)
    if not frames:
        return []
    levels = frame_levels(features)
    quiet, loud = np.percentile(levels, (10, 95))
    if loud - quiet < FLAT:
        return [(0.0, frames / FRAMES_PER_SECOND)]
    threshold = max(_quietest_sound(quiet, loud), loud - 40.0)
    joined: list[list[int]] = []
    for begin, end in _runs(levels > threshold):
        if joined and begin - joined[-1][1] < SILENCE * FRAMES_PER_SECOND:
            joined[-1][1] = end
        else:
            joined.append([begin, end])
    margin = round(MARGIN * FRAMES_PER_SECOND)
    found = []
    for begin, end in joined:
        inside = levels[begin:end]
        # A recording's own noise around its speech is louder than digital silence beside it.
        sounding = np.flatnonzero(inside > np.percentile(inside, 95) - SPEECH_RANGE)
        begin, end = begin + int(sounding[0]), begin + int(sounding[-1]) + 1
        if end - begin >= CLICK * FRAMES_PER_SECOND:
            span = max(0, begin - margin), min(frames, end + margin)
            found.append((span[0] / FRAMES_PER_SECOND, span[1] / FRAMES_PER_SECOND))
    return found


def longest_pause(features: np.ndarray) -> int:
    """A frame in the longest pause in log-mel features [frames, mels], the last of equals, at most 0.3 s from its begin.

    Sentences end in longer pauses than words do, and a window of whole sentences is heard better. The quietest frame
    is a pause if there is no other.
    """
    levels = np.convolve(frame_levels(features), np.ones(SMOOTHED) / SMOOTHED, mode="valid")
    quiet, loud = np.percentile(levels, (3, 95))
    threshold = max(_quietest_sound(quiet, loud), levels.min())
    length, begin = max((min(end - begin, LONG_PAUSE), begin) for begin, end in _runs(levels <= threshold))
    return begin + length // 2 + SMOOTHED // 2


def intersect(one: list[Span], other: list[Span]) -> list[Span]:
    """What two lists of spans, each in order and apart, have in common."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if begin < end:
            found.append((begin, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def _quietest_sound(quiet: float, loud: float) -> float:
    """dB above which a frame sounds. quiet, loud: dB of quiet and of loud frames."""
    return min(quiet + 0.3 * (loud - quiet), loud - 8.0)


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(begin), int(end)) for begin, end in zip(edges[::2], edges[1::2], strict=True)]
