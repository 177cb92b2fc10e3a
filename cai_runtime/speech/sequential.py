"""Windows one after the other: each begins where the text before it ended, and has that text as its prompt."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from cai_runtime.speech.decoding import is_silence
from cai_runtime.speech.job import Job
from cai_runtime.speech.record import last_word_end
from cai_runtime.speech.results import Segment
from cai_runtime.speech.segments import split_by_times
from cai_runtime.speech.steps import FRAMES_PER_SECOND, Need, Step
from cai_runtime.speech.timing import timed_pieces

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


def _window(job: Job, features: Any, frames: int, seek: int) -> Generator[Step, Any, tuple[int, list[Segment]]]:
    """(frames to the next window, segments) of the window at `seek`."""
    options, record = job.options, job.record
    window = yield from job.begin(seek, features, frames, record.previous)
    decoded = None
    while decoded is None:
        finished = yield Need(window.task.requests())
        decoded = window.task.take(finished)
    record.count(decoded)
    if is_silence(decoded, options):
        return frames, []
    split = split_by_times(decoded.tokens, job.tokens, frames)
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
