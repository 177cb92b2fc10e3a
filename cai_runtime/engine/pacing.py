"""How large a step may be: in time, so that no stream stands still, and in memory, after the runner failed on more."""

from __future__ import annotations

FIRST_CHUNK = 32  # prompt tokens of a step whose duration nothing tells
IDLE_FACTOR = 4.0  # a step may take that much longer while nobody decodes
RETRY_STEPS = 256  # after so many steps the runner is given twice as much again


class PrefillPace:
    """The prompt tokens of the next step, from the durations of the steps before.

    A step of decoding and prefilling sequences should take `seconds`, or twice a decode step where that is longer, so
    that a prompt has at least half of the time. While nobody decodes it may take `IDLE_FACTOR` times as long: an abort,
    a newcomer and `close()` wait for the end of a step. A CPU prefills 64 tokens at the rate of 512, so shorter steps
    cost it nothing; a GPU does `most` tokens in less time.

    The estimate is the mean of seconds per prompt token, the last step counting half: the cost of attention grows with
    the position, and the mean follows it.

    The rows of an encoder's output count as tokens of its prompt, here and in `observe`.

    seconds: None: time does not matter. most: prompt tokens of a step at most.
    """

    def __init__(self, seconds: float | None, most: int):
        self.seconds = seconds
        self.most = most
        self._decode = 0.0  # mean seconds of a step without prompts
        self._per_token: float | None = None  # mean seconds that a prompt token adds to a step

    def budget(self, *, decoding: bool) -> int:
        """Prompt tokens for the next step, at least one. decoding: whether a sequence waits for its next token."""
        if self.seconds is None:
            return self.most
        if self._per_token is None:
            return min(self.most, FIRST_CHUNK)
        target = max(self.seconds, 2 * self._decode)
        room = target - self._decode if decoding else IDLE_FACTOR * target
        if room >= self.most * self._per_token:
            return self.most
        return max(1, int(room / self._per_token))

    def observe(self, prompt_tokens: int, seconds: float) -> None:
        """Note how long a step with so many prompt tokens took."""
        if prompt_tokens == 0:
            self._decode = seconds if self._decode == 0 else 0.8 * self._decode + 0.2 * seconds
            return
        # At least half of the time: the mean of decode steps may be that of a larger batch.
        cost = max(seconds - self._decode, seconds / 2) / prompt_tokens
        self._per_token = cost if self._per_token is None else (self._per_token + cost) / 2


class StepLimits:
    """What the runner is given at once after it failed on more, such as out of memory. None: no limit."""

    def __init__(self) -> None:
        self.sequences: int | None = None
        self.prompt_tokens: int | None = None
        self._steps_left = 0

    def lower(self, *, sequences: int | None = None, prompt_tokens: int | None = None) -> None:
        """Remember that the runner took so many, and failed on more."""
        if sequences is not None:
            self.sequences = min(sequences, self.sequences or sequences)
        if prompt_tokens is not None:
            self.prompt_tokens = min(prompt_tokens, self.prompt_tokens or prompt_tokens)
        self._steps_left = RETRY_STEPS

    def relax(self, *, most_sequences: int, most_tokens: int) -> None:
        """Count a step; after `RETRY_STEPS` of them double the limits, and drop those that reach the most there can be."""
        if self.sequences is None and self.prompt_tokens is None:
            return
        self._steps_left -= 1
        if self._steps_left <= 0:
            self.sequences = _doubled(self.sequences, most_sequences)
            self.prompt_tokens = _doubled(self.prompt_tokens, most_tokens)
            self._steps_left = RETRY_STEPS


def _doubled(limit: int | None, most: int) -> int | None:
    return None if limit is None or 2 * limit >= most else 2 * limit
