"""How each sequence is sampled: state that is kept token by token, and the step's `SamplingBatch` made of it.

What a token is chosen by is defined in kernels/sampling.py: a pure function of the row, the parameters, the seed and the
position, so that a seeded request gives the same text alone, in a batch, and after a preemption.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np

from cai_runtime.engine.request import LogitsRules, SamplingParams, TokenLogprobs
from cai_runtime.errors import CaiError, EngineError, InvalidRequestError, NonFiniteLogitsError
from cai_runtime.kernels.sampling import (
    BAD_TOKEN,
    NEUTRAL,
    NO_TABLES,
    NOT_FINITE,
    NOTHING_ALLOWED,
    OK,
    PROCESSOR_FAILED,
    LogitsProcessor,
    RowTables,
    Sampled,
    SamplingBatch,
    inverse_temperature,
    min_weight,
    new_batch,
    sample_cpu,
)

MAX_LOGPROBS = 127  # of the likeliest tokens: `SamplingBatch.logprobs` is int8

# What the numbers may be: finite in fp32, and with repetition penalties that let no logit overflow.
_RANGES = {
    "temperature": (0.0, 1e30),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 1e6),
    "frequency_penalty": (-1e6, 1e6),
    "presence_penalty": (-1e6, 1e6),
}


class PromptTokens:
    """The distinct tokens of a prompt, ascending: int32 [distinct]. Choices of one request share it."""

    _alive: ClassVar[weakref.WeakValueDictionary[bytes, PromptTokens]] = weakref.WeakValueDictionary()

    def __init__(self, ids: np.ndarray):
        self.ids = np.unique(ids)

    @classmethod
    def of(cls, prompt_ids: Sequence[int]) -> PromptTokens:
        """That of an equal prompt, if a sequence that has it still exists."""
        ids = np.asarray(prompt_ids, dtype=np.int32)
        key = ids.tobytes()
        found = cls._alive.get(key)
        if found is None:
            found = cls._alive[key] = cls(ids)
        return found


class TokenCounts:
    """Distinct tokens and how often each was generated, in arrays that grow: a prompt's tokens first, with a count of 0."""

    def __init__(self, prompt: PromptTokens | None = None):
        self._prompt = prompt  # kept, so that other choices find it
        known = prompt.ids if prompt is not None else np.zeros(0, np.int32)
        self._num_prompt = self._size = len(known)
        self._ids = np.zeros(self._size + 64, np.int32)
        self._ids[: self._size] = known
        self._counts = np.zeros(self._size + 64, np.int32)
        self._slot: dict[int, int] = {}  # of generated tokens

    def add(self, token_id: int) -> None:
        slot = self._slot.get(token_id)
        if slot is None:
            slot = self._slot[token_id] = self._find(token_id)
        self._counts[slot] += 1

    def _find(self, token_id: int) -> int:
        at = int(np.searchsorted(self._ids[: self._num_prompt], token_id))
        if at < self._num_prompt and self._ids[at] == token_id:
            return at
        if self._size == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[self._size] = token_id
        self._size += 1
        return self._size - 1

    def plus(self, token_ids: Sequence[int]) -> TokenCounts:
        """A copy that has counted these, too."""
        copy = TokenCounts.__new__(TokenCounts)
        copy._prompt, copy._num_prompt, copy._size = self._prompt, self._num_prompt, self._size
        copy._ids, copy._counts, copy._slot = self._ids.copy(), self._counts.copy(), self._slot.copy()
        for token_id in token_ids:
            copy.add(token_id)
        return copy

    @property
    def ids(self) -> np.ndarray:
        """int32 [distinct]."""
        return self._ids[: self._size]

    @property
    def counts(self) -> np.ndarray:
        """int32 [distinct]."""
        return self._counts[: self._size]


class RowSampler(Protocol):
    """How a row of a step is sampled. row_bytes: of ROW. tables: as these say. logprobs: as `SamplingBatch` has them; None:
    none. scored: likewise. wants_more: whether it has logprobs or a processor."""

    row_bytes: Any
    tables: RowTables
    wants_more: bool
    scored: int

    @property
    def logprobs(self) -> int | None: ...

    def tables_after(self, drafted: Sequence[int]) -> RowTables:
        """The tables of a row that follows the text and these tokens, which are not yet part of it."""
        ...

    def processor_after(self, drafted: Sequence[int]) -> LogitsProcessor | None:
        """Likewise, what comes before everything else."""
        ...


class TokenScorer:
    """A row that samples nothing: it gives the logprob of a token of the prompt, and the k likeliest ones'."""

    row_bytes = NEUTRAL.copy().view(np.uint8).data
    tables = NO_TABLES
    wants_more = True

    def __init__(self, token_id: int, k: int):
        self.scored, self.logprobs = token_id, k

    def tables_after(self, drafted: Sequence[int]) -> RowTables:
        return self.tables  # nothing of the row depends on other tokens

    def processor_after(self, drafted: Sequence[int]) -> None:
        return None


class SequenceSampler:
    """How one sequence chooses its next token: its row of a `SamplingBatch`, kept up to date by `observe`.

    `stop_ids`: the tokens that end the text, banned until `min_tokens` were generated. `seed`: used when the parameters name
    none. `rules`: see `Request.rules`; they cost a Python call per token.

    Raises InvalidRequestError for a parameter that is no number or outside its range.
    """

    scored = -1

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        stop_ids: Iterable[int],
        seed: int,
        rules: LogitsRules | None = None,
    ):
        _check(params)
        self.params, self.rules, self.logprobs = params, rules, params.logprobs
        self._generated: list[int] = []  # tokens, for the rules alone
        self.seed = params.seed if params.seed is not None else seed
        self._num_generated = 0
        repeats = params.repetition_penalty != 1.0
        penalizes = repeats or params.frequency_penalty or params.presence_penalty
        self._counts = TokenCounts(PromptTokens.of(prompt_ids) if repeats else None) if penalizes else None
        self._biases = _bias_table(params.logit_bias, ())
        self._early_biases = _bias_table(params.logit_bias, stop_ids) if params.min_tokens > 0 else self._biases
        self.row = NEUTRAL.copy()
        self.row_bytes = self.row.view(np.uint8).data  # follows the row, and is quicker to join than an array
        self.wants_more = params.logprobs is not None or rules is not None  # than most rows of a batch
        row = self.row
        row["seed"] = self.seed % 2**64, self.seed // 2**64 % 2**64
        row["inverse_temperature"] = inverse_temperature(params.temperature)
        row["top_k"] = min(max(params.top_k, 0), 2**31 - 1)
        row["top_p"], row["min_weight"] = params.top_p, min_weight(params.min_p)
        row["repetition"], row["frequency"] = params.repetition_penalty, params.frequency_penalty
        row["presence"] = params.presence_penalty
        self.tables = NO_TABLES
        self._write_tables()

    @property
    def is_ahead(self) -> bool:
        """Whether the token behind the next one can be sampled by the same row: neither depends on what the other is, and
        the host is not asked for either."""
        early = self._num_generated + 1 < self.params.min_tokens or self._num_generated >= self.params.min_tokens
        return self._counts is None and self.rules is None and early

    def observe(self, token_id: int) -> None:
        """Take note of a token that became part of the text."""
        self._num_generated += 1
        if self.rules is not None:
            self._generated.append(token_id)
        if self._counts is not None:
            self._counts.add(token_id)
        elif self._num_generated != self.params.min_tokens:
            return  # the tables are as before
        self._write_tables()

    def fork(self) -> SequenceSampler:
        """One of its own for another sequence that goes on from the same text."""
        made = copy.copy(self)
        made._generated = list(self._generated)
        if self._counts is not None or self._num_generated < self.params.min_tokens:  # else nothing else changes
            made._counts = None if self._counts is None else self._counts.plus(())
            made.row = self.row.copy()
            made.row_bytes = made.row.view(np.uint8).data
            made._write_tables()
        return made

    def tables_after(self, drafted: Sequence[int]) -> RowTables:
        counts = self._counts.plus(drafted) if self._counts is not None else None
        return self._tables(counts, self._num_generated + len(drafted))

    def processor_after(self, drafted: Sequence[int]) -> LogitsProcessor | None:
        return None if self.rules is None else partial(_follow, self.rules, (*self._generated, *drafted))

    def _tables(self, counts: TokenCounts | None, num_generated: int) -> RowTables:
        biases = self._early_biases if num_generated < self.params.min_tokens else self._biases
        if counts is None:
            return RowTables(NO_TABLES.penalty_tokens, NO_TABLES.penalty_counts, *biases)
        return RowTables(counts.ids, counts.counts, *biases)

    def _write_tables(self) -> None:
        self.tables = self._tables(self._counts, self._num_generated)
        self.tables.write(self.row)


def _follow(rules: LogitsRules, generated: tuple[int, ...], row: np.ndarray) -> None:
    rules(row, generated)


_NUMBER = (int, float, np.integer, np.floating)


def _check(params: SamplingParams) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(params, name)
        if not isinstance(value, _NUMBER) or not low <= value <= high:
            raise InvalidRequestError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(params, name)
        if wanted is not None and not (type(wanted) is int and 0 <= wanted <= MAX_LOGPROBS):
            raise InvalidRequestError(f"{name} is {wanted!r}; it must be None or an integer from 0 to {MAX_LOGPROBS}")
    for token_id, bias in params.logit_bias.items():
        if not isinstance(bias, _NUMBER) or not (bias == -np.inf or abs(bias) <= 1e30):
            raise InvalidRequestError(
                f"logit_bias of token {token_id} is {bias!r}; it must be a number up to 1e30 or -inf"
            )


def _bias_table(bias: Mapping[int, float], banned: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [n] tokens, fp32 [n] biases); a ban is -inf."""
    values = dict(bias) | dict.fromkeys(banned, -np.inf)
    return np.fromiter(values, np.int32, len(values)), np.fromiter(values.values(), np.float32, len(values))


def sampling_batch(
    samplers: Sequence[RowSampler],
    positions: Sequence[int],
    drafted: Mapping[int, Sequence[int]] | None = None,
    mask: np.ndarray | None = None,
) -> SamplingBatch:
    """One row for each sampler; a sequence may have several. Good until one of them observes a token.

    positions: the absolute position that each new token takes. drafted: row number -> tokens between the sequence's text and
    this row, where a sequence has several rows. mask: see `SamplingBatch`.
    """
    tables = [sampler.tables for sampler in samplers]
    replaced = {i: samplers[i].tables_after(tokens) for i, tokens in drafted.items()} if drafted else {}
    logprobs = scored = None
    custom = {}
    for i in [i for i, sampler in enumerate(samplers) if sampler.wants_more]:
        sampler = samplers[i]
        if sampler.logprobs is not None:
            logprobs = np.full(len(samplers), -1, np.int8) if logprobs is None else logprobs
            logprobs[i] = sampler.logprobs
        if sampler.scored >= 0:
            scored = np.full(len(samplers), -1, np.int32) if scored is None else scored
            scored[i] = sampler.scored
        processor = sampler.processor_after(drafted.get(i, ()) if drafted else ())
        if processor is not None:
            custom[i] = processor
    rows = [sampler.row_bytes for sampler in samplers]
    return new_batch(rows, positions, tables, replaced, mask, logprobs, custom, scored)


def tokens_or_errors(sampled: Sampled, positions: Sequence[int]) -> list[int | Exception]:
    """The tokens of a step; for a row that failed, the error that its sequence alone fails with."""
    tokens: list[int | Exception] = sampled.ids.tolist()
    statuses = sampled.status.tobytes()
    if statuses.count(OK) == len(tokens):  # a tenth of the time that numpy takes to say so
        return tokens
    for i, status in enumerate(statuses):
        if status == OK:
            continue
        if status == PROCESSOR_FAILED:
            tokens[i] = _rules_failed(sampled.errors[i], positions[i])
        else:
            tokens[i] = _ERRORS[status](positions[i])
    return tokens


def _rules_failed(cause: Exception, position: int) -> CaiError:
    if isinstance(cause, CaiError):
        return cause
    error = EngineError(f"the request's logits rules failed at position {position}: {cause!r}")
    error.__cause__ = cause
    return error


def logprobs_of(sampled: Sampled, ids: Sequence[int], at: int, k: int) -> list[TokenLogprobs]:
    """Of rows `at`, `at + 1`, ..., each with the token of `ids` that its logprob is of. k: as the rows asked for."""
    assert sampled.logprobs is not None
    rows = slice(at, at + len(ids))
    found = sampled.logprobs[rows].tolist()
    if not k:
        return [TokenLogprobs(token_id, value) for token_id, value in zip(ids, found, strict=True)]
    assert sampled.top is not None
    tops = zip(sampled.top[0][rows, :k].tolist(), sampled.top[1][rows, :k].tolist(), strict=True)
    return [  # a vocabulary may have fewer than k tokens
        TokenLogprobs(token_id, value, tuple((t, v) for t, v in zip(tokens, values, strict=True) if t >= 0))
        for token_id, value, (tokens, values) in zip(ids, found, tops, strict=True)
    ]


def sample_one(logits: np.ndarray, params: SamplingParams, u: float, position: int = 0) -> int:
    """The token that the random number `u` in [0, 1) chooses from a row of logits, fp32 [vocabulary], left untouched.

    `position` is for error messages. Raises NonFiniteLogitsError; for min_tokens and penalties the text is empty."""
    sampler = SequenceSampler(params, (), (), 0)
    sampler.row["uniform"] = u
    (token,) = tokens_or_errors(
        sample_cpu(logits[None].copy(), SamplingBatch(sampler.row, [sampler.tables])), [position]
    )
    if isinstance(token, Exception):
        raise token
    return token


_ERRORS = {
    NOT_FINITE: lambda position: NonFiniteLogitsError(
        f"the logits for position {position} hold NaN or infinity: the checkpoint is damaged, its dtype overflows, or a "
        "penalty or logit_bias does"
    ),
    NOTHING_ALLOWED: lambda position: NonFiniteLogitsError(
        f"every token is banned at position {position}: logit_bias, a grammar or min_tokens leaves none, or all of the "
        "model's logits are -inf"
    ),
    BAD_TOKEN: lambda position: InvalidRequestError(
        f"a token id of the prompt, of logit_bias or of the stop tokens is outside the vocabulary (position {position})"
    ),
}
