"""Sampling: rows of logits to tokens, by one definition that every backend follows to the last bit.

The definition. A row is fp32 [vocabulary] logits; it never sees its neighbours. In this order, transformers' (vLLM V1 adds
the bias before the penalties and applies min_p before top_k and top_p):

1. Custom processors (`SamplingBatch.custom`), Python functions on the row: a part of the model's distribution. A row that
   holds NaN or +inf is not shown to them, so that they can't hide it from step 5.
2. Repetition penalty (Keskar et al. 2019): positive logits of tokens seen in prompt or text are divided by it, others
   multiplied.
3. Frequency and presence penalty (OpenAI): count * frequency + presence is subtracted from tokens of the text.
4. Bias: added to the token's logit. A bias of -inf, and a 0 bit in the mask, set the logit to -inf: a ban.
5. A NaN or +inf among the logits is an error of the row (NOT_FINITE), and so is -inf everywhere (NOTHING_ALLOWED).
6. Temperature 0: the greatest logit, of equal ones the first.
7. Weights are whole numbers: w = trunc(2^30 e^x + 1/2), x = max((logit - greatest) * fp32(1 / temperature), -22) in fp32.
   e^x is Cephes' polynomial by separate IEEE multiplications and additions (`reference_weights` in
   sampling_reference.py). The greatest logit weighs 2^30; a probability below 2^-31 of the greatest becomes 0.
8. top_k: logits below the k-th greatest drop out. Those that tie with it stay.
9. top_p (Holtzman et al. 2020): the smallest set of greatest weights with a sum of at least ceil(top_p * total) stays;
   of equal weights the first ones. The product is in float64.
10. min_p: weights below ceil(min_p * 2^30) drop out.
11. The token is the first where the running sum of the weights, by token id, exceeds floor(u * total), the product in
    float64. u in [0, 1) has 53 bits of Philox4x64-10 (Salmon et al. 2011) with the seed as key and the absolute position
    of the token as counter. So two requests with one seed share their numbers at equal positions.

Sums of whole numbers are the same in any order: threads, pieces, instruction sets and devices can't move a seeded text.
Against exact arithmetic, a token's share is off by 4e-7 of itself (the polynomial and x's rounding at |x| <= 22) plus 2^-31
of the greatest token's; over a vocabulary V, the total variation distance is below 4e-7 + V * 2^-31 (6e-5 at 128k, reached
only when the whole vocabulary lies at the threshold).

Logprobs are log softmax of the logits after step 1 (of the raw logits, where a row has no custom processor), from the same
weights at temperature 1: fp32, at least -9999.

Backends: `sample_cpu` here (csrc/cpu/sampling_ops.cpp), kernels/triton/sampling.py, and kernels/sampling_reference.py.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cai_runtime.errors import KernelError

OK, NOT_FINITE, NOTHING_ALLOWED, BAD_TOKEN, PROCESSOR_FAILED = range(5)  # Sampled.status
ONE = 1 << 30  # the weight of the greatest logit
LOGPROB_FLOOR = -9999.0

LogitsProcessor = Callable[[np.ndarray], None]
"""Changes a row of logits (fp32 [vocabulary]) in place."""

# csrc/cpu/sampling.h: SampleRow. Addresses point into the row's `RowTables`.
ROW = np.dtype(
    [
        ("seed", np.uint64, 2),  # low, high
        ("position", np.uint64),
        ("uniform", np.float64),
        ("top_p", np.float64),  # 1: off
        ("penalty_token", np.uint64),
        ("penalty_count", np.uint64),
        ("penalties", np.int64),
        ("bias_token", np.uint64),
        ("bias", np.uint64),
        ("biases", np.int64),
        ("inverse_temperature", np.float32),  # 0: greedy
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("top_k", np.int32),  # 0: off
        ("min_weight", np.int32),  # 0: off
    ]
)
NEUTRAL = np.zeros(1, ROW)
NEUTRAL["top_p"] = NEUTRAL["repetition"] = 1


@dataclass(frozen=True, eq=False)
class RowTables:
    """The tokens of one row that have something of their own. Tokens of a table are different from each other.

    penalty_tokens, penalty_counts: int32, the tokens seen and how often each was generated (0: in the prompt only).
    bias_tokens int32, biases fp32: what is added to their logits; -inf is a ban. All contiguous.
    """

    penalty_tokens: np.ndarray
    penalty_counts: np.ndarray
    bias_tokens: np.ndarray
    biases: np.ndarray

    def write(self, row: np.ndarray) -> None:
        """Put the addresses and sizes into `row`, ROW [1]. This object must outlive their use."""
        row["penalty_token"] = self.penalty_tokens.ctypes.data
        row["penalty_count"] = self.penalty_counts.ctypes.data
        row["penalties"] = len(self.penalty_tokens)
        row["bias_token"], row["bias"] = self.bias_tokens.ctypes.data, self.biases.ctypes.data
        row["biases"] = len(self.bias_tokens)


_NO_IDS, _NO_VALUES = np.zeros(0, np.int32), np.zeros(0, np.float32)
NO_TABLES = RowTables(_NO_IDS, _NO_IDS, _NO_IDS, _NO_VALUES)


def inverse_temperature(temperature: float) -> float:
    """What the logits are multiplied by; 0 for temperature 0. Kept away from where fp32 overflows or loses bits."""
    return 0.0 if temperature == 0 else min(max(1.0 / max(temperature, 1e-30), 1e-30), 1e30)


def min_weight(min_p: float) -> int:
    """min_p, the least share of the greatest token's probability, as a weight."""
    return int(np.ceil(min(max(min_p, 0.0), 1.0) * ONE))


@dataclass(eq=False)
class SamplingBatch:
    """How each row of a step's logits becomes a token.

    rows: ROW [n], `uniform` filled in. tables: of each row, what its addresses point to. mask: uint32
    [n, ceil(vocabulary / 32)] or None; bit t % 32 of word t // 32 says whether token t is allowed. logprobs: int8 [n] or
    None; -1 none, 0 the sampled token's, k also the k greatest. scored: int32 [n] or None; the token whose logprob is given
    in place of the sampled one's, -1 for none. custom: row number -> logits processor. address: of the first row; numpy
    takes a microsecond to say it, so a maker that knows it hands it over.
    """

    rows: np.ndarray
    tables: Sequence[RowTables]
    mask: np.ndarray | None = None
    logprobs: np.ndarray | None = None
    custom: Mapping[int, LogitsProcessor] = field(default_factory=dict)
    address: int | None = None
    scored: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.rows.dtype != ROW or self.rows.ndim != 1 or not self.rows.flags.c_contiguous:
            raise KernelError("SamplingBatch.rows must be a contiguous array of kernels.sampling.ROW")
        if len(self.tables) != len(self.rows):
            raise KernelError(f"SamplingBatch has tables of {len(self.tables)} rows for {len(self.rows)} rows")
        if self.logprobs is not None and self.logprobs.shape != self.rows.shape:
            raise KernelError(f"SamplingBatch.logprobs has shape {self.logprobs.shape}, expected {self.rows.shape}")
        if self.logprobs is not None and not (self.logprobs >= 0).any():
            self.logprobs = None
        if self.address is None:
            self.address = self.rows.ctypes.data

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: np.ndarray) -> SamplingBatch:
        """The batch of these rows (numbers, ascending) alone."""
        custom = {i: self.custom[int(row)] for i, row in enumerate(rows) if int(row) in self.custom}
        mask = None if self.mask is None else np.ascontiguousarray(self.mask[rows])
        logprobs = None if self.logprobs is None else self.logprobs[rows]
        scored = None if self.scored is None else self.scored[rows]
        return SamplingBatch(self.rows[rows], [self.tables[row] for row in rows], mask, logprobs, custom, scored=scored)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise KernelError unless the batch fits logits of this shape."""
        if len(shape) != 2 or shape[0] != len(self.rows) or shape[1] < 1:
            raise KernelError(f"logits of shape {list(shape)} for a SamplingBatch of {len(self.rows)} rows")
        if self.mask is not None:
            words = (len(self.rows), -(-shape[1] // 32))
            if self.mask.dtype != np.uint32 or self.mask.shape != words or not self.mask.flags.c_contiguous:
                raise KernelError(
                    f"SamplingBatch.mask is {self.mask.dtype} {list(self.mask.shape)}, expected contiguous uint32 "
                    f"{list(words)}"
                )
        if self.scored is not None and (self.scored >= shape[1]).any():
            raise KernelError(f"SamplingBatch.scored names token {self.scored.max()} of a vocabulary of {shape[1]}")

    def listed(self, ids: np.ndarray) -> np.ndarray:
        """int32 [n]: whose logprobs are wanted where `ids` were sampled."""
        return ids if self.scored is None else np.where(self.scored >= 0, self.scored, ids)


@dataclass(frozen=True, eq=False)
class Sampled:
    """Tokens of the rows, on the host.

    ids: int32 [n], -1 where the status is not OK. status: uint8 [n]. logprobs: fp32 [n] or None, of the sampled or scored
    tokens; NaN for rows that want none. top: (ids int32 [n, k], logprobs fp32 [n, k]) or None: the greatest by falling
    logit, equal ones by id, k the most that a row wants; id -1 and the floor where a row wants fewer. errors: row number ->
    what its custom processor raised (status PROCESSOR_FAILED).
    """

    ids: np.ndarray
    status: np.ndarray
    logprobs: np.ndarray | None = None
    top: tuple[np.ndarray, np.ndarray] | None = None
    errors: Mapping[int, Exception] = field(default_factory=dict)

    def wait(self) -> Sampled:
        """Itself: for symmetry with results that are still on a device."""
        return self


def host_logits(logits: Any) -> np.ndarray:
    """Logits as writable contiguous fp32 [rows, vocabulary] on the host; without a copy where they are that already."""
    array = np.asarray(logits)
    if array.dtype == np.float32 and array.flags.carray:
        return array
    return np.require(array, dtype=np.float32, requirements=["C", "W", "A"])


def apply_processors(logits: np.ndarray, custom: Mapping[int, LogitsProcessor]) -> dict[int, Exception]:
    """Run each processor on its row of fp32 [n, vocabulary], in place, unless that holds NaN or +inf. Returns what they
    raised, by row."""
    errors: dict[int, Exception] = {}
    for row, process in custom.items():
        if not logits[row].max() < np.inf:
            continue
        try:
            process(logits[row])
        except Exception as error:  # noqa: BLE001 - user code: it fails its own row
            errors[row] = error
    return errors


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) of 53 random bits: Philox4x64 (Salmon et al. 2011), `seed` as key, `position` as counter."""
    generator = np.random.Philox(key=seed % 2**128, counter=position)
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def new_batch(
    rows: Sequence[Any],
    positions: Sequence[int],
    tables: list[RowTables],
    replaced: Mapping[int, RowTables],
    mask: np.ndarray | None = None,
    logprobs: np.ndarray | None = None,
    custom: Mapping[int, LogitsProcessor] | None = None,
    scored: np.ndarray | None = None,
) -> SamplingBatch:
    """A `SamplingBatch` of copies of single rows (bytes of ROW), with `positions`, and `uniform` filled in.

    tables: of each row, as its bytes say. replaced: row number -> other tables, which are put into the copy of the row.
    """
    memory = bytearray().join(rows)
    address = address_of(memory)
    array = np.frombuffer(memory, ROW)
    array["position"] = positions
    for i, other in replaced.items():
        tables[i] = other
        other.write(array[i : i + 1])
    _function("sampling_uniforms")(address, len(rows))
    return SamplingBatch(array, tables, mask, logprobs, custom or {}, address, scored)


def address_of(memory: bytearray) -> int:
    """Where it lies; it must not be empty. Quicker than an array's `ctypes.data`."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


_CALL = struct.Struct("9q")  # csrc/cpu/exports.cpp: sample_rows


def _is_plain_tensor(logits: Any) -> bool:
    """Whether it is a torch tensor that `host_logits` would leave as it is; without importing torch."""
    return (
        not isinstance(logits, np.ndarray)
        and hasattr(logits, "data_ptr")
        and logits.is_cpu
        and logits.is_floating_point()
        and logits.element_size() == 4
        and logits.is_contiguous()
    )


def sample_cpu(logits: Any, batch: SamplingBatch) -> Sampled:
    """logits: fp32 [n, vocabulary], numpy or torch on the CPU; may be overwritten. Raises KernelError for a batch that
    doesn't fit."""
    found, errors = None, {}
    if _is_plain_tensor(logits) and not batch.custom and batch.logprobs is None:
        address = logits.data_ptr()
        batch.check(logits.shape)
    else:
        logits = host_logits(logits)
        address = logits.ctypes.data
        batch.check(logits.shape)
        errors = apply_processors(logits, batch.custom)
        found = _Logprobs(logits, batch) if batch.logprobs is not None else None
    count, vocabulary = logits.shape
    # One piece of memory for the call's arguments, its scratch (8 bytes a row), ids and status.
    memory = bytearray(_CALL.size + 13 * count)
    scratch = address_of(memory) + _CALL.size
    mask, words = (0, 0) if batch.mask is None else (batch.mask.ctypes.data, batch.mask.shape[1])
    outputs = scratch + 8 * count, scratch + 12 * count
    _CALL.pack_into(memory, 0, batch.address, count, address, vocabulary, mask, words, *outputs, scratch)
    _function("sample_rows")(scratch - _CALL.size)
    ids = np.frombuffer(memory, np.int32, count, _CALL.size + 8 * count)
    status = np.frombuffer(memory, np.uint8, count, _CALL.size + 12 * count)
    for row in errors:
        ids[row], status[row] = -1, PROCESSOR_FAILED
    if found is None:
        return Sampled(ids, status, errors=errors)
    return Sampled(ids, status, *found.of(batch.listed(ids)), errors)


class _Logprobs:
    """What the logprobs of the rows that want them need, taken after the custom processors and before anything else changes
    the logits."""

    def __init__(self, logits: np.ndarray, batch: SamplingBatch):
        assert batch.logprobs is not None
        self._wanted = batch.logprobs
        self._which = np.flatnonzero(batch.logprobs >= 0).astype(np.int32)
        self._count, vocabulary = logits.shape
        # Sampling leaves a row as it is, but for the tokens that the mask bans. They are not sampled, but may be scored.
        masks_scored = batch.mask is not None and batch.scored is not None
        self._rows = logits[self._which] if masks_scored else None
        self._logits = logits
        k = int(batch.logprobs[self._which].max(initial=0))
        self._greatest, self._total = np.zeros(len(self._which), np.float32), np.zeros(len(self._which), np.int64)
        self._ids = np.full((len(self._which), k), -1, np.int32)
        addresses = [a.ctypes.data for a in (self._greatest, self._total, self._ids)]
        _function("top_logits")(
            logits.ctypes.data, self._which.ctypes.data, len(self._which), vocabulary, k, *addresses
        )
        self._values = self._logits_of(self._ids)

    def of(self, listed: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
        """As `Sampled` has them. listed: int32 [n], whose logprobs are given."""
        ids = listed[self._which]
        numbers = RowNumbers(
            self._which, self._greatest, self._total, ids, self._logits_of(ids[:, None])[:, 0], self._ids, self._values
        )
        return logprobs_of_rows(self._count, numbers, self._wanted)

    def _logits_of(self, ids: np.ndarray) -> np.ndarray:
        """fp32 [w, k]: of tokens of the w rows that want logprobs, ids [w, k]; of any token for id -1."""
        if self._rows is not None:
            return np.take_along_axis(self._rows, ids.astype(np.int64), axis=1)
        return self._logits[self._which[:, None], ids]


@dataclass(frozen=True, eq=False)
class RowNumbers:
    """What the logprobs of w rows are made of. which: their numbers. greatest fp32 [w], total int64 [w]: the greatest logit
    and the sum of the weights at temperature 1; 0 where the row has no distribution. listed_ids int32 [w], listed_logits
    fp32 [w]: of the token whose logprob is given. top_ids int32 [w, k], top_logits fp32 [w, k]: of the k greatest."""

    which: np.ndarray
    greatest: np.ndarray
    total: np.ndarray
    listed_ids: np.ndarray
    listed_logits: np.ndarray
    top_ids: np.ndarray
    top_logits: np.ndarray


def logprobs_of_rows(
    count: int, rows: RowNumbers, wanted: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """Logprobs of a step of `count` rows, and the greatest ones, as `Sampled` has them. wanted: `SamplingBatch.logprobs`."""
    with np.errstate(divide="ignore"):  # a total of 0: the row fails
        log_total = rows.greatest + np.log(rows.total / ONE)

    def values(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            found = logits.astype(np.float64) - log_total[:, None]
        usable = (ids >= 0) & np.isfinite(found)
        return np.where(usable, np.maximum(found, LOGPROB_FLOOR), LOGPROB_FLOOR).astype(np.float32)

    out = np.full(count, np.nan, np.float32)
    out[rows.which] = values(rows.listed_ids[:, None], rows.listed_logits[:, None])[:, 0]
    k = int(wanted.max(initial=0))
    if not k:
        return out, None
    top = np.full((count, k), -1, np.int32), np.full((count, k), LOGPROB_FLOOR, np.float32)
    there = rows.top_ids.shape[1]  # fewer than k, if the vocabulary is smaller
    ids = np.where(rows.total[:, None] > 0, rows.top_ids, -1)
    ids[np.arange(there) >= wanted[rows.which][:, None]] = -1
    top[0][rows.which, :there] = ids
    top[1][rows.which, :there] = values(ids, rows.top_logits)
    return out, top


@functools.cache
def _function(name: str) -> Any:
    from cai_runtime.kernels import cpu_library  # imports torch

    return cpu_library.function(name)
