"""Tells text that was spoken from text that was invented over silence, noise or music: by signals, never by what it says.

Signals of a piece of text, each of which may be unknown, and what it says:

    no_speech_prob  above 0.6: the model takes its window to hold no speech (OpenAI's threshold)
    avg_logprob     below -1: the model finds its own tokens unlikely (OpenAI's threshold), or its words look anomalous
    heard           below 0.05: the share of its stretch in which voice activity detection hears speech
    following       below 0.18: the attention of its tokens does not move with the audio; from 0.22 on it does
    rate            known: its sound goes on for longer than any speech with so few tokens (`unheard.slow_rate`)

Two signals together make text invented, unless its attention follows the audio. That signal is the sharpest. Measured
with whisper-tiny.en and whisper-base, greedy: 44 windows of speech (clean, in noise as loud as the speech, beside music and
chords, at a hundredth of the level) against 18 without (silence, noise at -80 to -20 dB, hum, chords, plucked strings,
clicks); the ranges are:

                    tiny.en: speech   none             base: speech     none
    following       0.36 to 0.47      0.00 to 0.20     0.24 to 0.34     0.00 to 0.11
    no_speech_prob  0.00 to 0.42      0.79 to 0.96     0.00 to 0.49     0.73 to 1.00
    heard           0.10 to 1.00      0.00             not measured
    avg_logprob    -0.91 to -0.22    -2.97 to -0.29   -0.94 to -0.18   -3.04 to -0.39

`following` of 12 windows without speech each; the other six gave one token, too few for this signal. Likely text without
speech is a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cai_runtime.speech.alignment import token_matrix, token_starts

NO_SPEECH, UNLIKELY = 0.6, -1.0  # OpenAI's thresholds
UNHEARD = 0.05  # share of a stretch
ASTRAY, FOLLOWS = 0.18, 0.22  # of `following`; between them it says nothing
FEWEST = 3  # tokens whose attention says something
# Fewer tokens over a long stretch look at places far apart, whatever sounds: "Thank you." over 28 s of noise has 0.40.
ENOUGH = 5
SIGNALS = 2  # that make text invented
_FRAMES_PER_POSITION = 2
_STRETCH = 15  # positions of 0.02 s


@dataclass(frozen=True)
class Evidence:
    """What is known of a piece of text; None: not known.

    tokens: how many text tokens it has. avg_logprob: their mean natural log probability. no_speech_prob: of its window.
    heard: share of its stretch of audio, 0 to 1, in which there is speech; energy alone is no substitute, as noise is loud,
    too. following: as `following` gives it. rate: text tokens a second of sound, as `unheard.slow_rate` gives it.
    anomalous: whether its words look invented (`silences.is_anomalous`).
    """

    tokens: int
    avg_logprob: float | None = None
    no_speech_prob: float | None = None
    heard: float | None = None
    following: float | None = None
    rate: float | None = None
    anomalous: bool = False


@dataclass(frozen=True)
class Verdict:
    """reasons: the signals against the text, in words. follows: whether its attention clearly follows the audio."""

    invented: bool
    reasons: tuple[str, ...] = ()
    follows: bool = False


def judge(evidence: Evidence, *, no_speech: float | None = NO_SPEECH, unlikely: float | None = UNLIKELY) -> Verdict:
    """Whether a piece of text was invented. no_speech, unlikely: the caller's thresholds; None: that signal is not used.

    Without the first one, which says how much text over silence a caller accepts, the rate is not used either.
    """
    reasons = []
    if no_speech is not None and evidence.no_speech_prob is not None and evidence.no_speech_prob > no_speech:
        reasons.append(f"no speech with probability {evidence.no_speech_prob:.2f}")
    if unlikely is not None and evidence.avg_logprob is not None and evidence.avg_logprob < unlikely:
        reasons.append(f"unlikely: mean log probability {evidence.avg_logprob:.2f}")
    elif evidence.anomalous:  # of improbable words, too, so the same signal
        reasons.append("words too unlikely, short or long")
    if evidence.heard is not None and evidence.heard < UNHEARD:
        reasons.append(f"speech in {evidence.heard:.0%} of its time")
    slow = no_speech is not None and evidence.rate is not None
    if slow:
        reasons.append(f"{evidence.rate:.2f} tokens a second of sound")
    known = evidence.following is not None and evidence.tokens >= FEWEST
    if known and evidence.following < ASTRAY:  # type: ignore[operator]
        reasons.append(f"attention does not follow the audio: {evidence.following:.2f}")
    too_few = slow and evidence.tokens < ENOUGH
    follows = known and not too_few and evidence.following >= FOLLOWS  # type: ignore[operator]
    return Verdict(len(reasons) >= SIGNALS and not follows, tuple(reasons), follows)


def is_suspicious(
    evidence: Evidence, *, no_speech: float | None = NO_SPEECH, unlikely: float | None = UNLIKELY
) -> bool:
    """Whether a signal speaks against the text, so that its attention is worth asking for."""
    return bool(judge(evidence, no_speech=no_speech, unlikely=unlikely).reasons)


def following(attention: np.ndarray, counts: Sequence[int], frames: int) -> list[float]:
    """How far the attention of each piece of a window moves with the audio: 0 for none, up to 1.

    attention: fp32 [heads, rows, positions], as for `words.window_words`: the last n + 1 rows predict the window's n text
        tokens and the end. counts: text tokens of each piece; n together. frames: of the window that hold audio, 10 ms each.

    The normalized attention is averaged along the cheapest monotonic path through it, of each token over its best 0.3 s,
    as a path has to cross silences, too. Were each token's attention at a place of its own, a row would reach
    sqrt(rows - 1) there: that is 1. Where all tokens look at the same places, nothing is left of it. A piece without tokens
    gets 0.
    """
    total = sum(counts)
    heads, rows, width = attention.shape
    if not heads or rows < total + 1:
        raise ValueError(f"attention of {heads} heads and {rows} rows does not fit {total} text tokens and an end")
    if not total:
        return [0.0] * len(counts)
    positions = min(width, max(1, -(-frames // _FRAMES_PER_POSITION)))
    matrix = token_matrix(attention, positions)[-total - 1 :]
    starts = token_starts(-matrix)
    ends = np.maximum(np.append(starts[1:], positions), starts + 1)
    scores = [_best_stretch(matrix[row, starts[row] : ends[row]]) for row in range(total)]
    most = max(rows - 1, 1) ** 0.5
    found, begin = [], 0
    for count in counts:
        part = scores[begin : begin + count]
        found.append(max(sum(part) / (count * most), 0.0) if count else 0.0)
        begin += count
    return found


def _best_stretch(scores: np.ndarray) -> float:
    """The greatest mean over `_STRETCH` neighbouring positions, or over all if they are fewer."""
    if len(scores) <= _STRETCH:
        return float(scores.mean())
    sums = np.concatenate(([0.0], np.cumsum(scores, dtype=np.float64)))
    return float((sums[_STRETCH:] - sums[:-_STRETCH]).max()) / _STRETCH
