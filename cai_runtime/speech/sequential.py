"""Windows one after the other: each begins where the text before it ended, and has that text as its prompt."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from cai_runtime.speech.decoding import is_silence
from cai_runtime.speech.job import Job
from cai_runtime.speech.record import Timed
from cai_runtime.speech.results import Segment
from cai_runtime.speech.segments import split_by_times
from cai_runtime.speech.steps import FRAMES_PER_SECOND, Done, Need, Step


def in_sequence(job: Job) -> Generator[Step, Any, None]:
    """Transcribe the clips of the options, or everything, into `job.record`."""
    seek = 0
    for start, end in job.options.clips:
        seek, last = max(seek, round(start * FRAMES_PER_SECOND)), end * FRAMES_PER_SECOND
        while seek < last:
            features, frames = job.hear(seek, round(last) if last < float("inf") else last)
            if frames == 0:
                break
            advance, segments = yield from _window(job, features, frames, seek)
            seek += min(max(advance, 1), frames)  # whatever the tokens were, the end comes nearer
            known = job.windows.seconds_known
            yield Done(segments, min(seek / FRAMES_PER_SECOND, known), known)


def _window(job: Job, features: Any, frames: int, seek: int) -> Generator[Step, Any, tuple[int, list[Segment]]]:
    """(frames to the next window, segments) of the window at `seek`."""
    options, record = job.options, job.record
    encoder = job.encode(features)
    language = yield from job.know_language(encoder)
    task = job.task(encoder, language, seek, record.previous)
    decoded = None
    while decoded is None:
        finished = yield Need(task.requests())
        decoded = task.take(finished)
    record.count(decoded)
    if is_silence(decoded, options):
        return frames, []
    split = split_by_times(decoded.tokens, job.tokens, frames)
    pieces = [Timed(*piece.seconds(seek), piece.tokens) for piece in split.pieces]
    segments = record.add(pieces, decoded, seek)
    if not options.condition_on_previous_text or decoded.temperature > options.prompt_reset_on_temperature:
        record.forget()
    return split.advance, segments
