"""The transcript of a file while it grows: its segments, and the tokens that are the next window's prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cai_runtime.speech.decoding import Decoded
from cai_runtime.speech.prompts import SpeechText
from cai_runtime.speech.results import Segment, Transcript, Word
from cai_runtime.speech.steps import FRAMES_PER_SECOND

_SPACE = 1e-9  # seconds; shorter differences are rounding


@dataclass(frozen=True)
class Timed:
    """A piece of a window with its times in seconds, and with its words where they were asked for."""

    start: float
    end: float
    tokens: tuple[int, ...]
    words: tuple[Word, ...] | None = None


def last_word_end(pieces: Sequence[Timed]) -> float | None:
    """Seconds at which the last word ends; None if there is no word."""
    return next((piece.words[-1].end for piece in reversed(pieces) if piece.words), None)


class Clock:
    """Times of what is heard, as times of the audio, in seconds. They are the same here; a clock of audio from which silence
    was cut out says otherwise."""

    def start(self, seconds: float) -> float:
        """Of the beginning of something."""
        return seconds

    def end(self, seconds: float) -> float:
        """Of the end of something: at a cut, where what is before it ends."""
        return seconds

    def word(self, start: float, end: float) -> tuple[float, float]:
        """Of a word, which lies on one side of every cut."""
        return start, end


@dataclass(eq=False)
class Record:
    """Segments of a file in order. Their times never fall, and lie within the audio."""

    text: SpeechText
    clock: Clock = field(default_factory=Clock)
    segments: list[Segment] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # of all text so far
    generated: int = 0
    prompted: int = 0
    _prompt_from: int = 0
    _reached: float = 0.0

    @property
    def previous(self) -> list[int]:
        """The tokens that the next window may have as its prompt."""
        return self.tokens[self._prompt_from :]

    def begin(self, prompt: Sequence[int]) -> None:
        """Put the caller's prompt before the text."""
        self.tokens.extend(prompt)

    def forget(self) -> None:
        """What was said so far is no prompt any more."""
        self._prompt_from = len(self.tokens)

    def count(self, decoded: Decoded) -> None:
        self.generated += decoded.generated
        self.prompted += decoded.prompted

    def add(self, pieces: Sequence[Timed], decoded: Decoded, seek: int) -> list[Segment]:
        """The segments of a window's pieces; those without text or length are left out.

        seek: the window's first frame, of what is heard.
        """
        found = []
        for piece in pieces:
            text = self.text.decode(piece.tokens)
            if piece.end <= piece.start or not text.strip():
                continue
            start = max(self.clock.start(piece.start), self._reached)
            end = max(self.clock.end(piece.end), start)
            if end - start < _SPACE:
                continue
            self._reached = end
            self.tokens.extend(piece.tokens)
            found.append(
                Segment(
                    id=len(self.segments),
                    seek=round(self.clock.start(seek / FRAMES_PER_SECOND) * FRAMES_PER_SECOND),
                    start=start,
                    end=end,
                    text=text,
                    tokens=piece.tokens,
                    temperature=decoded.temperature,
                    avg_logprob=decoded.avg_logprob,
                    compression_ratio=decoded.compression_ratio,
                    no_speech_prob=decoded.no_speech_prob,
                    words=None
                    if piece.words is None
                    else tuple(self._restored(word, start, end) for word in piece.words),
                )
            )
            self.segments.append(found[-1])
        return found

    def _restored(self, word: Word, start: float, end: float) -> Word:
        """A word at its time in the audio, inside its segment."""
        first, last = self.clock.word(word.start, word.end)
        first = min(max(first, start), end)
        return Word(first, min(max(last, first), end), word.word, word.probability)

    def transcript(self, task: str, language: str, probability: float, duration: float, *, words: bool) -> Transcript:
        segments = tuple(self.segments)
        return Transcript(
            task=task,
            language=language,
            language_probability=probability,
            duration=duration,
            text="".join(segment.text for segment in segments),
            segments=segments,
            words=tuple(word for segment in segments for word in segment.words or ()) if words else None,
            tokens=self.generated,
            prompt_tokens=self.prompted,
        )
