"""Word times of a window from the decoder's cross-attention: within what sounds, in order, never longer than plausible.

Method: word times of https://github.com/openai/whisper (whisper/timing.py). What differs: tokens are aligned to speech
alone, so that no pause lengthens a word; an implausibly long word keeps the stretch that its tokens attend to; words join
across hyphens and decimal points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from cai_runtime.speech.alignment import token_matrix, token_starts
from cai_runtime.speech.results import Word
from cai_runtime.speech.sounding import Span, intersect, sounding_spans
from cai_runtime.speech.steps import FRAMES_PER_SECOND
from cai_runtime.speech.word_split import (
    APPEND_PUNCTUATIONS,
    PREPEND_PUNCTUATIONS,
    TokenDecode,
    WordTokens,
    split_words,
)

STEP = 0.02  # seconds between encoder positions
FRAMES_PER_POSITION = 2
SENTENCE_ENDS = ".。!！?？"
_USUAL = (0.08, 0.7)  # seconds between which a window's median word is taken to last
_SLOW, _PAUSED = 4.0, 2.0  # most medians that a word lasts, and one beside a pause
_SHORTEST_LIMIT = 0.6  # seconds that any word may last
_LETTER = 0.12  # seconds that any letter may last
_NEARLY = 0.05  # parts of a word whose attention differs by this share are held to be equal
_LEEWAY = 0.5  # seconds that a word may reach beyond its segment's time tokens


@dataclass(frozen=True)
class Line:
    """A segment's text in its window. tokens: of text alone, neither control nor time tokens. probabilities: one of each
    token. start, end: seconds from the window's start by the segment's time tokens; None: not known."""

    tokens: Sequence[int]
    probabilities: Sequence[float]
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class WordOptions:
    """How words are made. language: Whisper's code. prepend, append: punctuation that joins the next word or the one before.
    lag: seconds that the alignment heads attend too late, of the checkpoint."""

    language: str | None = None
    prepend: str = PREPEND_PUNCTUATIONS
    append: str = APPEND_PUNCTUATIONS
    lag: float = 0.0


DEFAULT = WordOptions()


def window_words(
    attention: np.ndarray,
    lines: Sequence[Line],
    decode: TokenDecode,
    features: np.ndarray,
    *,
    spans: Sequence[Span] | None = None,
    offset: float = 0.0,
    options: WordOptions = DEFAULT,
) -> list[list[Word]]:
    """Words of a window's segments.

    attention: fp32 [heads, rows, positions], cross-attention weights of the alignment heads. The last n + 1 rows are of the
        decoder's inputs that predict the window's n text tokens and the end of text: the prompt [..., <|notimestamps|>,
        *tokens]. Rows before them, of control tokens, only take part in the normalization; one or more is of use.
    lines: the window's segments in order; n tokens together. decode: text of a list of tokens.
    features: fp32 [frames, mels], the log-mel features of the window's audio, without padding; 10 ms each.
    spans: speech within the window, seconds from its start, in order and apart; None: not known. Words lie within them, and
        within what sounds by the features.
    offset: seconds of the window's start, added to every time.

    Returns the words of each line. Texts joined are decode(line.tokens). Times are in seconds, rounded to 0.01; no word ends
    before it starts, or starts before the one before it ends. Raises ValueError for sizes that contradict each other.
    """
    tokens = [token for line in lines for token in line.tokens]
    probabilities = np.array([p for line in lines for p in line.probabilities], dtype=np.float64)
    heads, rows, width = attention.shape
    if len(probabilities) != len(tokens):
        raise ValueError(f"{len(probabilities)} probabilities for {len(tokens)} tokens")
    if not heads or rows < len(tokens) + 1:
        raise ValueError(
            f"attention of {heads} heads and {rows} rows does not fit {len(tokens)} text tokens and an end"
        )
    if not tokens:
        return [[] for _ in lines]
    positions = min(width, max(1, -(-len(features) // FRAMES_PER_POSITION)))
    lagging = _without_lag(attention, positions, options.lag)
    matrix = token_matrix(lagging, positions)[-len(tokens) - 1 :]
    columns = _columns(positions, len(tokens), spans, features)
    times = _Times(matrix, columns, positions)
    begin, timed = 0, list[list[_Timed]]()
    for line in lines:
        split = split_words(line.tokens, decode, options.language, prepend=options.prepend, append=options.append)
        timed.append([times.word(word, begin) for word in split])
        begin += len(line.tokens)
    _shorten(timed, lines, times)
    seconds = min(positions * STEP, len(features) / FRAMES_PER_SECOND)  # a position is two frames
    _order([word for words in timed for word in words], seconds)
    return [
        [
            Word(
                round(offset + word.start, 2),
                round(offset + word.end, 2),
                word.tokens.text,
                float(probabilities[word.rows].mean()),
            )
            for word in words
        ]
        for words in timed
    ]


def word_timings(
    attention: np.ndarray,
    tokens: Sequence[int],
    probabilities: Sequence[float],
    decode: TokenDecode,
    features: np.ndarray,
    *,
    spans: Sequence[Span] | None = None,
    options: WordOptions = DEFAULT,
) -> list[Word]:
    """Words of one text, in seconds from the window's start. As window_words with a single line."""
    return window_words(attention, [Line(tokens, probabilities)], decode, features, spans=spans, options=options)[0]


@dataclass
class _Timed:
    """A word with its times while they are worked out. rows: of the matrix, those of its spoken tokens."""

    tokens: WordTokens
    rows: slice
    start: float
    end: float
    letters: int = field(init=False)

    def __post_init__(self) -> None:
        self.letters = max(1, len(self.tokens.text.strip()))

    @property
    def duration(self) -> float:
        return self.end - self.start


class _Times:
    """Times of token rows by the cheapest path through the speech of a window."""

    def __init__(self, matrix: np.ndarray, columns: np.ndarray, positions: int):
        self.matrix, self.columns = matrix, columns
        self.starts = token_starts(-matrix[:, columns])
        # Where each column's run of neighbouring columns begins: a step of more than one position is a silence.
        self.breaks = np.concatenate(([0], np.flatnonzero(np.diff(columns) > 1) + 1, [len(columns)]))

    def word(self, tokens: WordTokens, begin: int) -> _Timed:
        first, last = begin + tokens.first, begin + tokens.last
        low, high = int(self.starts[first]), int(self.starts[last])
        low, high = self._longest_run(low, high)
        start = self.columns[low] * STEP
        end = (self.columns[high - 1] + 1) * STEP if high > low else start
        return _Timed(tokens, slice(first, last), float(start), float(end))

    def _longest_run(self, low: int, high: int) -> tuple[int, int]:
        """Of columns[low:high], the longest part without a silence in it."""
        inside = self.breaks[(self.breaks > low) & (self.breaks < high)]
        edges = [low, *map(int, inside), high]
        return max(pairwise(edges), key=lambda edge: edge[1] - edge[0])

    def attended(self, word: _Timed, seconds: float, late: bool) -> tuple[float, float]:
        """The part of a word that lasts `seconds` and that its tokens attend to most: of nearly equal parts the latest or
        the earliest."""
        low, high = round(word.start / STEP), round(word.end / STEP)
        length = max(1, round(seconds / STEP))
        if high - low <= length:
            return word.start, word.end
        sums = np.concatenate(([0.0], self.matrix[word.rows, low:high].sum(axis=0, dtype=np.float64).cumsum()))
        parts = sums[length:] - sums[:-length]
        most = np.flatnonzero(parts >= parts.max() - _NEARLY * abs(parts.max()))
        begin = low + int(most[-1 if late else 0])
        return begin * STEP, (begin + length) * STEP


def _without_lag(attention: np.ndarray, positions: int, lag: float) -> np.ndarray:
    """The weights of the window's audio, moved `lag` seconds earlier."""
    shift = min(positions - 1, round(lag / STEP))
    if shift <= 0:
        return attention
    moved = np.zeros((*attention.shape[:2], positions), np.float32)
    moved[:, :, : positions - shift] = attention[:, :, shift:positions]
    return moved


def _columns(positions: int, tokens: int, spans: Sequence[Span] | None, features: np.ndarray) -> np.ndarray:
    """Positions that hold speech: by the spans and by energy, by one of them if that leaves too few, or all of them."""
    sounding = sounding_spans(features)
    choices = [sounding] if spans is None else [intersect(list(spans), sounding), list(spans), sounding]
    least = min(positions, max(2, tokens // 2))  # no one says two tokens in 0.02 s
    for choice in choices:
        mask = np.zeros(positions, bool)
        for start, end in choice:
            mask[max(0, int(start / STEP)) : max(0, int(np.ceil(end / STEP)))] = True
        if mask.sum() >= least:
            return np.flatnonzero(mask)
    return np.arange(positions)


def _shorten(timed: list[list[_Timed]], lines: Sequence[Line], times: _Times) -> None:
    """Cut words that last longer than their neighbours allow, and words that reach out of their segment's times."""
    durations = [word.duration for words in timed for word in words if word.duration > 0]
    usual = float(np.clip(np.median(durations), *_USUAL)) if durations else _USUAL[1]
    after_pause = True
    for words, line in zip(timed, lines, strict=True):
        if not words:
            continue
        first, last = words[0], words[-1]
        if line.start is not None and first.start + _LEEWAY < line.start < first.end:
            first.start = max(first.start, min(first.end - usual, line.start))
        if line.end is not None and last.start < line.end < last.end - _LEEWAY:
            last.end = min(last.end, max(last.start + usual, line.end))
        for at, word in enumerate(words):
            ends = word.tokens.text.rstrip()[-1:] in SENTENCE_ENDS or at == len(words) - 1
            medians = _PAUSED if after_pause or ends or at == 0 else _SLOW
            limit = max(medians * usual, _SHORTEST_LIMIT, _LETTER * word.letters)
            if word.duration > limit:
                word.start, word.end = times.attended(word, limit, late=after_pause or at == 0)
            after_pause = ends


def _order(words: list[_Timed], seconds: float) -> None:
    """Make times lie within the window and not fall; give a word of no length a position, where its neighbour has more."""
    before = 0.0
    for word, following in zip(words, [*words[1:], None], strict=True):
        word.start = min(max(word.start, before), seconds)
        word.end = min(max(word.end, word.start), seconds)
        if word.duration < STEP:
            room = seconds if following is None else following.end - STEP
            word.end = max(word.end, min(word.start + STEP, room))
        before = word.end
