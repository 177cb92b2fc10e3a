"""One file on its way through transcription: what it is made of, and what every window needs."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cai_runtime.engine.segments import EncoderInput
from cai_runtime.speech.decoding import Decoded, ShareOf, WindowTask, encoder_input, probe
from cai_runtime.speech.options import Options
from cai_runtime.speech.prompts import Prompts, SpeechText
from cai_runtime.speech.record import Record, Timed, last_word_end
from cai_runtime.speech.results import Segment
from cai_runtime.speech.segments import FRAMES_PER_STEP
from cai_runtime.speech.silences import drop_invented
from cai_runtime.speech.sounding import Span, sounding_spans
from cai_runtime.speech.steps import FRAMES, FRAMES_PER_SECOND, Done, Need, Step, Windows
from cai_runtime.speech.tokens import SpeechTokens

LEAST_PART = 50  # frames: a shorter part at a window's end holds no word


@dataclass(eq=False)
class Window:
    """A window that is being transcribed.

    features: fp32 [3000, mels], `frames` of them audio; seek: the first of them. sounding: seconds in which it sounds.
    ticket: of the requests that run for it, where they are not waited for. decoded: its result, once there is one.
    """

    seek: int
    features: np.ndarray
    frames: int
    sounding: list[Span]
    encoder: EncoderInput
    language: str
    task: WindowTask
    ticket: Any = None
    decoded: Decoded | None = None


@dataclass(eq=False)
class Job:
    """clips: (start, end) in seconds of what is heard. language: None until it is known. started: whether a window was
    begun, after which no prefix is given. spoken: second of what is heard at which the last word ended."""

    windows: Windows
    tokens: SpeechTokens
    options: Options
    text: SpeechText
    prompts: Prompts
    record: Record
    clips: Sequence[tuple[float, float]]
    language: str | None = None
    language_probability: float = 1.0
    started: bool = False
    spoken: float = 0.0

    def hear(self, start: int, end: float) -> tuple[np.ndarray, int]:
        """(features, frames of them that count) of the window at frame `start`; what lies at `end` or behind is silent."""
        most = FRAMES if end == math.inf else round(end) - start
        if most <= 0:
            return np.zeros((0, self.tokens.mels), np.float32), 0
        features, real = self.windows.features(start)
        frames = min(real, most)
        if frames < real:
            silence(features, frames)
        return features, frames

    def know_language(self, encoder: EncoderInput) -> Generator[Step, Any, str]:
        """The language of a window: the file's, or detected in this window if it is not known yet."""
        options, tokens = self.options, self.tokens
        if self.language is not None and not (options.multilingual and tokens.is_multilingual):
            return self.language
        codes = [code for code in tokens.languages if not options.languages or code in options.languages]
        ids = [tokens.languages[code] for code in codes]
        share = ShareOf(ids, ids)
        yield Need([probe(encoder, [tokens.sot], share)])
        best = int(share.shares.argmax())
        if self.language is None:
            self.language, self.language_probability = codes[best], float(share.shares[best])
        return codes[best]

    def begin(
        self, seek: int, features: np.ndarray, frames: int, previous: list[int], *, whole: bool = False
    ) -> Generator[Step, Any, Window]:
        """A window that is ready to be asked about. previous: the tokens before its transcript. whole: no segment that has
        begun is left to the next window, as far as the window sounds."""
        encoder = encoder_input(features, self.tokens.positions)
        language = yield from self.know_language(encoder)
        first, self.started = not self.started, True
        prompt = self.prompts.window(self.tokens.start(language, self.options.task), previous, first=first)
        sounding = sounding_spans(features[:frames])
        # Behind the last sound, nothing is left to be heard.
        last = round(sounding[-1][1] * FRAMES_PER_SECOND) if whole and sounding else 0
        steps = max(last - LEAST_PART, 0) // FRAMES_PER_STEP
        task = WindowTask(encoder, prompt, seek, self.tokens, self.options, self.text, whole=steps)
        return Window(seek, features, frames, sounding, encoder, language, task)

    def without_invented(self, pieces: list[Timed], seek: int, frames: int) -> tuple[list[Timed], int | None]:
        """(pieces of a window that stay, frames of the window after which it is to be heard again, if at all)."""
        threshold = self.options.hallucination_silence_threshold
        again = None
        if threshold is not None:
            start, end = seek / FRAMES_PER_SECOND, (seek + frames) / FRAMES_PER_SECOND
            pieces, again = drop_invented(
                pieces,
                threshold=threshold,
                before=self.spoken,
                start=start,
                end=end,
                window=FRAMES / FRAMES_PER_SECOND,
                last=frames < FRAMES,
            )
        self.spoken = last_word_end(pieces) or self.spoken
        return pieces, None if again is None else max(round(again * FRAMES_PER_SECOND) - seek, 1)

    def done(self, segments: list[Segment], frame: int) -> Done:
        """What is said when a window ends at a frame. Segments are final."""
        known = self.windows.seconds_known
        return Done(segments, min(self.record.clock.end(frame / FRAMES_PER_SECOND), known), known)


def silence(features: np.ndarray, start: int) -> None:
    """Make log-mel features [frames, mels] silent from frame `start` on: no value is less than 80 dB below the peak."""
    features[start:] = features.min()
