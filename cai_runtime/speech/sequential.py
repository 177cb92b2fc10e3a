"""Windows one after the other: each begins where the text before it ended, and has that text as its prompt.

Where a window's text passes over sound, it is decoded again without the text before it, and the better result is taken.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from cai_runtime.speech.decoding import Decoded, is_silence
from cai_runtime.speech.job import Job, Window
from cai_runtime.speech.record import last_word_end
from cai_runtime.speech.results import Segment
from cai_runtime.speech.segments import Split, split_by_times
from cai_runtime.speech.steps import FRAMES_PER_SECOND, Need, Step
from cai_runtime.speech.timing import timed_pieces
from cai_runtime.speech.unheard import unheard_seconds

GAIN = 2.0  # seconds of sound that text without a prompt must have more text for, to be taken
LEAST_REST = 10  # frames: what is left behind a window holds no word if it is shorter


def in_sequence(job: Job) -> Generator[Step, Any, None]:
    """Transcribe the clips of the options, or everything, into `job.record`."""
    seek = 0
    for start, end in job.clips:
        first = seek = max(seek, round(start * FRAMES_PER_SECOND))
        while True:
            features, frames = job.hear(seek, end * FRAMES_PER_SECOND)
            if frames == 0 or (frames < LEAST_REST and seek > first):
                break
            advance, segments = yield from _window(job, features, frames, seek)
            seek += min(max(advance, 1), frames)  # whatever the tokens were, the end comes nearer
            yield job.done(segments, seek)


def _decode(
    job: Job, seek: int, features: Any, frames: int, previous: list[int]
) -> Generator[Step, Any, tuple[Window, Decoded]]:
    window = yield from job.begin(seek, features, frames, previous)
    decoded = None
    while decoded is None:
        finished = yield Need(window.task.requests())
        decoded = window.task.take(finished)
    job.record.count(decoded)
    return window, decoded


def _without_previous(
    job: Job, window: Window, split: Split
) -> Generator[Step, Any, tuple[Window, Decoded, Split] | None]:
    """The window decoded without the text before it, where that passes over less sound; None where it does not."""
    options, eot = job.options, job.tokens.eot
    unheard = unheard_seconds(split, window.sounding, eot)
    if not unheard:
        return None
    other, decoded = yield from _decode(job, window.seek, window.features, window.frames, [])
    if is_silence(decoded, options) or decoded.temperature > options.prompt_reset_on_temperature:
        return None
    other_split = split_by_times(decoded.tokens, job.tokens, window.frames)
    gained = unheard - unheard_seconds(other_split, window.sounding, eot)
    return (other, decoded, other_split) if gained >= GAIN else None


def _window(job: Job, features: Any, frames: int, seek: int) -> Generator[Step, Any, tuple[int, list[Segment]]]:
    """(frames to the next window, segments) of the window at `seek`."""
    options, record = job.options, job.record
    previous = record.previous
    window, decoded = yield from _decode(job, seek, features, frames, previous)
    if is_silence(decoded, options):
        return frames, []
    split = split_by_times(decoded.tokens, job.tokens, frames)
    if previous and record.segments and not options.without_timestamps:  # a caller's prompt is not taken away
        better = yield from _without_previous(job, window, split)
        if better is not None:
            window, decoded, split = better
            record.forget()
    advance = split.advance
    pieces = yield from timed_pieces(job, window, decoded, split.pieces)
    end = last_word_end(pieces)
    if end is not None and not split.ends_open and round(end * FRAMES_PER_SECOND) > seek:
        advance = round(end * FRAMES_PER_SECOND) - seek
    pieces, again = job.without_invented(pieces, seek, frames)
    segments = record.add(pieces, decoded, seek)
    if not options.condition_on_previous_text or decoded.temperature > options.prompt_reset_on_temperature:
        record.forget()
    return advance if again is None else again, segments
