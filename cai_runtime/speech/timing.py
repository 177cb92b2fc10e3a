"""Word times of a window: one request for the cross-attention of its text, and what its words say of its pieces."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from cai_runtime.engine.alignment import Alignment
from cai_runtime.engine.output import TokenOutput
from cai_runtime.engine.request import Finished, Request, SamplingParams
from cai_runtime.engine.segments import EncoderInput
from cai_runtime.speech.decoding import Decoded
from cai_runtime.speech.job import Job
from cai_runtime.speech.record import Timed
from cai_runtime.speech.results import Word
from cai_runtime.speech.segments import Piece
from cai_runtime.speech.steps import FRAMES_PER_SECOND, Need, Step
from cai_runtime.speech.words import Line, WordOptions, window_words


class Timing:
    """The words of a window's pieces.

    lead: text tokens in the prompt that the audio begins with. features: fp32 [frames, mels], without padding.
    """

    def __init__(
        self,
        job: Job,
        encoder: EncoderInput,
        language: str,
        decoded: Decoded,
        pieces: Sequence[Piece],
        features: np.ndarray,
        lead: Sequence[int] = (),
    ):
        self._job, self._encoder, self._language, self._pieces, self._features = (
            job,
            encoder,
            language,
            pieces,
            features,
        )
        self._lead = [token for token in lead if token < job.tokens.eot]
        self._texts: list[list[int]] = []
        self._probabilities: list[list[float]] = []
        at = 0  # pieces are a beginning of the tokens, without gaps
        for piece in pieces:
            logprobs = decoded.logprobs[at : at + len(piece.tokens)]
            spoken = [(t, math.exp(p)) for t, p in zip(piece.tokens, logprobs, strict=True) if t < job.tokens.eot]
            self._texts.append([token for token, _ in spoken])
            self._probabilities.append([probability for _, probability in spoken])
            at += len(piece.tokens)

    def requests(self) -> list[Request]:
        """The request for the attention; none where there is no text."""
        text = [token for line in self._texts for token in line]
        if not text:
            return []
        tokens, options = self._job.tokens, self._job.options
        prompt = [*tokens.start(self._language, options.task), tokens.no_timestamps, *self._lead, *text]
        return [
            Request(
                segments=(self._encoder, prompt),
                sampling=SamplingParams(max_tokens=0, temperature=0.0),
                alignment=Alignment(tokens.alignment_heads, len(prompt)),
                output=TokenOutput,
            )
        ]

    def take(self, finished: Sequence[Finished], seek: int) -> list[Timed]:
        """The pieces with their words, whose times they take, in seconds of what is heard.

        seek: the window's first frame.
        """
        times = [piece.seconds(seek) for piece in self._pieces]
        if not finished:
            return [Timed(*time, piece.tokens, ()) for time, piece in zip(times, self._pieces, strict=True)]
        found = self._words(finished[0], seek / FRAMES_PER_SECOND)
        return [
            # Times of a timestamp token are coarser than those of the words between them.
            Timed(words[0].start, words[-1].end, piece.tokens, words)
            if words and words[0].start < words[-1].end
            else Timed(*time, piece.tokens, words)
            for time, piece, words in zip(times, self._pieces, found, strict=True)
        ]

    def _words(self, finished: Finished, offset: float) -> list[tuple[Word, ...]]:
        assert finished.attention is not None
        options = self._job.options
        lines = [
            Line(text, probabilities, piece.start / FRAMES_PER_SECOND, piece.end / FRAMES_PER_SECOND)
            for text, probabilities, piece in zip(self._texts, self._probabilities, self._pieces, strict=True)
        ]
        if self._lead:
            lines.insert(0, Line(self._lead, [1.0] * len(self._lead)))
        made = window_words(
            finished.attention,
            lines,
            self._job.text.decode,
            self._features,
            offset=offset,
            options=WordOptions(
                self._language, prepend=options.prepend_punctuations, append=options.append_punctuations
            ),
        )
        # An encoder position is two frames, between which the audio may end.
        most = offset + len(self._features) / FRAMES_PER_SECOND
        words = [
            tuple(Word(min(one.start, most), min(one.end, most), one.word, one.probability) for one in line)
            for line in made
        ]
        return words[1:] if self._lead else words


def timed_pieces(timing: Timing, seek: int) -> Generator[Step, Any, list[Timed]]:
    """Ask for the attention and give the pieces their words."""
    requests = timing.requests()
    finished = (yield Need(requests)) if requests else []
    return timing.take(finished, seek)


def plain_pieces(pieces: Sequence[Piece], seek: int) -> list[Timed]:
    """The pieces with the times of their timestamps."""
    return [Timed(*piece.seconds(seek), piece.tokens) for piece in pieces]
