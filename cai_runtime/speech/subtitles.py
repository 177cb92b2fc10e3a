"""Transcripts as text and subtitles. Light to import.

`transcript` is what `client.audio.transcriptions.create` returns, a `speech.results.Transcript`, or a list of their
segments: objects with `start` and `end` in seconds, and `text`. Every result ends with a line break, unless it is empty.

Cues follow each other: none begins before the one before it has ended, or ends before it begins; one of no length gets a
millisecond. Segments without text have no cue. White space and control characters become single spaces, so that a cue's
text is one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_CONTROL = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
_VTT_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


@dataclass(frozen=True)
class Cue:
    """A subtitle: `start` and `end` in milliseconds, and one line of text."""

    start: int
    end: int
    text: str


def cues(transcript: Any) -> Iterator[Cue]:
    """The subtitles of a transcript."""
    segments: Iterable[Any] = getattr(transcript, "segments", transcript) or ()
    ended = 0
    for segment in segments:
        text = _CONTROL.sub(" ", segment.text).strip()
        if text:
            start = max(round(1000 * segment.start), ended)
            ended = max(round(1000 * segment.end), start + 1)
            yield Cue(start, ended, text)


def to_text(transcript: Any) -> str:
    """A line for each segment."""
    return "".join(f"{cue.text}\n" for cue in cues(transcript))


def to_srt(transcript: Any) -> str:
    """SubRip. It has no escapes: an arrow `-->` in the text, which would be read as a cue's times, is written `->`."""
    blocks = (
        f"{number}\n{_time(cue.start, ',')} --> {_time(cue.end, ',')}\n{cue.text.replace('-->', '->')}\n"
        for number, cue in enumerate(cues(transcript), 1)
    )
    return "\n".join(blocks)


def to_vtt(transcript: Any) -> str:
    """WebVTT; `&`, `<` and `>` are escaped."""
    blocks = (
        f"{_time(cue.start, '.')} --> {_time(cue.end, '.')}\n{cue.text.translate(_VTT_ESCAPES)}\n"
        for cue in cues(transcript)
    )
    return "\n".join(("WEBVTT\n", *blocks))


def to_tsv(transcript: Any) -> str:
    """Columns start and end, in milliseconds, and text."""
    return "start\tend\ttext\n" + "".join(f"{cue.start}\t{cue.end}\t{cue.text}\n" for cue in cues(transcript))


FORMATTERS: dict[str, Callable[[Any], str]] = {"text": to_text, "srt": to_srt, "vtt": to_vtt, "tsv": to_tsv}


def _time(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{rest:03}"
