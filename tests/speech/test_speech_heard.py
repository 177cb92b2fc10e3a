"""Audio of which only speech is heard: what windows hold, and what time it is there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import speech
from hypothesis import given, settings
from hypothesis import strategies as st
from speech import PLACE, Track, place, scripted, small_tokens

from cai_runtime.errors import TranscriptionError
from cai_runtime.speech import heard
from cai_runtime.speech.heard import Cut, CutClock, SpeechOnly
from cai_runtime.speech.options import Options
from cai_runtime.speech.transcriber import transcribe_steps

TOKENS = small_tokens()
T = TOKENS.timestamp_begin
RATE = 16_000


class Detector:
    """Finds speech where samples are above 0, like silero's in its manners: a span is given out once it has ended."""

    def __init__(self, options=None):
        self.loud: list[np.ndarray] = []
        self.given = 0

    def _spans(self):
        loud = np.concatenate([[0], *self.loud, [0]])
        edges = np.flatnonzero(np.diff(loud.astype(np.int8)))
        return [(a / 100, b / 100) for a, b in zip(edges[::2], edges[1::2], strict=True)]

    @property
    def certain(self):
        spans, seconds = self._spans(), sum(map(len, self.loud)) / 100
        return spans[-1][0] if spans and spans[-1][1] == seconds else seconds

    def feed(self, samples):
        self.loud.append(samples[::160] > 0)  # one of each frame
        certain = self.certain
        ended = [span for span in self._spans() if span[1] <= certain]
        found, self.given = ended[self.given :], len(ended)
        return found

    def finish(self):
        return self._spans()[self.given :]


class Audio(Track):
    """A track with samples: 1 in the spans (frames), 0 elsewhere."""

    def __init__(self, frames, spans):
        super().__init__(frames)
        self.sound = np.zeros(frames * 160, np.float32)
        for start, end in spans:
            self.sound[start * 160 : end * 160] = 1
        self.held = []  # how far ahead of the windows samples were read

    def samples(self, start, end):
        latest = self.starts[-1] if self.starts else 0
        assert start >= 160 * latest
        self.held.append(end - 160 * latest)
        return self.sound[start:end]


@pytest.fixture(autouse=True)
def detector(monkeypatch):
    monkeypatch.setattr(heard, "SpeechDetector", Detector)


def frames_of(only):
    """The audio's frames that windows hold, as one list."""
    found, start = [], 0
    while True:
        window, real = only.features(start)
        if not real:
            return found
        found += [round(float(value) / PLACE) for value in window[:real, -1]]
        start += real


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 4000), max_size=8), st.integers(0, 3000))
def test_windows_hold_the_spans_and_nothing_else(lengths, silence):
    spans, at = [], 0
    for quiet, loud in zip(lengths[::2], lengths[1::2], strict=False):
        spans.append((at + quiet, at + quiet + loud))
        at += quiet + loud
    only = SpeechOnly(Audio(at + silence, spans), {}, [(0.0, math.inf)])
    assert frames_of(only) == [frame for start, end in spans for frame in range(start, end)]


def test_windows_may_overlap_as_text_ends_within_them():
    only = SpeechOnly(Audio(9000, [(100, 2100), (3000, 5000), (6000, 8000)]), {}, [(0.0, math.inf)])
    windows = [only.features(start) for start in (0, 1500, 1501, 4000, 5999, 6000)]
    assert [real for _, real in windows] == [3000, 3000, 3000, 2000, 1, 0]
    assert [round(float(w[0, -1]) / PLACE) for w, _ in windows[:5]] == [100, 1600, 1601, 6000, 7999]


def test_long_silence_is_not_held():
    audio = Audio(100_000, [(99_000, 99_500)])
    only = SpeechOnly(audio, {}, [(0.0, math.inf)])
    assert only.features(0)[1] == 500
    assert max(audio.held) < 100 * RATE


def test_clips_and_speech_both_count():
    only = SpeechOnly(Audio(9000, [(100, 2100), (3000, 5000)]), {}, [(0.0, 5.0), (20.0, 31.0)])
    assert frames_of(only) == [*range(100, 500), *range(2000, 2100), *range(3000, 3100)]


def test_clock():
    clock = CutClock()
    assert (clock.start(3.0), clock.end(3.0), clock.word(1.0, 2.0)) == (3.0, 3.0, (1.0, 2.0))
    for cut in (Cut(0, 100, 200), Cut(200, 500, 100), Cut(300, 1000, 300)):
        clock.add(cut)
    assert (clock.start(0.0), clock.end(0.0)) == (1.0, 1.0)
    assert (clock.start(2.0), clock.end(2.0)) == (5.0, 3.0)  # a cut is the end of one span, the start of the next
    assert (clock.start(2.5), clock.end(2.5)) == (5.5, 5.5)
    assert clock.end(99.0) == 13.0
    assert clock.word(1.0, 1.5) == (2.0, 2.5)
    assert clock.word(1.5, 2.25) == (2.5, 3.0)  # over a cut: where it is longer
    assert clock.word(1.75, 2.5) == (5.0, 5.5)
    assert clock.word(1.9, 3.2) == (5.0, 6.0)
    assert clock.word(2.0, 2.0) == (5.0, 5.0)


@pytest.mark.parametrize("batched", [False, True])
def test_times_are_those_of_the_audio(batched):
    audio = Audio(9000, [(1000, 2000), (5000, 6000)])
    options = Options(beam_size=1, temperature=0, vad=True, batched=batched)
    script = scripted(lambda encoder: [T + 5, 1, T + 500, T + 510, 2, T + 990], TOKENS)
    assert place  # the window begins in the first span
    transcript, found, _ = speech.run(script, options, TOKENS, audio)
    assert [(s.start, s.end, s.text) for s in transcript.segments] == [(10.1, 20.0, " w1"), (50.2, 59.8, " w2")]
    assert {s.seek for s in transcript.segments} == {1000}
    assert transcript.duration == 90.0 and found[-1].end == 90.0


def test_silence_alone_has_no_text():
    transcript, _, engine = speech.run(None, Options(vad=True), TOKENS, Audio(9000, []))
    assert transcript.segments == () and transcript.text == "" and engine.requests == []


@pytest.mark.parametrize("vad", [{"threshold": 2}, {"volume": 1}, {"speech_pad_ms": "long"}])
def test_wrong_options_are_named(vad):
    with pytest.raises(TranscriptionError, match=next(iter(vad))) as error:
        transcribe_steps(Audio(10, []), TOKENS, Options(vad=vad), speech.SpeechText(speech.WordTokenizer(), TOKENS))
    assert error.value.param == "vad"
