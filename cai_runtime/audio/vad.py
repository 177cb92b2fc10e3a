"""Finds speech in a stream of audio: spans of seconds, given out as soon as they are certain, in flat memory.

The probabilities are silero's (`cai_runtime.audio.silero`), the options have the names, meanings and defaults of
faster-whisper, and the spans equal those of `get_speech_timestamps` of https://github.com/snakers4/silero-vad.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cai_runtime.audio.mel import RATE
from cai_runtime.audio.silero import BLOCK, FRAME, SileroNetwork
from cai_runtime.errors import NonFiniteAudioError, OptionTypeError, OptionValueError

Span = tuple[float, float]  # seconds

_CUT_SILENCE = RATE * 98 // 1000  # samples of silence at which speech that lasts too long is cut, silero's default
_NEGATIVE = 0.15  # how much lower the threshold is for speech to end, silero's default
_LEAST = 0.01
_TAIL_MS = 100.0  # kept behind speech where only a padding before it is asked for


@dataclass(frozen=True)
class VadOptions:
    """What counts as speech.

    threshold: a frame of 32 ms is speech from this probability on. neg_threshold: speech ends below it; None: threshold -
    0.15, at least 0.01. min_speech_duration_ms: shorter speech is dropped. max_speech_duration_s: longer speech is cut at
    its longest silence of more than 98 ms, or there where it gets too long. min_silence_duration_ms: silence that ends a
    span. speech_pad_ms: added before and behind each span; prefix_pad_ms: before it, None: as much as behind.
    Raises OptionTypeError and OptionValueError, naming the option.
    """

    threshold: float = 0.5
    neg_threshold: float | None = None
    min_speech_duration_ms: float = 0
    max_speech_duration_s: float = math.inf
    min_silence_duration_ms: float = 2000
    speech_pad_ms: float = 400
    prefix_pad_ms: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise OptionTypeError(f"VAD option {field.name} is {value!r}, not a number")
            if field.name.endswith("threshold"):
                allowed, good = "from 0 to 1", 0 <= value <= 1
            elif field.name == "max_speech_duration_s":
                allowed, good = "above 0", value > 0
            else:
                allowed, good = "finite and at least 0", 0 <= value < math.inf
            if not good:
                raise OptionValueError(f"VAD option {field.name} is {value!r}, allowed are numbers {allowed}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> VadOptions:
        """Options by their names. Raises OptionTypeError for a name that is none."""
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                raise OptionTypeError(f"there is no VAD option {name!r}: {', '.join(names)}")
        return cls(**given)

    @classmethod
    def server(
        cls,
        threshold: float | None = None,
        prefix_padding_ms: float | None = None,
        silence_duration_ms: float | None = None,
    ) -> VadOptions:
        """Options of the API's `chunking_strategy` of type `server_vad`, with its defaults: 0.5, 300 ms and 200 ms."""
        silence = 200 if silence_duration_ms is None else silence_duration_ms
        return cls(
            threshold=0.5 if threshold is None else threshold,
            min_silence_duration_ms=silence,
            speech_pad_ms=_TAIL_MS,
            prefix_pad_ms=300 if prefix_padding_ms is None else prefix_padding_ms,
        )


class SpeechDetector:
    """Speech in one stream of 16 kHz audio. Holds at most a second of it. One thread at a time."""

    def __init__(self, options: VadOptions | None = None):
        """Raises AudioPackageError when the extra `vad` is not installed."""
        self._network = SileroNetwork()
        self._spans = SpanFinder(options or VadOptions())
        self._waiting = np.empty(BLOCK * FRAME, np.float32)
        self._filled = self._heard = 0
        self._ended = False

    @property
    def certain(self) -> float:
        """Seconds up to which every span has been given out, but for one that goes on there."""
        return self._spans.certain / RATE

    @property
    def speaking(self) -> float | None:
        """Second at which the span begins that was not given out yet; None: none has begun for certain."""
        return None if self._spans.begun is None else self._spans.begun / RATE

    def feed(self, samples: np.ndarray) -> list[Span]:
        """Hear fp32 [n] more samples, any number. Returns the spans that became certain, in order and apart.

        Raises NonFiniteAudioError for NaN or infinity, and RuntimeError after `finish`.
        """
        if self._ended:
            raise RuntimeError("the detector was finished: make another one for another stream")
        bad = np.flatnonzero(~np.isfinite(samples))
        if len(bad):
            seconds = (self._heard + int(bad[0])) / RATE
            raise NonFiniteAudioError(f"the audio holds {samples[bad[0]]} at {seconds:.3f} s", seconds=seconds)
        found: list[tuple[int, int]] = []
        self._heard += len(samples)
        begin = 0
        while begin < len(samples):
            taken = min(len(samples) - begin, len(self._waiting) - self._filled)
            self._waiting[self._filled : self._filled + taken] = samples[begin : begin + taken]
            self._filled += taken
            begin += taken
            if self._filled == len(self._waiting):
                found += self._spans.feed(self._network(self._waiting))
                self._filled = 0
        return _seconds(found)

    def finish(self) -> list[Span]:
        """The spans left at the end of the stream."""
        if self._ended:
            return []
        self._ended = True
        found: list[tuple[int, int]] = []
        if self._filled:
            self._waiting[self._filled :] = 0.0
            found += self._spans.feed(self._network(self._waiting)[: -(-self._filled // FRAME)])
        return _seconds([*found, *self._spans.finish(self._heard)])


def speech_spans(audio: np.ndarray | Iterable[np.ndarray], options: VadOptions | None = None) -> Iterator[Span]:
    """Spans of speech (start, end) in seconds, in order and apart, as they become certain.

    audio: fp32 [samples] at 16 kHz, or blocks of them. Raises AudioPackageError without the extra `vad`,
    NonFiniteAudioError, and what the blocks raise.
    """
    detector = SpeechDetector(options)
    for block in [audio] if isinstance(audio, np.ndarray) else audio:
        yield from detector.feed(block)
    yield from detector.finish()


def _seconds(spans: list[tuple[int, int]]) -> list[Span]:
    return [(start / RATE, end / RATE) for start, end in spans]


class SpanFinder:
    """Spans of samples from probabilities of frames, as silero's `get_speech_timestamps_from_probs` finds them.

    A raw span begins with a frame of speech and ends where a silence began that lasts long enough. It is padded, or shares
    the silence with its neighbour where that is shorter than both paddings; so it is given out when it is certain how near
    the next one is.
    """

    def __init__(self, options: VadOptions):
        self._threshold = options.threshold
        negative = options.neg_threshold
        self._negative = max(options.threshold - _NEGATIVE, _LEAST) if negative is None else negative
        self._least = RATE * options.min_speech_duration_ms / 1000
        self._silence = RATE * options.min_silence_duration_ms / 1000
        self._after = RATE * options.speech_pad_ms / 1000
        self._before = self._after if options.prefix_pad_ms is None else RATE * options.prefix_pad_ms / 1000
        self._most = RATE * options.max_speech_duration_s - FRAME - self._before - self._after
        self._now = 0  # sample at which the next frame begins
        self._start: int | None = None  # of the raw span that goes on
        self._quiet: int | None = None  # where the silence within it began
        self._pauses: list[tuple[int, int]] = []  # (begin, samples) of silences within it at which it may be cut
        self._waiting: tuple[int, int] | None = None  # a raw span whose end is not padded, its begin is
        self._likely: int | None = None  # start of the raw span that goes on, once it is certain that it is kept

    @property
    def certain(self) -> int:
        """Sample before which no span will begin or end, that was not given out, but for the one of `begun`."""
        if self._waiting is not None:
            return max(0, self._waiting[0])
        if self._start is not None:
            return max(0, int(self._start - self._before))
        return max(0, int(self._now - self._before))

    @property
    def begun(self) -> int | None:
        """Sample at which a span begins that is certain to come and was not given out."""
        if self._waiting is not None:
            return self._waiting[0]
        return None if self._likely is None else max(0, int(self._likely - self._before))

    def feed(self, probabilities: Iterable[float]) -> list[tuple[int, int]]:
        """Take the next frames' probabilities; the spans that became certain."""
        found: list[tuple[int, int]] = []
        for probability in probabilities:
            found += self._frame(float(probability))
            self._now += FRAME
        if self._waiting is not None:
            found += self._released()
        return found

    def finish(self, length: int) -> list[tuple[int, int]]:
        """The last spans. length: samples of the stream."""
        found: list[tuple[int, int]] = []
        if self._start is not None and length - self._start > self._least:
            found += self._close(self._start, length)
        self._start = None
        if self._waiting is not None:
            start, end = self._waiting
            found.append((start, int(min(length, end + self._after))))
            self._waiting = None
        return found

    def _frame(self, probability: float) -> list[tuple[int, int]]:
        now, speech, found = self._now, probability >= self._threshold, list[tuple[int, int]]()
        if speech and self._quiet is not None:
            if now - self._quiet > _CUT_SILENCE:
                self._pauses.append((self._quiet, now - self._quiet))
            self._quiet = None
        if self._start is None:
            if speech:
                self._start = now
            return found
        if speech and now - self._start > self._least:
            self._likely = self._start  # its end can only lie behind this frame
        if now - self._start > self._most:
            if not self._pauses:
                found += self._close(self._start, now)
                self._start = self._quiet = self._likely = None
                return found
            begin, samples = max(self._pauses, key=lambda pause: pause[1])
            found += self._close(self._start, begin)
            self._start, self._quiet, self._likely, self._pauses = begin + samples, None, None, []
        if probability < self._negative:
            if self._quiet is None:
                self._quiet = now
            if now - self._quiet >= self._silence:
                if self._quiet - self._start > self._least:
                    found += self._close(self._start, self._quiet)
                self._start = self._quiet = self._likely = None
                self._pauses = []
        return found

    def _close(self, start: int, end: int) -> list[tuple[int, int]]:
        """Take a raw span as kept; the one before it gets its end."""
        if self._waiting is None:
            self._waiting = (max(0, int(start - self._before)), end)
            return []
        found, padded = self._apart(self._waiting, start)
        self._waiting = (padded, end)
        return [found]

    def _apart(self, waiting: tuple[int, int], start: int) -> tuple[tuple[int, int], int]:
        """The span before with its end, and where the next raw span, beginning at `start`, is to begin."""
        begun, end = waiting
        silence, both = start - end, self._before + self._after
        if silence >= both:
            return (begun, int(end + self._after)), max(0, int(start - self._before))
        return (begun, end + int(silence * self._after // both)), max(0, int(start - silence * self._before // both))

    def _released(self) -> list[tuple[int, int]]:
        """The span that waits, if nothing that may still come changes its end."""
        assert self._waiting is not None
        next_one = self._now - FRAME if self._start is None else self._start  # the last frame may reach behind the end
        if next_one - self._waiting[1] < self._before + self._after:
            return []
        found, self._waiting = (self._waiting[0], int(self._waiting[1] + self._after)), None
        return [found]
