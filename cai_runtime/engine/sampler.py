"""From a row of logits to a token, as a pure function of the row, the parameters, the seed and the position.

A row never sees its neighbours and its random number comes from (seed, position) alone, so that a seeded request gives
the same text alone, in a batch, and after a preemption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cai_runtime.engine.request import SamplingParams
from cai_runtime.errors import NonFiniteLogitsError

LogitsProcessor = Callable[[np.ndarray], None]
"""Changes a row of logits (fp32 [vocab]) in place."""

_BLOCK = 64  # tokens summed together on the way to one; any value gives the same distribution


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) of 53 random bits: Philox4x64 (Salmon et al. 2011), `seed` as key, `position` as counter."""
    generator = np.random.Philox(key=seed % 2**128, counter=position)
    return (int(generator.random_raw()) >> 11) * 2.0**-53


class TokenCounts:
    """Distinct token ids and how often each was added, as arrays ready to index a row of logits."""

    def __init__(self, token_ids: Iterable[int] = ()):
        self._slot: dict[int, int] = {}
        self._ids = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        for token_id in token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        slot = self._slot.setdefault(token_id, len(self._slot))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token_id
        self._counts[slot] += 1

    @property
    def ids(self) -> np.ndarray:
        """int64 [distinct]."""
        return self._ids[: len(self._slot)]

    @property
    def counts(self) -> np.ndarray:
        """fp32 [distinct]."""
        return self._counts[: len(self._slot)]


def repetition_penalty(seen: TokenCounts, penalty: float) -> LogitsProcessor:
    """Divide positive logits of seen tokens by `penalty`, multiply negative ones (Keskar et al. 2019, CTRL)."""

    def process(logits: np.ndarray) -> None:
        values = logits[seen.ids]
        logits[seen.ids] = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))

    return process


def count_penalties(generated: TokenCounts, frequency: float, presence: float) -> LogitsProcessor:
    """Subtract `frequency` x count + `presence` from the logits of generated tokens (OpenAI's definition)."""

    def process(logits: np.ndarray) -> None:
        logits[generated.ids] -= generated.counts * np.float32(frequency) + np.float32(presence)

    return process


def logit_bias(bias: dict[int, float]) -> LogitsProcessor:
    """Add a constant to each named token's logit."""
    ids = np.fromiter(bias, dtype=np.int64)
    values = np.fromiter(bias.values(), dtype=np.float32)

    def process(logits: np.ndarray) -> None:
        logits[ids] += values

    return process


def ban_tokens(token_ids: Sequence[int]) -> LogitsProcessor:
    """Make these tokens impossible."""
    ids = np.asarray(sorted(token_ids), dtype=np.int64)

    def process(logits: np.ndarray) -> None:
        logits[ids] = -np.inf

    return process


class SequenceSampler:
    """How one sequence chooses its next token. Knows the sequence's tokens so far; `observe` each new one.

    `stop_ids` are the tokens that end the text, banned until `min_tokens` were generated. `seed` is used when the
    parameters name none.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], stop_ids: Iterable[int], seed: int):
        self.params = params
        self.seed = params.seed if params.seed is not None else seed
        self._generated = TokenCounts()
        self._seen = TokenCounts(prompt_ids if params.repetition_penalty != 1.0 else ())
        self._num_generated = 0
        self._ban = ban_tokens(list(stop_ids)) if params.min_tokens > 0 else None
        self._processors: list[LogitsProcessor] = []
        if params.repetition_penalty != 1.0:
            self._processors.append(repetition_penalty(self._seen, params.repetition_penalty))
        if params.frequency_penalty or params.presence_penalty:
            self._processors.append(count_penalties(self._generated, params.frequency_penalty, params.presence_penalty))
        if params.logit_bias:
            self._processors.append(logit_bias(params.logit_bias))
        if self._ban:
            self._processors.append(self._ban)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is simply the greatest logit's."""
        return self.params.temperature == 0 and not self._processors

    def observe(self, token_id: int) -> None:
        """Take note of a generated token."""
        self._num_generated += 1
        if self._processors:
            self._generated.add(token_id)
            self._seen.add(token_id)
        if self._ban and self._num_generated >= self.params.min_tokens:
            self._processors.remove(self._ban)
            self._ban = None

    def choose(self, logits: np.ndarray, position: int) -> int:
        """The token at absolute `position`, from its row of logits (fp32 [vocab], left untouched).

        Raises NonFiniteLogitsError when the greatest logit is NaN or infinite."""
        if self._processors:
            logits = logits.copy()
            for process in self._processors:
                process(logits)
        best = int(logits.argmax())  # numpy's argmax and max both return NaN if there is one
        check_finite(logits[best], position)
        if self.params.temperature == 0:
            return best
        return draw(logits, self.params, uniform(self.seed, position))


def check_finite(greatest: np.floating, position: int) -> None:
    """Raise NonFiniteLogitsError unless a row's greatest logit is a number. -inf elsewhere is a ban, and allowed."""
    if not np.isfinite(greatest):
        raise NonFiniteLogitsError(
            f"the model's logits for position {position} have {greatest} as their greatest value: the checkpoint is "
            "damaged, its dtype overflows, or logit_bias bans every token"
        )


def kth_greatest(values: np.ndarray, k: int) -> np.floating:
    """The k-th greatest of `values` (1-based) without sorting them all.

    The k-th greatest of the maxima of blocks is a lower bound, which leaves few values to partition.
    """
    blocks = len(values) // _BLOCK
    if blocks > 2 * k:
        maxima = np.maximum.reduceat(values, np.arange(0, len(values), _BLOCK))
        values = values[values >= np.partition(maxima, len(maxima) - k)[len(maxima) - k]]
    return np.partition(values, len(values) - k)[len(values) - k]


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, ascending, of the smallest set of greatest weights whose share is at least `top_p` (Holtzman et al.
    2020). Equal weights enter in the order of their indices; the greatest is always in. `weights`: fp32, >= 0.

    Without a full sort. Weights below (1 - top_p) x total / n sum to less than the share that is left out, so none of
    them can be in the set. The rest falls into buckets of about one percent of width, by the leading bits of the floats,
    which order like the floats themselves; only the bucket in which the share is reached is sorted.
    """
    total = float(weights.sum(dtype=np.float64))
    candidates = np.flatnonzero(weights >= (1.0 - top_p) * total / len(weights))
    values = weights[candidates]
    bucket = values.view(np.int32) >> 16
    bucket = bucket.max() - bucket  # 0 has the greatest weights
    shares = np.cumsum(np.bincount(bucket, weights=values))
    last = min(int(np.searchsorted(shares, top_p * total)), len(shares) - 1)
    kept = bucket < last
    border = np.flatnonzero(bucket == last)
    border = border[np.argsort(-values[border], kind="stable")]
    before = shares[last - 1] if last else 0.0
    missing = int(np.searchsorted(before + np.cumsum(values[border], dtype=np.float64), top_p * total)) + 1
    kept[border[:missing]] = True
    return candidates[kept]


def inverse_cdf(weights: np.ndarray, u: float) -> int:
    """The index where the running sum of `weights` (>= 0, in order of index) first exceeds u x total, 0 <= u < 1.

    Sums are float64, by blocks, so that only one block needs its running sum.
    """
    block_ends = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64))
    target = u * block_ends[-1]
    block = min(int(np.searchsorted(block_ends, target, side="right")), len(block_ends) - 1)
    begin = block * _BLOCK
    before = block_ends[block - 1] if block else 0.0
    running = before + np.cumsum(weights[begin : begin + _BLOCK], dtype=np.float64)
    index = begin + int(np.searchsorted(running, target, side="right"))
    if index < min(begin + _BLOCK, len(weights)):
        return index
    # Rounding put the target at the very end of the block: take the last possible token up to there.
    return int(np.flatnonzero(weights[: begin + _BLOCK])[-1])


def draw(logits: np.ndarray, params: SamplingParams, u: float) -> int:
    """One token by temperature, top_k, top_p and min_p, in this order, and the uniform number `u`.

    Weights are fp32: their relative error of about 1e-7 is below what one rounding of an fp32 logit of 10 does (1e-6).
    They are summed in float64. Tokens that tie with the k-th greatest stay in top_k.
    """
    with np.errstate(over="ignore", under="ignore"):
        weights = (logits - logits.max()) / np.float32(max(params.temperature, 1e-30))
        np.exp(weights, out=weights)  # the greatest is 1
    ids: np.ndarray | None = None  # None: the whole vocabulary
    if 0 < params.top_k < len(weights):
        ids = np.flatnonzero(logits >= kth_greatest(logits, params.top_k))
        weights = weights[ids]
    if params.top_p < 1.0:
        kept = nucleus(weights, params.top_p)
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    if params.min_p > 0.0:
        kept = np.flatnonzero(weights >= params.min_p)  # the greatest weight is 1
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    index = inverse_cdf(weights, u)
    return index if ids is None else int(ids[index])


def sample(logits: np.ndarray, samplers: Sequence[SequenceSampler], positions: Sequence[int]) -> list[int | Exception]:
    """The next token of every sequence, or the error that it alone fails with.

    `logits`: fp32 [sequences, vocab]; `positions`: the absolute position that each new token takes.
    """
    tokens: list[int | Exception] = []
    best = logits.argmax(axis=1) if all(sampler.is_plain_greedy for sampler in samplers) else None
    for row, (sampler, position) in enumerate(zip(samplers, positions, strict=True)):
        try:
            if best is not None:
                check_finite(logits[row, best[row]], position)
                tokens.append(int(best[row]))
            else:
                tokens.append(sampler.choose(logits[row], position))
        except Exception as error:  # noqa: BLE001 - one sequence's failure is its own
            tokens.append(error)
    return tokens
