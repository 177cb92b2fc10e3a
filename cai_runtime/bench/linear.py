"""Measures linears alone: our backends and torch on the same random weights, in one run.

Every contender (`contenders.py`) does the same work for each group of linears and each number of rows. A group runs as one
call; its shape comes from `models/shapes.json` or from the user. Before timing, each result is checked against the reference
on up to eight rows, in float64, or in float32 for a linear of more than 2^27 parameters. `timing.py` defines the timing:
weights and inputs rotate, contenders take turns.

    GB/s            bytes of the stored weights / median time
    GFLOP/s         operations of the factors, two for each parameter and row / median time
    floor           the larger of bytes / read bandwidth and operations / matrix rate (`roofs.py`), measured for each group
                    and number of rows (`floors.py`). The matrix rate is that of torch's products in the dtype of the
                    activations. The bytes are without activations, which may stay in a cache.
    of floor        floor / median time
    launches        kernels of a call, on a GPU
    vs dense        time of torch's dense linear on as many rows / median time; in fp32 on a CPU, where our kernels compute
                    in fp32, in bf16 on a GPU

Inputs are bf16 on a GPU. On a CPU they are fp32, except for torch's bf16 and int4. Rows are by default 1, 4, 16 and 512 on a
CPU, 1, 16, 64, 512 and 4096 on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

from cai_runtime.bench.bandwidth import streaming_read
from cai_runtime.bench.contenders import (
    Contender,
    Linear,
    check_backends,
    default_backends,
    linear_contenders,
)
from cai_runtime.bench.factors import STORES, Factorization, RandomWeights, flops_per_row, stored_bytes
from cai_runtime.bench.floors import Floors, MeasureRoofs, Reader
from cai_runtime.bench.machine import describe_gpus, describe_machine, versions
from cai_runtime.bench.roofs import Roofs, measure_roofs
from cai_runtime.bench.timing import Clock, Schedule, Times, make_clock, rotation, thread_count
from cai_runtime.errors import BenchmarkError, KernelError

if TYPE_CHECKING:
    import torch

    from cai_runtime.kernels.weights import LinearWeights
    from cai_runtime.models.shapes import LinearGroup

INPUTS = 8  # calls rotate through as many inputs
CPU_ROWS, GPU_ROWS = (1, 4, 16, 512), (1, 16, 64, 512, 4096)
CHECKED_ROWS = 8
JUDGE_PARAMETERS = 1 << 27  # a linear with more is checked in float32


@dataclass(frozen=True)
class LinearSettings:
    """The cases to measure. Raises BenchmarkError for a value out of range.

    batches: numbers of rows. batches, backends: None is those of the device. device: a resolved name ("cpu", "cuda:0").
    threads: None is all that this process may use.
    """

    how: Factorization = field(default_factory=lambda: Factorization("interpolative", 0.5))
    stores: tuple[str, ...] = ("fp32", "bf16", "int8", "int4")
    int4_group: int = 64
    batches: tuple[int, ...] | None = None
    backends: tuple[str, ...] | None = None
    device: str = "cpu"
    threads: int | None = None
    peers: bool = True
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        from cai_runtime.kernels.weights import INT4_GROUPS

        for store in self.stores:
            if store not in STORES:
                raise BenchmarkError(f"unknown store {store!r}; there are: {', '.join(STORES)}")
        if self.int4_group not in INT4_GROUPS:
            raise BenchmarkError(f"group is {self.int4_group}; int4 has groups of {', '.join(map(str, INT4_GROUPS))}")
        if not self.stores or not self.rows or min(self.rows) < 1:
            raise BenchmarkError("name at least one store, and batches of at least 1")
        check_backends(self.backends or ())

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def rows(self) -> tuple[int, ...]:
        return (GPU_ROWS if self.on_gpu else CPU_ROWS) if self.batches is None else self.batches


@dataclass(frozen=True)
class LinearResult:
    """One contender on one group at one number of rows. median_s, best_s: seconds; None if it does not support them."""

    group: str
    shape: str
    active: int  # groups of this shape that a token passes in the model
    batch: int
    engine: str
    method: str
    ranks: tuple[int, ...]
    keep: float  # stored over dense parameters
    store: str
    activations: str
    weight_bytes: int
    flops: int
    roofs: Roofs  # measured at the same time
    sets: int = 0  # copies of the weights that the calls rotate through
    calls: int = 0
    launches: float | None = None  # kernels of a call, on a GPU
    median_s: float | None = None
    best_s: float | None = None
    relative_error: float | None = None
    judge: str | None = None  # dtype of the check
    unsupported: str | None = None  # the reason

    @property
    def label(self) -> str:
        return f"{self.engine} {self.method} {self.store}"

    @property
    def nbytes(self) -> int:
        return self.weight_bytes

    @property
    def intensity(self) -> float:
        """Operations per byte of weights."""
        return self.flops / self.weight_bytes

    def rate(self, amount: float) -> float | None:
        """`amount` per second of median time."""
        return None if self.median_s is None else amount / self.median_s


@dataclass(frozen=True)
class LinearReport:
    benchmark: str
    subject: str  # name of the model, or the shapes
    of_model: bool  # whether the groups are all linears of a model
    notes: tuple[str, ...]
    date: str
    machine: dict[str, Any]
    gpus: list[dict[str, Any]]
    versions: dict[str, str | None]
    settings: LinearSettings
    threads: int
    roofs: Roofs  # the highest over all results
    results: list[LinearResult]

    def speedup(self, r: LinearResult, store: str) -> float | None:
        """Time of torch's dense linear in `store`, same group and rows, over r's time; None if either is missing."""
        for other in self.results:
            dense = (other.engine, other.method, other.store) == ("torch", "dense", store)
            if dense and (other.group, other.batch) == (r.group, r.batch) and other.median_s and r.median_s:
                return other.median_s / r.median_s
        return None

    @property
    def baseline(self) -> str:
        """The store of torch's dense linear in the table's last column."""
        return "bf16" if self.settings.on_gpu else "fp32"


def bench_linear(
    groups: Sequence[LinearGroup],
    settings: LinearSettings,
    *,
    subject: str,
    of_model: bool = False,
    notes: Sequence[str] = (),
    benchmark: str = "linear",
    progress: bool | None = None,
    roofs: MeasureRoofs = measure_roofs,
    reader: Reader | None = streaming_read,
) -> LinearReport:
    """Measure every group at every number of rows as the module describes. One group's weights are in memory at a time.

    subject, notes, benchmark: text for the report. of_model: whether the groups are all linears of a model. roofs, reader:
    see `Floors`.

    Raises BenchmarkError if a rank is too high, a group's weights do not fit into memory, or a result is wrong.
    """
    import torch

    from cai_runtime.progress import progress_bar

    backends = settings.backends or default_backends(settings.device)
    contenders = linear_contenders(backends, settings.how, settings.stores, settings.device, peers=settings.peers)
    turns = len(groups) * len(settings.rows) * len(contenders) * settings.schedule.rounds
    results: list[LinearResult] = []
    with (
        thread_count(settings.threads) as threads,
        progress_bar("measure", total=turns, unit="turn", show=progress) as bar,
        torch.inference_mode(),
    ):
        floors = Floors(settings.device, roofs, reader)
        for group in groups:
            results += _measure_group(group, contenders, settings, floors, bar)
    return LinearReport(
        benchmark=benchmark,
        subject=subject,
        of_model=of_model,
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


@dataclass
class _Entry:
    """A contender with `sets` copies of a group's weights, each prepared; or the reason why it does not support them."""

    contender: Contender
    members: list[LinearWeights]  # of the first set
    sets: int
    prepared: list[Linear]
    expected: dict[int, torch.Tensor]  # reference output of the checked rows, by number of rows
    unsupported: str | None = None


def _measure_group(
    group: LinearGroup,
    contenders: Sequence[Contender],
    settings: LinearSettings,
    floors: Floors,
    bar: Any,
) -> list[LinearResult]:
    inputs = _inputs(group.in_features, settings)
    entries = _prepare(group, contenders, inputs, settings, bar)
    results = []
    for batch in settings.rows:
        results += _measure_rows(group, entries, batch, inputs[batch], settings, floors, bar)
    return results


def _prepare(
    group: LinearGroup,
    contenders: Sequence[Contender],
    inputs: dict[int, list[torch.Tensor]],
    settings: LinearSettings,
    bar: Any,
) -> list[_Entry]:
    """Each contender with its weights. Contenders of one factorization and store share weights and reference outputs."""
    from cai_runtime.kernels.cpu_library import Arena
    from cai_runtime.kernels.slim_linear import reference

    sizes = [
        sum(stored_bytes(c.how, group.in_features, out, c.store, settings.int4_group) for out in group.out_features)
        for c in contenders
    ]
    counts = rotation(sizes, settings.device)
    bar.set_postfix_str(f"{group.name}: weights")
    draw = RandomWeights(settings.device, settings.int4_group)
    entries: dict[str, _Entry] = {}
    for how, store in dict.fromkeys((c.how, c.store) for c in contenders):
        sharing = [(c, n) for c, n in zip(contenders, counts, strict=True) if (c.how, c.store) == (how, store)]
        arenas = {c.label: None if settings.device.startswith("cuda") else Arena() for c, _ in sharing}
        expected: dict[int, torch.Tensor] = {}
        for index in range(max(n for _, n in sharing)):
            members = draw.group_of(group.in_features, group.out_features, how, store)
            if index == 0:
                for rows, xs in inputs.items():
                    x = xs[0][checked_rows(rows)].to(judge(members))
                    expected[rows] = _side_by_side([reference(x, w) for w in members])
            for contender, wanted in sharing:
                entry = entries.setdefault(contender.label, _Entry(contender, members, wanted, [], expected))
                if index < wanted and entry.unsupported is None:
                    try:
                        entry.prepared.append(contender.prepare(members, arenas[contender.label]))
                    except KernelError as error:
                        entry.unsupported = str(error)
    return [entries[c.label] for c in contenders]


def _measure_rows(
    group: LinearGroup,
    entries: Sequence[_Entry],
    batch: int,
    inputs: Sequence[torch.Tensor],
    settings: LinearSettings,
    floors: Floors,
    bar: Any,
) -> list[LinearResult]:
    import torch

    rounds = settings.schedule.rounds
    clocks, running, reasons, errors = [], [], {}, {}
    for index, entry in enumerate(entries):
        c = entry.contender
        bar.set_postfix_str(f"{group.name}, {batch} rows: {c.label}")
        xs = [x.to(getattr(torch, c.activations)) for x in inputs]
        try:
            if entry.unsupported is not None:
                raise KernelError(entry.unsupported)
            errors[index] = check(c, entry.prepared[0](xs[0]), entry.expected[batch], f"{group.name}, {batch} rows")
            clocks.append(
                make_clock([partial(f, xs[i % len(xs)]) for i, f in enumerate(entry.prepared)], settings.device)
            )
            running.append(index)
        except KernelError as error:
            reasons[index] = str(error)
            bar.update(rounds)

    found, around = floors.timed(clocks, settings.schedule, bar.update)
    times = dict(zip(running, zip(found, clocks, strict=True), strict=True))
    return [
        _result(group, entry, batch, around, times.get(index), errors.get(index), reasons.get(index))
        for index, entry in enumerate(entries)
    ]


def _result(
    group: LinearGroup,
    entry: _Entry,
    batch: int,
    roofs: Roofs,
    timed_by: tuple[Times, Clock] | None,
    error: float | None,
    unsupported: str | None,
) -> LinearResult:
    c, members = entry.contender, entry.members
    # The rank of an mpo is its largest bond dimension.
    ranks = tuple(w.rank or max(w.bonds, default=0) for w in members)
    timed: dict[str, Any] = {"unsupported": unsupported}
    if timed_by is not None:
        times, clock = timed_by
        timed = {
            "sets": entry.sets,
            "calls": len(times.seconds),
            "launches": clock.launches,
            "median_s": times.median,
            "best_s": times.best,
            "relative_error": error,
            "judge": str(judge(members)).removeprefix("torch."),
        }
    return LinearResult(
        group=group.name,
        shape=group.shape,
        active=group.active,
        batch=batch,
        engine=c.engine,
        method=c.method,
        ranks=() if c.how.kind == "dense" else ranks,
        keep=sum(w.parameters for w in members) / group.parameters,
        store=c.store,
        activations=c.activations,
        weight_bytes=sum(w.nbytes for w in members),
        flops=batch * sum(flops_per_row(w) for w in members),
        roofs=roofs,
        **timed,
    )


def _inputs(width: int, settings: LinearSettings) -> dict[int, list[torch.Tensor]]:
    """Inputs fp32 [rows, width] by number of rows. Their values are exact in bf16, so all contenders get the same ones."""
    import torch

    draw = torch.Generator(settings.device).manual_seed(1)
    device = settings.device
    return {
        rows: [torch.randn(rows, width, device=device, generator=draw).bfloat16().float() for _ in range(INPUTS)]
        for rows in settings.rows
    }


def checked_rows(rows: int) -> list[int]:
    """Up to eight row indices, spread over the batch from the first to the last."""
    return sorted({round(i * (rows - 1) / (CHECKED_ROWS - 1)) for i in range(CHECKED_ROWS)})


def judge(members: Sequence[LinearWeights]) -> torch.dtype:
    """The dtype in which the reference computes the expected output."""
    import torch

    return torch.float64 if max(w.parameters for w in members) <= JUDGE_PARAMETERS else torch.float32


def check(contender: Contender, y: torch.Tensor, expected: torch.Tensor, where: str) -> float:
    """The relative error of y in its checked rows. Raises BenchmarkError if it exceeds the contender's tolerance."""
    rows = y[checked_rows(y.shape[0])].to(expected.dtype)
    norm = float(expected.norm())
    error = float((rows - expected).norm()) / norm if norm else float(rows.norm())
    if not error <= contender.tolerance:
        raise BenchmarkError(
            f"{contender.label} is wrong on {where}: relative error {error:.1e} against the reference, where "
            f"{contender.tolerance:.0e} is allowed with {contender.activations} activations"
        )
    return error


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat(list(parts), dim=1)
