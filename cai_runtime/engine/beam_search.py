"""Beam search: which texts go on, chosen from the likeliest tokens behind each. No tensors, no caches.

As in openai-whisper. In each step every live text proposes its 2 * width likeliest tokens, with the sums of the log
probabilities. The proposals are taken by falling sum, until `width` of them are live: a token that ends the text makes it a
finished one, any other a live one. The search is over when round(width * patience) texts are finished, when no text is
live, or when the texts are max_tokens long. In the last case live ones, by falling sum, count as finished up to that number.
The finished text with the greatest sum / length ** length_penalty wins. The length is that of the text without the token
that ends it, at least 1. Of equal sums the one that comes from the likelier text counts first, then that of the token that
`kernels.sampling.Sampled.top` has first. So the search is deterministic, and a width of 1 is greedy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cai_runtime.engine.request import TokenLogprobs
from cai_runtime.kernels.sampling import LOGPROB_FLOOR

Row = tuple[Sequence[int], Sequence[float]]
"""The likeliest tokens behind a text and their log probabilities, likeliest first; -1 where there are fewer tokens."""


@dataclass(frozen=True)
class BeamSearch:
    """width: live texts, from 1 on. patience: above 0; round(width * patience) finished texts end the search, at least one.
    length_penalty: the exponent of the length by which a sum is divided; 0: not at all."""

    width: int
    patience: float = 1.0
    length_penalty: float = 1.0


@dataclass(eq=False, slots=True)
class Path:
    """A text: the one before it and a token. Paths share their beginnings.

    sum: of the log probabilities of all tokens. length: without a token that ends the text. logprobs: of the token.
    """

    before: Path | None = None
    logprobs: TokenLogprobs | None = None
    sum: float = 0.0
    length: int = 0

    def steps(self) -> list[TokenLogprobs]:
        """Of all its tokens."""
        found, path = [], self
        while path.before is not None and path.logprobs is not None:
            found.append(path.logprobs)
            path = path.before
        return found[::-1]


class Search:
    """The state of one search.

    ends: tokens that end a text. max_tokens: of a text, at least 1. k: so many of the likeliest tokens are kept in a
    path's logprobs.
    """

    def __init__(self, beam: BeamSearch, ends: Collection[int], max_tokens: int, k: int = 0):
        self._beam, self._ends, self._max_tokens, self._k = beam, ends, max_tokens, k
        self._most = max(1, round(beam.width * beam.patience))
        self._length = 0
        self.live = [Path()]  # by falling sum
        self.finished: list[Path] = []

    def step(self, rows: Sequence[Row]) -> list[int] | None:
        """Go on by a token. rows: of each live text. Returns which of the live texts each new live one follows; None when
        the search is over."""
        width, live = self._beam.width, self.live
        proposed = []
        for parent, (ids, values) in enumerate(rows):
            before = live[parent].sum
            for rank in range(min(2 * width, len(ids))):
                if ids[rank] < 0 or values[rank] <= LOGPROB_FLOOR:
                    break  # a token that is banned, and all behind it
                proposed.append((-before - values[rank], parent, rank))
        proposed.sort()
        self._length += 1
        parents: list[int] = []
        self.live = []
        for negative, parent, rank in proposed:
            ids, values = rows[parent]
            ends = ids[rank] in self._ends
            if ends and len(self.finished) == self._most:
                continue
            top = tuple(zip(ids[: self._k], values[: self._k], strict=True)) if self._k else ()
            logprobs = TokenLogprobs(ids[rank], values[rank], tuple(pair for pair in top if pair[0] >= 0))
            path = Path(live[parent], logprobs, -negative, self._length - ends)
            if ends:
                self.finished.append(path)
                continue
            self.live.append(path)
            parents.append(parent)
            if len(parents) == width:
                break
        if len(self.finished) < self._most and parents and self._length < self._max_tokens:
            return parents
        self.finished += self.live[: self._most - len(self.finished)]
        return None

    def winner(self) -> Path:
        """The best text of a search that is over."""
        return max(self.finished, key=lambda path: path.sum / max(path.length, 1) ** self._beam.length_penalty)
