"""Windows decoded together: the audio is cut beforehand, in pauses, and several windows are in the engine at once.

Every window has all of the caller's options: prompt, times, thresholds and a fallback of its own. Text before it is no
prompt, for windows do not wait for each other. Results are taken in the order of the audio. A phrase at a window's end is
not left to the next one, which begins behind it. What a window leaves unheard all the same, because its tokens end at their
limit or in a loop, becomes a window of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from cai_runtime.speech.decoding import Decoded, is_silence
from cai_runtime.speech.job import LEAST_PART, Job, Window, silence
from cai_runtime.speech.segments import Piece, split_by_times
from cai_runtime.speech.sounding import longest_pause
from cai_runtime.speech.steps import FRAMES, FRAMES_PER_SECOND, Answer, Ask, Ready, Step
from cai_runtime.speech.timing import timed_pieces

SEARCHED = 600  # frames at a window's end in which it is cut: 6 s


def together(job: Job) -> Generator[Step, Any, None]:
    """Transcribe the clips of the options, or everything, into `job.record`."""
    most = job.options.windows_together
    waiting: deque[Window] = deque()  # in the order of the audio
    cuts = _cuts(job)
    more = True
    while more or waiting:
        while more and sum(one.decoded is None for one in waiting) < most and len(waiting) < 2 * most:
            cut = next(cuts, None)
            if cut is None:
                more = False
            else:
                waiting.append((yield from _begin(job, *cut)))
        if not waiting:
            break
        for window in list(waiting):  # those that failed are asked again beside the others
            if window.decoded is None and (window is waiting[0] or (yield Ready(window.ticket))):
                window.decoded = window.task.take((yield Answer(window.ticket)))
                if window.decoded is None:
                    window.ticket = yield Ask(window.task.requests())
        if (decoded := waiting[0].decoded) is not None:
            rest = yield from _finish(job, waiting.popleft(), decoded)
            if rest is not None:
                waiting.appendleft(rest)


def _cuts(job: Job) -> Iterator[tuple[int, np.ndarray, int]]:
    """(first frame, features, frames of audio) of the windows."""
    seek = 0
    for start, end in job.clips:
        seek = max(seek, round(start * FRAMES_PER_SECOND))
        while True:
            features, frames = job.hear(seek, end * FRAMES_PER_SECOND)
            if frames == 0:
                break
            if frames == FRAMES:
                frames = FRAMES - SEARCHED + longest_pause(features[-SEARCHED:])
                silence(features, frames)
            yield seek, features, frames
            seek += frames


def _begin(job: Job, seek: int, features: np.ndarray, frames: int) -> Generator[Step, Any, Window]:
    window = yield from job.begin(seek, features, frames, job.prompts.initial, whole=True)
    window.ticket = yield Ask(window.task.requests())
    return window


def _finish(job: Job, window: Window, decoded: Decoded) -> Generator[Step, Any, Window | None]:
    """Record a window; returns what it left unheard, in the engine already."""
    job.record.count(decoded)
    heard, segments, rest = window.frames, [], None
    if not is_silence(decoded, job.options):
        pieces, heard = _pieces(job, window, decoded)
        timed = yield from timed_pieces(job, window, decoded, pieces)
        timed, again = job.without_invented(timed, window.seek, window.frames)
        heard = heard if again is None else again
        if window.frames - heard < LEAST_PART:
            heard = window.frames
        else:
            features = np.full_like(window.features, window.features.min())
            features[: FRAMES - heard] = window.features[heard:]
            rest = yield from _begin(job, window.seek + heard, features, window.frames - heard)
        segments = job.record.add(timed, decoded, window.seek)
    yield job.done(segments, window.seek + heard)
    return rest


def _pieces(job: Job, window: Window, decoded: Decoded) -> tuple[list[Piece], int]:
    """(pieces of a window, frames that they cover)."""
    split = split_by_times(decoded.tokens, job.tokens, window.frames)
    pieces = list(split.pieces)
    tail = decoded.tokens[sum(len(piece.tokens) for piece in pieces) :]
    if not decoded.ended or not any(token < job.tokens.eot for token in tail):
        return pieces, split.advance
    # The window was cut where it is quiet: text without an end time ends there.
    start = split.advance if split.advance < window.frames else pieces[-1].end
    pieces.append(Piece(min(start, window.frames), window.frames, tail))
    return pieces, window.frames
