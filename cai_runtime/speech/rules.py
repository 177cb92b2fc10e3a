"""Which token may come next in a transcript: a pure function of a row of logits and of the tokens before it.

The rules are those of OpenAI's decoder (`SuppressBlank`, `SuppressTokens`, `ApplyTimestampRules`), which transformers'
`WhisperTimeStampLogitsProcessor` repeats, in this order:

0. Text in a loop (`loops.find_loop`) ends: it has failed, and the limit of tokens is far.
1. Repetition penalty and n-gram ban over the text tokens. Timestamps are left out: they come in equal pairs.
2. Suppressed tokens; and at the beginning, those suppressed there.
3. Timestamps come in pairs, except before the end; they never fall, and a segment is longer than 0. The first token is a
   timestamp, within the longest initial time. Behind a pair, more was heard: where a window is to be heard whole, the end
   does not follow it (OpenAI's rules let it, and hear the rest in the next window).
4. If all timestamps together are likelier than the likeliest other token, a timestamp comes.

The fourth compares logits with a log sum over the times alone: the normalizer cancels, so that no exponential is taken
over the vocabulary. A row of 51,865 takes about 20 microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cai_runtime.speech.loops import SURPLUS, loops_at_end
from cai_runtime.speech.options import CHECKPOINT, Options
from cai_runtime.speech.tokens import SpeechTokens

STEP = 0.02  # seconds between two timestamps
_BANNED = -np.inf
_LOOKED_EVERY = 8  # tokens, at which a loop is looked for


@dataclass(frozen=True, eq=False)
class Rules:
    """A `LogitsRules` of the engine.

    eot, timestamp_begin, no_timestamps: tokens. timestamp_end: the id behind the last timestamp; what a padded vocabulary
    has from there on never comes. suppressed, suppressed_first: int64 ids. lead: tokens that stand in the
    prompt but belong to the transcript (a prefix). timestamps: whether there are any. max_initial: steps of 0.02 s.
    whole: steps before which a segment that has begun is not left without text; 0: it may be left everywhere.
    repetition_penalty, no_repeat_ngram: 1 and 0 are off. ends_loops: text that has come to repeat itself ends.
    """

    eot: int
    timestamp_begin: int
    timestamp_end: int
    no_timestamps: int
    suppressed: np.ndarray
    suppressed_first: np.ndarray
    lead: tuple[int, ...] = ()
    timestamps: bool = True
    max_initial: int | None = None
    whole: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    ends_loops: bool = False

    def __call__(self, row: np.ndarray, generated: Sequence[int]) -> None:
        """Change fp32 [vocabulary] logits in place; generated: the tokens of the transcript so far."""
        if self._has_looped(generated):
            row[: self.eot] = row[self.eot + 1 :] = _BANNED
            return
        if self.repetition_penalty != 1.0 or self.no_repeat_ngram:
            self._repetitions(row, [token for token in (*self.lead, *generated) if token < self.eot])
        row[self.suppressed] = _BANNED
        row[self.timestamp_end :] = _BANNED
        if not generated:
            row[self.suppressed_first] = _BANNED
        if self.timestamps:
            self._times(row, [*self.lead, *generated] if self.lead else generated)

    def _has_looped(self, generated: Sequence[int]) -> bool:
        if not self.ends_loops or len(generated) < SURPLUS or len(generated) % _LOOKED_EVERY:
            return False
        return loops_at_end([token for token in generated if token < self.eot])

    def _times(self, row: np.ndarray, tokens: Sequence[int]) -> None:
        first = self.timestamp_begin
        row[self.no_timestamps] = _BANNED
        if not tokens:
            row[:first] = _BANNED
            if self.max_initial is not None:
                row[first + self.max_initial + 1 :] = _BANNED
            return
        after_time = tokens[-1] >= first
        if after_time and (len(tokens) < 2 or tokens[-2] >= first):
            row[first:] = _BANNED  # a segment has begun: text
            if len(tokens) > 1 and tokens[-1] - first < self.whole:
                row[self.eot] = _BANNED
            return
        if after_time:
            row[: self.eot] = _BANNED  # a segment has ended: the next begins, or the end
        last = next((token for token in reversed(tokens) if token >= first), None)
        if last is not None:
            row[first : last if after_time else last + 1] = _BANNED
        text, times = row[:first], row[first : self.timestamp_end]
        top, likeliest = times.max(initial=_BANNED), text.max()
        if top == _BANNED or top + np.log(times.size) <= likeliest:
            return
        if top > likeliest or top + np.log(np.exp(times - top).sum()) > likeliest:
            text[:] = _BANNED

    def _repetitions(self, row: np.ndarray, text: list[int]) -> None:
        if self.repetition_penalty != 1.0 and text:
            seen = np.unique(np.array(text))
            logits = row[seen]
            row[seen] = np.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        n = self.no_repeat_ngram
        if n and len(text) >= n:
            before = text[len(text) - n + 1 :]
            for at in range(len(text) - n + 1):
                if text[at : at + n - 1] == before:
                    row[text[at + n - 1]] = _BANNED


def rules_for(tokens: SpeechTokens, options: Options, lead: Sequence[int] = (), whole: int = 0) -> Rules:
    """The rules of one window. lead, whole: see `Rules`."""
    listed = set(options.suppress_tokens)
    suppressed = {token for token in listed if token != CHECKPOINT} | set(tokens.controls)
    if CHECKPOINT in listed:
        suppressed |= set(tokens.suppress_tokens)
    first = tokens.begin_suppress_tokens if options.suppress_blank else ()
    return Rules(
        eot=tokens.eot,
        timestamp_begin=tokens.timestamp_begin,
        timestamp_end=tokens.vocabulary,
        no_timestamps=tokens.no_timestamps,
        suppressed=_ids(suppressed, tokens),
        suppressed_first=_ids(first, tokens),
        lead=tuple(lead),
        timestamps=not options.without_timestamps,
        max_initial=round(options.max_initial_timestamp / STEP),
        whole=whole,
        repetition_penalty=options.repetition_penalty,
        no_repeat_ngram=options.no_repeat_ngram_size,
        ends_loops=options.compression_ratio_threshold is not None,
    )


def _ids(listed: Iterable[int], tokens: SpeechTokens) -> np.ndarray:
    """Ids as an index; without those that the vocabulary lacks, which some checkpoints list."""
    return np.array(sorted(token for token in listed if token < tokens.vocabulary), np.int64)
