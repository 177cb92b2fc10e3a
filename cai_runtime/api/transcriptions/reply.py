"""What a transcription answers with: the `openai` package's verbose objects, and its events while segments are done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from openai.types.audio import (
    TranscriptionSegment,
    TranscriptionTextDeltaEvent,
    TranscriptionTextDoneEvent,
    TranscriptionTextSegmentEvent,
    TranscriptionVerbose,
    TranscriptionWord,
    TranslationVerbose,
)
from openai.types.audio.transcription_text_done_event import Usage as TokenUsage
from openai.types.audio.transcription_verbose import Usage

from cai_runtime.speech.results import Segment, Transcript, Word

ENGLISH = "english"  # what OpenAI's schema says of a translation's language
UNKNOWN_SPEAKER = ""  # the events' type wants a text


class SpeechWord(TranscriptionWord):
    """probability: the mean of its tokens', 0 to 1."""

    probability: float


class SpeechTranscription(TranscriptionVerbose):
    """A transcript. Beyond OpenAI's: `task`; `language_probability`, 1 where the language was not detected; `damage`: what
    is wrong with a file that could be heard in part, else None."""

    task: Literal["transcribe"]
    language_probability: float
    damage: str | None = None


class SpeechTranslation(TranslationVerbose):
    """A translation to English; `language` is "english", as in OpenAI's. Beyond OpenAI's: `task`; `source_language`, a
    code, and its probability; `words`, `usage`, `damage` as a transcript has them."""

    task: Literal["translate"]
    source_language: str
    language_probability: float
    usage: Usage
    words: list[SpeechWord] | None = None
    damage: str | None = None


SpeechReply = SpeechTranscription | SpeechTranslation


class SpeechDone(TranscriptionTextDoneEvent):
    """The last event. transcription: the reply that a call without `stream` gives."""

    transcription: SpeechReply


SpeechEvent = TranscriptionTextDeltaEvent | TranscriptionTextSegmentEvent | SpeechDone


class TextJoiner:
    """Joins segments' texts: what `add` returns makes, put together, the text without the spaces around it."""

    def __init__(self) -> None:
        self._begun = False
        self._spaces = ""  # which a following piece may need

    def add(self, text: str) -> str:
        text = self._spaces + text
        if not self._begun:
            text = text.lstrip()
        piece = text.rstrip()
        self._spaces = text[len(piece) :]
        self._begun = self._begun or bool(piece)
        return piece


def joined(segments: Sequence[Segment]) -> str:
    """The text of a transcript: the fold of its events."""
    joiner = TextJoiner()
    return "".join(joiner.add(segment.text) for segment in segments)


class SpeechEvents:
    """Makes the events of one transcript. For each segment its text, where it has some, then its times."""

    def __init__(self) -> None:
        self._joiner = TextJoiner()

    def of(self, segments: Sequence[Segment]) -> list[SpeechEvent]:
        events: list[SpeechEvent] = []
        for segment in segments:
            name = f"seg_{segment.id}"
            if piece := self._joiner.add(segment.text):
                events.append(TranscriptionTextDeltaEvent(type="transcript.text.delta", delta=piece, segment_id=name))
            events.append(
                TranscriptionTextSegmentEvent(
                    type="transcript.text.segment",
                    id=name,
                    start=_seconds(segment.start),
                    end=_seconds(segment.end),
                    text=segment.text,
                    speaker=UNKNOWN_SPEAKER,
                )
            )
        return events

    def done(self, transcript: Transcript, damage: str | None) -> SpeechDone:
        reply = reply_of(transcript, damage)
        return SpeechDone.model_validate(
            {
                "type": "transcript.text.done",
                "text": reply.text,
                # Unknown to older versions of the package. Of silence there is none.
                "languages": [{"code": transcript.language}] if transcript.language else [],
                "usage": TokenUsage(
                    type="tokens",
                    input_tokens=transcript.prompt_tokens,
                    output_tokens=transcript.tokens,
                    total_tokens=transcript.prompt_tokens + transcript.tokens,
                ),
                "transcription": reply,
            }
        )


def reply_of(transcript: Transcript, damage: str | None) -> SpeechReply:
    """The whole reply. damage: of the file."""
    duration = _seconds(transcript.duration)
    fields: dict[str, Any] = {
        "task": transcript.task,
        "language_probability": transcript.language_probability,
        "duration": duration,
        "text": joined(transcript.segments),
        "segments": [_segment(segment) for segment in transcript.segments],
        "words": None if transcript.words is None else [_word(word) for word in transcript.words],
        "usage": Usage(type="duration", seconds=duration),
        "damage": damage,
    }
    if transcript.task == "translate":
        return SpeechTranslation(language=ENGLISH, source_language=transcript.language, **fields)
    return SpeechTranscription(language=transcript.language, **fields)


def _segment(segment: Segment) -> TranscriptionSegment:
    return TranscriptionSegment(
        id=segment.id,
        seek=segment.seek,
        start=_seconds(segment.start),
        end=_seconds(segment.end),
        text=segment.text,
        tokens=list(segment.tokens),
        temperature=segment.temperature,
        avg_logprob=segment.avg_logprob,
        compression_ratio=segment.compression_ratio,
        no_speech_prob=segment.no_speech_prob,
    )


def _word(word: Word) -> SpeechWord:
    return SpeechWord(word=word.word, start=_seconds(word.start), end=_seconds(word.end), probability=word.probability)


def _seconds(time: float) -> float:
    """To the millisecond: sums of steps of 0.02 s have no such noise as 12.600000000000001."""
    return round(float(time), 3)
