"""What a transcription gives: words, segments, the whole. All times are seconds from the beginning of the audio."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Word:
    """A word and the times between which it is spoken. word: with the space before it, as the text has it.
    probability: mean of its tokens', 0 to 1."""

    start: float
    end: float
    word: str
    probability: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text between two timestamps.

    id: 0, 1, …. seek: frame (10 ms) at which its window begins. text: with the space that begins it. tokens: its ids,
    timestamps among them. temperature: at which its window was decoded. avg_logprob: mean natural log probability of its
    window's tokens, the end included. compression_ratio: of its window's text. no_speech_prob: probability of no speech
    in its window. words: where `word_timestamps` is set, else None.
    """

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...] | None = None


@dataclass(frozen=True)
class Transcript:
    """A whole transcription.

    language: code of what is spoken (asked for, or detected). language_probability: 1 where it was not detected.
    duration: seconds of audio. text: that of all segments, joined. words: of all segments; None without word times.
    tokens: generated tokens; prompt_tokens: tokens given to the decoder, both over all windows and attempts.
    """

    task: str
    language: str
    language_probability: float
    duration: float
    text: str
    segments: tuple[Segment, ...]
    words: tuple[Word, ...] | None = None
    tokens: int = field(default=0, compare=False)
    prompt_tokens: int = field(default=0, compare=False)
