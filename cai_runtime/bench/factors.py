"""Random factorized weights of a given keep, at a realistic scale.

To be fast, a pool of a few million random numbers is repeated over a core. The pool's length is prime, so no two rows of a
core of realistic size are equal, and the check still finds a kernel that confuses rows or columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from cai_runtime.errors import BenchmarkError

if TYPE_CHECKING:
    import torch

    from cai_runtime.kernels.weights import Core, LinearWeights

Kind = Literal["interpolative", "lowrank", "dense", "mpo"]
KINDS: tuple[str, ...] = get_args(Kind)
STORES = ("fp32", "bf16", "fp16", "int8", "int4")
RANK_MULTIPLE = 16
POOL = 4_194_301  # a prime
INT8_DEVIATION = math.sqrt((255**2 - 1) / 12)  # standard deviation of uniform integers from -127 to 127
INT4_DEVIATION = math.sqrt((16**2 - 1) / 12)


@dataclass(frozen=True)
class Factorization:
    """A factorization: `kind`, and `keep` (stored over dense parameters) or `rank`, which overrides keep.

    Raises BenchmarkError for an unknown kind, a keep outside (0, 1] or a rank below 1.
    """

    kind: str
    keep: float = 0.5
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BenchmarkError(f"unknown kind {self.kind!r}; there are: {', '.join(KINDS)}")
        if not 0 < self.keep <= 1:
            raise BenchmarkError(f"keep is {self.keep}; it is above 0 and at most 1")
        if self.rank is not None and self.rank < 1:
            raise BenchmarkError(f"rank is {self.rank}; it is at least 1")

    @property
    def label(self) -> str:
        if self.kind == "dense":
            return "dense"
        return f"{self.kind} rank {self.rank}" if self.rank is not None else f"{self.kind} keep {self.keep:g}"

    def rank_of(self, inp: int, out: int) -> int | None:
        """The rank (mpo: the bond dimension) for a linear [out, inp]; None for dense. Raises BenchmarkError if too high."""
        if self.kind == "dense":
            return None
        highest = highest_rank(self.kind, inp, out)
        if self.rank is None:
            return rank_for_keep(self.kind, inp, out, self.keep)
        if self.rank > highest:
            raise BenchmarkError(f"rank {self.rank} is too high: {self.kind} of {inp} x {out} goes up to {highest}")
        return self.rank


def highest_rank(kind: str, inp: int, out: int) -> int:
    if kind == "mpo":
        (o0, o1), (i0, i1) = balanced(out), balanced(inp)
        return min(o0 * i0, o1 * i1)
    return min(inp, out)


def rank_for_keep(kind: str, inp: int, out: int, keep: float, *, multiple: int = RANK_MULTIPLE) -> int:
    """The largest rank with at most keep * inp * out parameters, at least 1.

    Like the compressor's, a rank above `multiple` is rounded down to a multiple of it. Parameters at rank r:
    lowrank r (inp + out), interpolative r (inp + out - r), mpo of two cores with bond r: r (o0 i0 + o1 i1).
    """
    budget = keep * inp * out
    match kind:
        case "lowrank":
            rank = budget / (inp + out)
        case "interpolative":
            half = (inp + out) / 2
            rank = half - math.sqrt(max(0.0, half * half - budget))
        case "mpo":
            (o0, o1), (i0, i1) = balanced(out), balanced(inp)
            rank = budget / (o0 * i0 + o1 * i1)
        case _:
            raise BenchmarkError(f"a {kind} linear has no rank")
    # The small addend undoes a rounding error just below a whole number.
    whole = max(1, min(int(rank + 1e-9 * (inp + out)), highest_rank(kind, inp, out)))
    return whole if whole < multiple else whole // multiple * multiple


def balanced(n: int) -> tuple[int, int]:
    """The two factors of n that are closest to each other, the smaller first."""
    small = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return small, n // small


def core_shapes(how: Factorization, inp: int, out: int) -> list[tuple[int, int]]:
    """[rows, cols] of each core of a linear [out, inp], as in `LinearWeights`."""
    r = how.rank_of(inp, out)
    if r is None:
        return [(out, inp)]
    match how.kind:
        case "lowrank":
            return [(r, inp), (out, r)]
        case "interpolative":
            return [(r, inp), (out - r, r)]
    (o0, o1), (i0, i1) = balanced(out), balanced(inp)
    return [(o0 * r, i0), (o1, r * i1)]


def stored_bytes(how: Factorization, inp: int, out: int, store: str, group: int) -> int:
    """Bytes of what `RandomWeights.linear` returns: cores, scales and pivot. group: columns per int4 scale."""
    total = 4 * out if how.kind == "interpolative" else 0
    for rows, cols in core_shapes(how, inp, out):
        match store:
            case "int8":
                total += rows * (cols + 4)
            case "int4":
                total += rows * (-(-cols // 2) + 2 * -(-cols // group))
            case _:
                total += rows * cols * (4 if store == "fp32" else 2)
    return total


def flops_per_row(w: LinearWeights) -> int:
    """Multiplications and additions for one row of x, with the cores applied one after the other."""
    if w.kind != "mpo":
        return 2 * w.parameters
    total, done, left = 0, 1, math.prod(w.in_dims)
    for core, out, inp in zip(w.cores, w.out_dims, w.in_dims, strict=True):
        left //= inp
        total += 2 * done * left * core.shape[0] * core.shape[1]
        done *= out
    return total


@dataclass
class RandomWeights:
    """Draws weights on `device`. Each core continues in the pool where the last one ended."""

    device: str
    group: int = 64  # columns per int4 scale
    seed: int = 0
    _at: int = 0
    _pools: dict[str, torch.Tensor] = field(default_factory=dict)

    def group_of(self, inp: int, outs: tuple[int, ...], how: Factorization, store: str) -> list[LinearWeights]:
        """Linears over one input. Raises BenchmarkError for an unknown store or a rank that is too high."""
        return [self.linear(inp, out, how, store) for out in outs]

    def linear(self, inp: int, out: int, how: Factorization, store: str) -> LinearWeights:
        import torch

        from cai_runtime.kernels.weights import LinearWeights

        start = self._at
        cores = tuple(self.core(rows, cols, store) for rows, cols in core_shapes(how, inp, out))
        rank = how.rank_of(inp, out)
        match how.kind:
            case "dense":
                return LinearWeights("dense", inp, out, cores)
            case "lowrank":
                return LinearWeights("lowrank", inp, out, cores, rank=rank)
            case "interpolative":
                pivot = torch.randperm(out, generator=torch.Generator().manual_seed(start)).to(torch.int32)
                return LinearWeights("interpolative", inp, out, cores, rank=rank, pivot=pivot.to(self.device))
        bonds = (1, rank or 1, 1)
        return LinearWeights("mpo", inp, out, cores, out_dims=balanced(out), in_dims=balanced(inp), bonds=bonds)

    def core(self, rows: int, cols: int, store: str) -> Core:
        """A core [rows, cols] of mean about 0 and variance 1 / cols, so that outputs are as large as inputs."""
        import torch

        from cai_runtime.kernels.weights import Core

        scale = 1 / math.sqrt(max(cols, 1))
        if store == "int8":
            codes = self._draw("int8", rows * cols).view(rows, cols)
            return Core(codes, torch.full((rows,), scale / INT8_DEVIATION, device=self.device))
        if store == "int4":
            width = -(-cols // 2)
            codes = self._draw("uint8", rows * width).view(rows, width)
            if cols % 2:
                codes[:, -1] &= 15
            groups = torch.full((rows, -(-cols // self.group)), scale / INT4_DEVIATION, device=self.device)
            return Core(codes, groups.bfloat16(), group=self.group, columns=cols)
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        if store not in dtypes:
            raise BenchmarkError(f"unknown store {store!r}; there are: {', '.join(STORES)}")
        values = torch.empty(rows * cols, dtype=dtypes[store], device=self.device)
        return Core(self._fill(values, "float").view(rows, cols).mul_(scale))

    def _draw(self, what: str, count: int) -> torch.Tensor:
        import torch

        return self._fill(torch.empty(count, dtype=getattr(torch, what), device=self.device), what)

    def _fill(self, into: torch.Tensor, what: str) -> torch.Tensor:
        pool, done = self._pool(what), 0
        while done < len(into):
            take = min(len(into) - done, POOL - self._at)
            into[done : done + take] = pool[self._at : self._at + take]
            done, self._at = done + take, (self._at + take) % POOL
        return into

    def _pool(self, what: str) -> torch.Tensor:
        if what not in self._pools:
            import torch

            draw = torch.Generator(self.device).manual_seed(self.seed)
            if what == "float":
                pool = torch.empty(POOL, device=self.device).normal_(generator=draw)
            else:
                low, high, dtype = (-127, 128, torch.int8) if what == "int8" else (0, 256, torch.uint8)
                pool = torch.randint(low, high, (POOL,), dtype=dtype, device=self.device, generator=draw)
            self._pools[what] = pool
        return self._pools[what]
