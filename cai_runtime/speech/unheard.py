"""Finds sound that a window's text passes over: a sentence's time with a word in it, or no text at all.

Text before a window, given as its prompt, can make the decoder skip speech: it goes on from a wrong place, or repeats a
word that was invented over noise. The text is likely, so neither its probability nor its compression tells. Its rate does.
"""

from __future__ import annotations

from cai_runtime.speech.segments import Split
from cai_runtime.speech.sounding import Span, intersect
from cai_runtime.speech.steps import FRAMES_PER_SECOND

SLOWEST = 1.0  # text tokens a second; speech has 3 to 5, and slow speech 2
SHORTEST = 5.0  # seconds of sound in a stretch that count: shorter ones may be breath, laughter, a click


def unheard_seconds(split: Split, sounding: list[Span], eot: int) -> float:
    """Seconds of sound in stretches that hold less text than any speech.

    split: of the window's tokens. sounding: spans of the window, see `sounding_spans`. eot: text tokens are below it.
    A stretch is a piece, or the time between pieces, before the first one or behind the last one. Music and noise sound,
    too, so that this is no proof that speech was missed.
    """
    return sum(_passed_over(span, count, sounding) for span, count in _stretches(split, eot))


def slow_rate(span: Span, tokens: int, sounding: list[Span]) -> float | None:
    """Text tokens a second of sound, of a piece that holds less text than any speech; None of any other piece.

    span: seconds of the window in which the piece lies.
    """
    length = _passed_over(span, tokens, sounding)
    return tokens / length if length else None


def _passed_over(span: Span, tokens: int, sounding: list[Span]) -> float:
    """Seconds of sound in a stretch, if they are enough to tell and its text tokens are fewer than in any speech; else 0."""
    length = sum(end - begin for begin, end in intersect([span], sounding))
    return length if length >= SHORTEST and tokens < SLOWEST * length else 0.0


def _stretches(split: Split, eot: int) -> list[tuple[Span, int]]:
    """(seconds of a stretch, text tokens in it)."""
    found, reached = [], 0
    for piece in split.pieces:
        if piece.start > reached:
            found.append((_span(reached, piece.start), 0))
        found.append((piece.seconds(0), sum(token < eot for token in piece.tokens)))
        reached = max(reached, piece.end)
    if split.advance > reached:
        found.append((_span(reached, split.advance), 0))
    return found


def _span(begin: int, end: int) -> Span:
    return begin / FRAMES_PER_SECOND, end / FRAMES_PER_SECOND
