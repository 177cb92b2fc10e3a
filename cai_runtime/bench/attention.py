"""Measures attention alone: our backends over a paged KV cache, and torch over the same keys and values, contiguous.

One call is an engine's step for one layer: rotate the new tokens' queries and keys (RoPE), write their keys and values to
the cache, attend. At `decode`, each of `batch` sequences adds one token to a context of `context` positions, this token
included. At `prefill`, one sequence adds `context` tokens to an empty cache. The pages of all sequences are shuffled.

torch's scaled_dot_product_attention gets contiguous inputs, rotated beforehand, with a causal mask or none. At decode, the
query heads of one key head form its queries; at prefill, keys and values are repeated for each query head beforehand. That
is the best case for torch, and no engine gets this preparation for free. FlashInfer, on a GPU where it is installed, gets
the same preparation, in pages. Neither has a cache of int8.

    GB/s         decode only: bytes of the visible keys and values / median time
    GFLOP/s      four operations per query head, dimension and visible pair of positions / median time
    floor        the larger of bytes / read bandwidth and operations / matrix rate, see `floors.py`
    launches     kernels of a call, on a GPU

Before timing, up to eight rows are checked against softmax(q k^T) v in float64. `timing.py` defines the timing: sequences
rotate, so that no call finds its keys in a processor cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import reduce
from typing import TYPE_CHECKING, Any

from cai_runtime.bench.attention_cases import Case, gathered_calls, paged_calls
from cai_runtime.bench.bandwidth import streaming_read
from cai_runtime.bench.contenders import TOLERANCE, check_backends, default_backends
from cai_runtime.bench.floors import Floors, MeasureRoofs, Reader
from cai_runtime.bench.gpu_peers import flashinfer_calls, installed
from cai_runtime.bench.machine import describe_gpus, describe_machine, versions
from cai_runtime.bench.roofs import Roofs, measure_roofs
from cai_runtime.bench.timing import Call, Schedule, make_clock, rotation, thread_count
from cai_runtime.errors import BenchmarkError, KernelError

if TYPE_CHECKING:
    from cai_runtime.models.shapes import AttentionHeads

CACHE_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
CACHE_TOLERANCE = TOLERANCE | {"int8": 5e-3}  # a code is off by one where a rounding of the rotation falls on an edge


@dataclass(frozen=True)
class AttentionSettings:
    """The cases to measure. Raises BenchmarkError for a value out of range.

    window: None is full attention. caches: dtypes of the KV cache; None is fp32 and bf16 on a CPU, bf16 on a GPU. backends:
    None is those of the device. device: a resolved name ("cpu", "cuda:0"). threads: None is all that this process may use.
    """

    heads: AttentionHeads
    window: int | None = None
    contexts: tuple[int, ...] = (128, 512, 2048, 8192)  # of decode
    batches: tuple[int, ...] = (1, 8)  # of decode
    prompts: tuple[int, ...] = (128, 512, 2048)  # of prefill
    caches: tuple[str, ...] | None = None
    backends: tuple[str, ...] | None = None
    device: str = "cpu"
    threads: int | None = None
    peers: bool = True
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        h = self.heads
        if min(h.query, h.kv, h.dim) < 1 or h.query % h.kv or h.dim % 2:
            raise BenchmarkError(f"{h.query} query heads don't share {h.kv} key heads, of an even dimension {h.dim}")
        for name in self.caches or ():
            if name not in CACHE_DTYPES:
                raise BenchmarkError(f"unknown cache dtype {name!r}; there are: {', '.join(CACHE_DTYPES)}")
        if self.window is not None and self.window < 1:
            raise BenchmarkError(f"window is {self.window}; it is at least 1 position")
        check_backends(self.backends or ())

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def cases(self) -> list[Case]:
        decode = [Case("decode", self.heads, n, b, self.window) for b in self.batches for n in self.contexts]
        return decode + [Case("prefill", self.heads, n, 1, self.window) for n in self.prompts]


@dataclass(frozen=True)
class AttentionResult:
    """One contender on one case. median_s, best_s: seconds; None if the contender does not support the case."""

    mode: str
    batch: int
    context: int
    engine: str
    method: str
    cache: str
    activations: str
    cache_bytes: int
    flops: int
    roofs: Roofs  # measured at the same time
    sets: int = 0
    calls: int = 0
    launches: float | None = None
    median_s: float | None = None
    best_s: float | None = None
    relative_error: float | None = None
    unsupported: str | None = None  # the reason

    @property
    def nbytes(self) -> int:
        return self.cache_bytes

    def rate(self, amount: float) -> float | None:
        """`amount` per second of median time."""
        return None if self.median_s is None else amount / self.median_s


@dataclass(frozen=True)
class AttentionReport:
    subject: str
    notes: tuple[str, ...]
    date: str
    machine: dict[str, Any]
    gpus: list[dict[str, Any]]
    versions: dict[str, str | None]
    settings: AttentionSettings
    threads: int
    roofs: Roofs  # the highest over all results
    results: list[AttentionResult]

    @property
    def baseline(self) -> str:
        """The dtype of torch in the table's last column."""
        return "bf16" if self.settings.on_gpu else "fp32"

    def speedup(self, r: AttentionResult) -> float | None:
        """Time of torch in the baseline's dtype on the same case over r's time; None if either was not measured."""
        for other in self.results:
            same = (other.mode, other.batch, other.context) == (r.mode, r.batch, r.context)
            if same and (other.engine, other.cache) == ("torch", self.baseline) and other.median_s and r.median_s:
                return other.median_s / r.median_s
        return None


@dataclass(frozen=True)
class _Contender:
    """torch, FlashInfer or one of our backends, with the dtypes of its cache and its activations."""

    engine: str
    method: str
    cache: str
    activations: str

    @property
    def tolerance(self) -> float:
        return max(TOLERANCE[self.activations], CACHE_TOLERANCE[CACHE_DTYPES[self.cache]])

    def calls(self, case: Case, sets: int, device: str) -> list[Call]:
        dtype, activations = CACHE_DTYPES[self.cache], self.activations
        if self.engine == "torch":
            return gathered_calls(case, sets, device, dtype)
        if self.engine == "flashinfer":
            return flashinfer_calls(case, sets, device, dtype)
        return paged_calls(case, sets, device, dtype, activations, self.engine)


def bench_attention(
    settings: AttentionSettings,
    *,
    subject: str,
    notes: Sequence[str] = (),
    progress: bool | None = None,
    roofs: MeasureRoofs = measure_roofs,
    reader: Reader | None = streaming_read,
) -> AttentionReport:
    """Measure every case as the module describes. The caches of one case are in memory at a time.

    subject, notes: text for the report. roofs, reader: see `Floors`.

    Raises BenchmarkError if a case's caches do not fit into memory, or a result is wrong.
    """
    import torch

    from cai_runtime.progress import progress_bar

    contenders = attention_contenders(settings)
    cases = settings.cases
    results: list[AttentionResult] = []
    turns = len(cases) * len(contenders) * settings.schedule.rounds
    with (
        thread_count(settings.threads) as threads,
        progress_bar("measure", total=turns, unit="turn", show=progress) as bar,
        torch.inference_mode(),
    ):
        floors = Floors(settings.device, roofs, reader)
        for case in cases:
            results += _measure(case, contenders, settings, floors, bar)
    return AttentionReport(
        subject=subject,
        notes=tuple(notes),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        gpus=describe_gpus(),
        versions=versions(),
        settings=settings,
        threads=threads,
        roofs=reduce(Roofs.higher, (r.roofs for r in results)),
        results=results,
    )


def attention_contenders(settings: AttentionSettings) -> list[_Contender]:
    """torch with each dtype of a cache, FlashInfer where it is installed, then each backend."""
    caches = settings.caches or (("bf16",) if settings.on_gpu else ("fp32", "bf16"))
    ours = "bfloat16" if settings.on_gpu else "float32"
    found = []
    if settings.peers:
        floats = [cache for cache in caches if cache != "int8"]
        found += [_Contender("torch", "sdpa gathered", cache, CACHE_DTYPES[cache]) for cache in floats]
        if settings.on_gpu and installed("flashinfer"):
            halves = [cache for cache in floats if cache != "fp32"]
            found += [_Contender("flashinfer", "paged", cache, CACHE_DTYPES[cache]) for cache in halves]
    for backend in settings.backends or default_backends(settings.device):
        found += [_Contender(backend, "paged", cache, ours) for cache in caches]
    return found


def _measure(
    case: Case, contenders: Sequence[_Contender], settings: AttentionSettings, floors: Floors, bar: Any
) -> list[AttentionResult]:
    sizes = [case.held_bytes(CACHE_DTYPES[c.cache]) for c in contenders]
    sets = rotation(sizes, settings.device)
    clocks, running, reasons, errors = [], [], {}, {}
    for index, c in enumerate(contenders):
        bar.set_postfix_str(f"{case.label}: {c.engine} {c.cache}")
        try:
            calls = c.calls(case, sets[index], settings.device)
            errors[index] = _check(case, c, calls[0](), settings.device)
            clocks.append(make_clock(calls, settings.device))
            running.append(index)
        except KernelError as error:
            reasons[index] = str(error)
            bar.update(settings.schedule.rounds)

    timings, around = floors.timed(clocks, settings.schedule, bar.update)
    times = dict(zip(running, zip(timings, clocks, strict=True), strict=True))
    results = []
    for index, c in enumerate(contenders):
        timed: dict[str, Any] = {"unsupported": reasons.get(index)}
        if index in times:
            found, clock = times[index]
            timed = {
                "sets": sets[index], "calls": len(found.seconds), "launches": clock.launches, "median_s": found.median,
                "best_s": found.best, "relative_error": errors[index],
            }  # fmt: skip
        what = (case.mode, case.batch, case.context, c.engine, c.method, c.cache, c.activations)
        results.append(AttentionResult(*what, case.seen_bytes(CACHE_DTYPES[c.cache]), case.flops, around, **timed))
    return results


def _check(case: Case, contender: _Contender, out: Any, device: str) -> float:
    """The relative error of the first set's output. Raises BenchmarkError if it exceeds the contender's tolerance."""
    rows, expected = case.expected(device, CACHE_DTYPES[contender.cache], contender.activations)
    error = float((out[rows].double() - expected).norm() / expected.norm())
    if not error <= contender.tolerance:
        raise BenchmarkError(
            f"{contender.engine} with a {contender.cache} cache is wrong on {case.label}: relative error {error:.1e} "
            f"against float64, where {contender.tolerance:.0e} is allowed"
        )
    return error
