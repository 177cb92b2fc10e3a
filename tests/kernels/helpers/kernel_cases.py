"""What the property tests of the kernels draw: backends, linears of every kind and store, rows laid out in every way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.weights import INT4_GROUPS, Core, LinearWeights

CPU = [f"cpu-{isa}" for isa in cpu_library.instruction_sets()]
BACKENDS = ["reference", *CPU]
INT4 = [f"int4-{group}{zero}" for group in INT4_GROUPS for zero in ("", "-zero")]
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORES = [*FLOATS, "int8", *INT4]
KINDS = ["dense", "lowrank", "interpolative", "mpo"]


def bounded(examples: int) -> settings:
    """The same examples in every run, so that a failure is the change's and never the day's."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@contextlib.contextmanager
def using(backend: str) -> Iterator[str]:
    """Choose a backend of BACKENDS, its instruction set too, for the block; yields the name that the API takes."""
    name, _, isa = backend.partition("-")
    if not isa:
        yield name
        return
    before = cpu_library.instruction_set()
    cpu_library.use_instruction_set(isa)
    try:
        yield name
    finally:
        cpu_library.use_instruction_set(before)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = cpu_library.num_threads()
    cpu_library.set_num_threads(n)
    try:
        yield
    finally:
        cpu_library.set_num_threads(before)


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits are the same: 0 differs from -0, NaN equals itself."""
    as_int = {4: torch.int32, 2: torch.int16, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(as_int), b.contiguous().view(as_int))


def random_core(rows: int, cols: int, store: str, g: torch.Generator) -> Core:
    """A matrix whose product with unit rows has about unit size. store: fp32, bf16, fp16, int8 or one of INT4."""
    w = torch.randn(rows, cols, generator=g) / max(cols, 1) ** 0.5
    if store in FLOATS:
        return Core(w.to(FLOATS[store]))
    if store == "int8":
        scale = w.abs().amax(1).clamp_min(1e-6) / 127 if cols else torch.ones(rows)
        return Core((w / scale[:, None]).round().to(torch.int8), scale)
    _, group_text, *with_zero = store.split("-")
    group = int(group_text)
    codes = torch.randint(0, 16, (rows, cols + cols % 2), dtype=torch.uint8, generator=g)
    if cols % 2:
        codes[:, -1] = 0
    groups = -(-cols // group)
    scale = ((torch.rand(rows, groups, generator=g) + 0.5) / (5 * max(cols, 1) ** 0.5)).to(torch.bfloat16)
    zero = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=g) if with_zero else None
    return Core(codes[:, ::2] | codes[:, 1::2] << 4, scale, zero, group, cols)


def random_linear(
    kind: str, inp: int, out: int, rank: int, stores: Sequence[str], bias: bool, g: torch.Generator
) -> LinearWeights:
    """stores: of core_0, core_1 and so on, repeated as needed. rank: at most out."""
    b = torch.randn(out, generator=g) if bias else None
    if kind == "dense":
        return LinearWeights("dense", inp, out, (random_core(out, inp, stores[0], g),), bias=b)
    if kind == "mpo":
        return random_mpo(inp, out, rank, stores, b, g)
    first = random_core(rank, inp, stores[0], g)
    if kind == "lowrank":
        return LinearWeights("lowrank", inp, out, (first, random_core(out, rank, stores[-1], g)), rank, bias=b)
    pivot = torch.randperm(out, generator=g).to(torch.int32)
    return LinearWeights(
        "interpolative", inp, out, (first, random_core(out - rank, rank, stores[-1], g)), rank, pivot, b
    )


def split_product(n: int) -> tuple[int, ...]:
    """n as two or three factors, as even as it comes; 7 -> (1, 7), 60 -> (2, 5, 6)."""
    factors: list[int] = []
    for parts in (3, 2):
        at = max(d for d in range(1, round(n ** (1 / parts)) + 1) if n % d == 0)
        if parts == 3 and at == 1:
            continue
        factors.append(at)
        n //= at
    return (*factors, n)


def random_mpo(
    inp: int, out: int, bond: int, stores: Sequence[str], bias: torch.Tensor | None, g: torch.Generator
) -> LinearWeights:
    ins, outs = split_product(inp), split_product(out)
    while len(ins) < len(outs):
        ins = (1, *ins)
    while len(outs) < len(ins):
        outs = (1, *outs)
    bonds = (1, *[min(bond, 9)] * (len(ins) - 1), 1)
    shapes = [(o * r, lft * i) for o, i, lft, r in zip(outs, ins, bonds[:-1], bonds[1:], strict=True)]
    cores = tuple(random_core(rows, cols, stores[k % len(stores)], g) for k, (rows, cols) in enumerate(shapes))
    return LinearWeights("mpo", inp, out, cores, None, None, bias, outs, ins, bonds)


def dense_matrix(w: LinearWeights) -> torch.Tensor:
    """W [out, in] in float64, written out from the format's definition."""
    cores = [c.values(torch.float64) for c in w.cores]
    match w.kind:
        case "dense":
            return cores[0]
        case "lowrank":
            return cores[1] @ cores[0]
        case "interpolative":
            assert w.pivot is not None
            matrix = torch.empty(w.out_features, w.in_features, dtype=torch.float64)
            matrix[w.pivot.long()] = torch.cat([cores[0], cores[1] @ cores[0]])
            return matrix
    chain = torch.ones(1, 1, 1, dtype=torch.float64)  # [out so far, in so far, bond]
    for core, o, i, left, right in zip(cores, w.out_dims, w.in_dims, w.bonds[:-1], w.bonds[1:], strict=True):
        chain = torch.einsum("abl,orli->aobir", chain, core.view(o, right, left, i))
        chain = chain.reshape(chain.shape[0] * o, -1, right)
    return chain[..., 0]


ODD_SIZES = [1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 100, 127, 129, 191, 200]
ROWS = [0, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 33, 64, 70, 130]


def sizes(most: int) -> st.SearchStrategy[int]:
    """1 to most, the edges of vectors and tiles often."""
    return st.sampled_from([n for n in ODD_SIZES if n <= most]) | st.integers(1, most)


@dataclass(frozen=True)
class LinearCase:
    """The recipe of a random linear: what a failing example prints."""

    kind: str
    inp: int
    out: int
    rank: int
    stores: tuple[str, ...]
    bias: bool
    seed: int

    def build(self) -> LinearWeights:
        g = torch.Generator().manual_seed(self.seed)
        return random_linear(self.kind, self.inp, self.out, self.rank, self.stores, self.bias, g)


@st.composite
def linears(draw: st.DrawFn, inp: int, stores: Sequence[str] = STORES, kinds: Sequence[str] = KINDS) -> LinearCase:
    out = draw(sizes(150))
    rank = draw(st.sampled_from([1, out]) | st.integers(1, out))
    two = draw(st.tuples(st.sampled_from(stores), st.sampled_from(stores)))
    return LinearCase(
        draw(st.sampled_from(kinds)), inp, out, rank, two, draw(st.booleans()), draw(st.integers(0, 2**31))
    )


@st.composite
def groups(draw: st.DrawFn, stores: Sequence[str] = STORES, kinds: Sequence[str] = KINDS) -> list[LinearCase]:
    """One to four members of any kind and store over one input."""
    inp = draw(sizes(200))
    return draw(st.lists(linears(inp, stores, kinds), min_size=1, max_size=4))


LAYOUTS = ["contiguous", "row stride", "column stride", "transposed", "one row expanded", "one column expanded"]


@st.composite
def tensors(
    draw: st.DrawFn, rows: int, cols: int, dtype: torch.dtype = torch.float32, layouts: Sequence[str] = LAYOUTS
) -> torch.Tensor:
    """[rows, cols] of about unit size, contiguous or a view of something else."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    match draw(st.sampled_from(layouts)):
        case "row stride":
            return normal(rows, cols + 5)[:, 3 : cols + 3]
        case "column stride":
            return normal(rows, 2 * cols)[:, ::2]
        case "transposed":
            return normal(cols, rows).T
        case "one row expanded":
            return normal(1, cols).expand(rows, cols)
        case "one column expanded":
            return normal(rows, 1).expand(rows, cols)
    return normal(rows, cols)
