"""What the cross-attention of a window says of its text: the times of its words, and whether it was invented.

One request brings it, made where word times are wanted, or where a signal speaks against the text.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cai_runtime.engine.alignment import Alignment
from cai_runtime.engine.output import TokenOutput
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.speech.decoding import Decoded
from cai_runtime.speech.guards import Evidence, following, is_suspicious, judge
from cai_runtime.speech.job import Job, Window
from cai_runtime.speech.record import Timed
from cai_runtime.speech.results import Word
from cai_runtime.speech.segments import Piece
from cai_runtime.speech.silences import is_anomalous
from cai_runtime.speech.sounding import Span
from cai_runtime.speech.steps import FRAMES_PER_SECOND, Need, Step
from cai_runtime.speech.unheard import slow_rate
from cai_runtime.speech.words import Line, WordOptions, window_words


def timed_pieces(
    job: Job, window: Window, decoded: Decoded, pieces: Sequence[Piece]
) -> Generator[Step, Any, list[Timed]]:
    """A window's pieces in seconds of what is heard, with their words where the options ask for them.

    Pieces that were invented over silence, noise or music are left out.
    """
    lines = _lines(pieces, decoded, job.tokens.eot)
    evidence = [
        _evidence(line, decoded, piece.seconds(0), window.sounding) for line, piece in zip(lines, pieces, strict=True)
    ]
    suspicious = [is_suspicious(one, **_thresholds(job)) for one in evidence]
    words: list[tuple[Word, ...] | None] = [() if job.options.word_timestamps else None] * len(pieces)
    invented = [False] * len(pieces)
    wanted = job.options.word_timestamps or (any(suspicious) and bool(job.tokens.alignment_heads))
    if wanted and any(line.tokens for line in lines):
        lead = [token for token in window.task.prompt.lead if token < job.tokens.eot]
        (finished,) = yield Need([_alignment(job, window, [*lead, *(t for line in lines for t in line.tokens)])])
        assert finished.attention is not None
        if job.options.word_timestamps:
            words = list(_words(job, window, finished.attention, lead, lines))
        counts = [len(lead), *(len(line.tokens) for line in lines)]
        follows = following(finished.attention, counts, window.frames)[1:] if any(suspicious) else [None] * len(pieces)
        evidence = [
            replace(one, following=follow, anomalous=is_anomalous(said or ()))
            for one, follow, said in zip(evidence, follows, words, strict=True)
        ]
        invented = [
            odd and judge(one, **_thresholds(job)).invented for odd, one in zip(suspicious, evidence, strict=True)
        ]
    return [
        _timed(piece, window.seek, said)
        for piece, said, dropped in zip(pieces, words, invented, strict=True)
        if not dropped
    ]


def _lines(pieces: Sequence[Piece], decoded: Decoded, eot: int) -> list[Line]:
    """The text of each piece, with the probabilities of its tokens and the times of its timestamps."""
    lines, at = [], 0  # pieces are a beginning of the tokens, without gaps
    for piece in pieces:
        logprobs = decoded.logprobs[at : at + len(piece.tokens)]
        said = [(token, math.exp(p)) for token, p in zip(piece.tokens, logprobs, strict=True) if token < eot]
        tokens, probabilities = [token for token, _ in said], [probability for _, probability in said]
        lines.append(Line(tokens, probabilities, *piece.seconds(0)))
        at += len(piece.tokens)
    return lines


def _evidence(line: Line, decoded: Decoded, span: Span, sounding: list[Span]) -> Evidence:
    logprobs = [math.log(max(probability, 1e-30)) for probability in line.probabilities]
    return Evidence(
        tokens=len(line.tokens),
        avg_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        no_speech_prob=decoded.no_speech_prob,
        rate=slow_rate(span, len(line.tokens), sounding),
    )


def _thresholds(job: Job) -> dict[str, float | None]:
    return {"no_speech": job.options.no_speech_threshold, "unlikely": job.options.log_prob_threshold}


def _alignment(job: Job, window: Window, text: Sequence[int]) -> Request:
    """A request for the attention of a text, whose rows begin with those of the control tokens before it."""
    tokens = job.tokens
    prompt = [*tokens.start(window.language, job.options.task), tokens.no_timestamps, *text]
    return Request(
        segments=(window.encoder, prompt),
        sampling=SamplingParams(max_tokens=0, temperature=0.0),
        alignment=Alignment(tokens.alignment_heads, len(prompt)),
        output=TokenOutput,
    )


def _words(
    job: Job, window: Window, attention: np.ndarray, lead: Sequence[int], lines: Sequence[Line]
) -> list[tuple[Word, ...]]:
    """The words of each line, in seconds of what is heard. lead: text tokens that the audio begins with, of a prefix."""
    options, offset = job.options, window.seek / FRAMES_PER_SECOND
    made = window_words(
        attention,
        [Line(lead, [1.0] * len(lead)), *lines],
        job.text.decode,
        window.features[: window.frames],
        offset=offset,
        options=WordOptions(window.language, prepend=options.prepend_punctuations, append=options.append_punctuations),
    )
    # An encoder position is two frames, between which the audio may end.
    most = offset + window.frames / FRAMES_PER_SECOND
    return [
        tuple(Word(min(one.start, most), min(one.end, most), one.word, one.probability) for one in line)
        for line in made[1:]
    ]


def _timed(piece: Piece, seek: int, words: tuple[Word, ...] | None) -> Timed:
    """A piece with the times of its words, which are finer than those of its timestamps."""
    if words and words[0].start < words[-1].end:
        return Timed(words[0].start, words[-1].end, piece.tokens, words)
    return Timed(*piece.seconds(seek), piece.tokens, words)
