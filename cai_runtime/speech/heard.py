"""Audio of which only speech is heard: what lies between the spans of voice activity detection is cut out.

Windows are made of the spans' frames, one span directly behind the other, so that no window holds long silence. A clock
tells at which time of the audio something is. All of it moves forward, in flat memory.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cai_runtime.audio.mel import RATE
from cai_runtime.audio.vad import SpeechDetector, VadOptions
from cai_runtime.errors import OptionTypeError, OptionValueError, TranscriptionError
from cai_runtime.speech.record import Clock
from cai_runtime.speech.steps import FRAMES, FRAMES_PER_SECOND, SampledWindows

LONGEST = 30.0  # seconds of a span, at most: a speech of hours is given out in parts, which are put together again
_READ = 10 * RATE  # samples that the detector hears at a time
_BEHIND = 60 * FRAMES_PER_SECOND  # frames without speech after which the audio before them is let go


@dataclass(frozen=True)
class Cut:
    """Frames that are heard: `length` of them, from `heard` on, are those of the audio from `audio` on."""

    heard: int
    audio: int
    length: int


class CutClock(Clock):
    """Times of what is heard as times of the audio."""

    def __init__(self) -> None:
        self.cuts: list[Cut] = []
        self._starts: list[int] = []  # of what is heard

    def add(self, cut: Cut) -> None:
        self.cuts.append(cut)
        self._starts.append(cut.heard)

    def start(self, seconds: float) -> float:
        return self._at(bisect_right(self._starts, seconds * FRAMES_PER_SECOND) - 1, seconds)

    def end(self, seconds: float) -> float:
        return self._at(bisect_left(self._starts, seconds * FRAMES_PER_SECOND) - 1, seconds)

    def word(self, start: float, end: float) -> tuple[float, float]:
        """A word that reaches over a cut lies where it is longer."""
        first = bisect_right(self._starts, start * FRAMES_PER_SECOND) - 1
        last = max(bisect_left(self._starts, end * FRAMES_PER_SECOND) - 1, first)
        if first == last:
            return self._at(first, start), self._at(first, end)
        parts = []
        for index in range(max(first, 0), last + 1):
            cut = self.cuts[index]
            begin = max(start, cut.heard / FRAMES_PER_SECOND)
            parts.append((min(end, (cut.heard + cut.length) / FRAMES_PER_SECOND) - begin, -index, begin))
        length, index, begin = max(parts)
        return self._at(-index, begin), self._at(-index, begin + length)

    def _at(self, index: int, seconds: float) -> float:
        """The time by the cut of this number; before the first one, and without any, the same."""
        if not self.cuts:
            return seconds
        cut = self.cuts[max(index, 0)]
        within = min(max(seconds * FRAMES_PER_SECOND - cut.heard, 0), cut.length)
        return (cut.audio + within) / FRAMES_PER_SECOND


class SpeechOnly:
    """`Windows` over the speech in others.

    options: fields of `VadOptions`. clips: (start, end) seconds of the audio that count; the end may be infinity.

    Raises TranscriptionError for options that are wrong, AudioPackageError without the extra `vad`.
    """

    def __init__(self, windows: SampledWindows, options: Mapping[str, Any], clips: Sequence[tuple[float, float]]):
        try:
            vad = VadOptions.of(options)
        except (OptionTypeError, OptionValueError) as error:
            raise TranscriptionError(str(error), param="vad") from error
        self.clock = CutClock()
        self._windows = windows
        self._detector = SpeechDetector(replace(vad, max_speech_duration_s=min(vad.max_speech_duration_s, LONGEST)))
        self._clips = [(round(a * FRAMES_PER_SECOND), b * FRAMES_PER_SECOND) for a, b in clips]
        self._read = 0  # samples that the detector heard
        self._reached = 0  # the audio's frame up to which frames were taken or let go
        self._held: list[np.ndarray] = []  # frames from `_first` on
        self._first = self._end = 0  # of what is heard
        self._over = False

    @property
    def seconds_known(self) -> float:
        return self._windows.seconds_known

    def features(self, start: int) -> tuple[np.ndarray, int]:
        """See `Windows`. start: a frame of what is heard, not before the latest one."""
        while self._end < start + FRAMES and not self._over:
            self._hear()
        held = np.concatenate(self._held) if self._held else np.zeros((0, 1), np.float32)
        held = held[max(start - self._first, 0) :]
        self._held, self._first = [held], max(start, self._first)
        part = held[:FRAMES]
        if len(part) == FRAMES:
            return part.copy(), FRAMES
        window = np.full((FRAMES, held.shape[1]), part.min() if len(part) else 0.0, np.float32)
        window[: len(part)] = part
        return window, len(part)

    def _hear(self) -> None:
        """Let the detector hear more, and take the frames of the spans that it found."""
        samples = self._windows.samples(self._read, self._read + _READ)
        self._read += len(samples)
        ended = len(samples) < _READ or self._read >= self._clips[-1][1] / FRAMES_PER_SECOND * RATE
        spans = self._detector.feed(samples)
        for start, end in [*spans, *(self._detector.finish() if ended else ())]:
            self._take(round(start * FRAMES_PER_SECOND), round(end * FRAMES_PER_SECOND))
        self._over = ended
        certain = int(self._detector.certain * FRAMES_PER_SECOND)
        if not ended and certain - self._reached > _BEHIND:
            self._windows.features(certain)
            self._reached = certain

    def _take(self, start: int, end: int) -> None:
        """Take the audio's frames of a span, those that lie in a clip."""
        for first, last in self._clips:
            begin, stop = max(start, first, self._reached), min(end, last)
            while begin < stop:
                window, real = self._windows.features(begin)
                count = int(min(real, stop - begin))
                if count == 0:
                    break
                self._held.append(window[:count])
                self.clock.add(Cut(self._end, begin, count))
                self._end += count
                begin = self._reached = begin + count
