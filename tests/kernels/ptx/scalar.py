"""Instructions that compute a result from registers, thread by thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.program import Instruction, PtxError
from ptx.values import FLOATS, SIGNED, UNSIGNED, Array, Mask, Slots, Step, vector, width

TINY = np.float32(2.0**-126)  # the smallest normal float32
ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
PLAIN_WORDS = {"rn", "ftz", "approx", "full", "lo", "uni"}


def _step(slots: Slots, target: str, kind: str, compute: Callable[..., Array], operands: list[tuple[str, str]]) -> Step:
    """Read the operands (name, type), compute, write."""
    reads = [slots.read(name, read_as) for name, read_as in operands]
    write = slots.write(target, kind)
    return lambda machine, mask: write(machine, compute(*(read(machine.registers) for read in reads)), mask)


def _check_words(instruction: Instruction, *more: str) -> None:
    unknown = set(instruction.words[1:-1]) - PLAIN_WORDS - set(more)
    if unknown:
        raise PtxError(f"unknown {', '.join(sorted(unknown))}")


def _flushed(x: Array) -> Array:
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def _wide(compute: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *values: compute(*(v.astype(np.float64) for v in values))


FLOAT: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": np.abs,
    "max": np.fmax,
    "min": np.fmin,
    "fma": _wide(lambda a, b, c: a * b + c),
    "mad": _wide(lambda a, b, c: a * b + c),
    "sqrt": _wide(np.sqrt),
    "rsqrt": _wide(lambda a: 1 / np.sqrt(a)),
    "rcp": _wide(lambda a: 1 / a),
    "ex2": _wide(np.exp2),
    "lg2": _wide(np.log2),
    "sin": _wide(np.sin),
    "cos": _wide(np.cos),
    "tanh": _wide(np.tanh),
}


def _float(instruction: Instruction, slots: Slots) -> Step:
    name, kind = instruction.words[0], instruction.words[-1]
    _check_words(instruction, "NaN")
    compute = FLOAT[name]
    if kind == "f64" and name not in ("add", "sub", "mul", "div", "neg", "abs", "max", "min"):
        raise PtxError("not known in float64, where numpy would round twice or by its own formula")
    if "NaN" in instruction.words:
        compute = {"max": np.maximum, "min": np.minimum}[name]
    if "ftz" in instruction.words:
        plain = compute
        compute = lambda *values: _flushed(plain(*map(_flushed, values)).astype(np.float32))  # noqa: E731
    target, *sources = instruction.operands
    return _step(slots, target, kind, compute, [(source, kind) for source in sources])


def _divided(a: Array, b: Array) -> Array:
    """Towards zero; by zero, anything: idle threads hold any divisor."""
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)


def _shifted_left(a: Array, by: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.where(by >= bits, a.dtype.type(0), a << np.minimum(by, bits - 1).astype(a.dtype))


def _shifted_right(a: Array, by: Array) -> Array:
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by >= bits, a.dtype.type(0), shifted)


def _extracted(a: Array, start: Array, length: Array) -> Array:
    """Bit field; its highest bit fills a signed result."""
    bits = a.dtype.itemsize * 8
    start, length = start.astype(np.int64) & 255, length.astype(np.int64) & 255
    if (start + length > bits).any() or (length == 0).any():
        raise PtxError("a bit field beyond its register")
    return (a << (bits - start - length).astype(a.dtype)) >> (bits - length).astype(a.dtype)


def _three_way(table: int) -> Callable[..., Array]:
    def compute(a: Array, b: Array, c: Array) -> Array:
        out = np.zeros(1, a.dtype)
        for i in range(8):
            if table >> i & 1:
                out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return out

    return compute


def _permuted(a: Array, b: Array, chosen: Array) -> Array:
    """Four of the eight bytes of a and b; a fourth selector bit spreads the byte's sign."""
    a, b, chosen = np.broadcast_arrays(a, b, chosen)
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(a.shape, np.uint32)
    for i in range(4):
        pick = (chosen >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (pick & np.uint32(7)))) & np.uint64(255)
        sign = np.where(byte > 127, np.uint64(255), np.uint64(0))
        out |= np.where(pick > 7, sign, byte).astype(np.uint32) << np.uint32(8 * i)
    return out


INTEGER: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "div": _divided,
    "rem": lambda a, b: a - _divided(a, b) * np.where(b == 0, b.dtype.type(1), b),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": np.abs,
    "max": np.maximum,
    "min": np.minimum,
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
}


def _integer(instruction: Instruction, slots: Slots) -> Step:
    name, kind = instruction.words[0], instruction.words[-1]
    target, *sources = instruction.operands
    if "wide" in instruction.words:
        double = f"{kind[0]}{2 * width(kind)}"
        wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * width(kind)]
        product = lambda a, b, *c: sum(c, a.astype(wide) * b.astype(wide))  # noqa: E731
        return _step(
            slots, target, double, product, [(s, kind) for s in sources[:2]] + [(s, double) for s in sources[2:]]
        )
    if "hi" in instruction.words:
        bits = width(kind)
        if bits == 64 or name != "mul":
            raise PtxError("a high half of 64 bits, or in a sum")
        types = SIGNED if kind[0] == "s" else UNSIGNED
        wide, narrow = types[2 * bits], types[bits]
        high = lambda a, b: (a.astype(wide) * b.astype(wide) >> wide.type(bits)).astype(narrow)  # noqa: E731
        return _step(slots, target, kind, high, [(s, kind) for s in sources])
    _check_words(instruction)
    return _step(slots, target, kind, INTEGER[name], [(source, kind) for source in sources])


def _arithmetic(instruction: Instruction, slots: Slots) -> Step:
    return (_float if instruction.words[-1] in FLOATS else _integer)(instruction, slots)


def _shift(instruction: Instruction, slots: Slots) -> Step:
    target, value, by = instruction.operands
    kind = instruction.words[-1]
    compute = _shifted_left if instruction.words[0] == "shl" else _shifted_right
    return _step(slots, target, kind, compute, [(value, kind), (by, "u32")])


def _funnel(instruction: Instruction, slots: Slots) -> Step:
    _, direction, mode, kind = instruction.words
    if mode != "wrap":
        raise PtxError("funnel shifts that wrap alone are known")

    def compute(low: Array, high: Array, by: Array) -> Array:
        both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        by = (by & np.uint32(31)).astype(np.uint64)
        return (both >> by if direction == "r" else both << by >> np.uint64(32)).astype(np.uint32)

    target, *sources = instruction.operands
    return _step(slots, target, kind, compute, [(s, "b32") for s in sources])


def _bit_field(instruction: Instruction, slots: Slots) -> Step:
    target, value, start, length = instruction.operands
    kind = instruction.words[-1]
    return _step(slots, target, kind, _extracted, [(value, kind), (start, "u32"), (length, "u32")])


def _table(instruction: Instruction, slots: Slots) -> Step:
    target, a, b, c, table = instruction.operands
    return _step(slots, target, "b32", _three_way(int(table, 0)), [(s, "b32") for s in (a, b, c)])


def _bytes(instruction: Instruction, slots: Slots) -> Step:
    if instruction.words != ("prmt", "b32"):
        raise PtxError("a permutation with a mode")
    target, *sources = instruction.operands
    return _step(slots, target, "b32", _permuted, [(s, "b32") for s in sources])


def _ordered_unequal(a: Array, b: Array) -> Array:
    return (a != b) & ~_unordered(a, b) if a.dtype.kind == "f" else a != b


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "lo": lambda a, b: a < b, "ls": lambda a, b: a <= b, "hi": lambda a, b: a > b, "hs": lambda a, b: a >= b,
    "eq": lambda a, b: a == b, "ne": _ordered_unequal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b), "equ": lambda a, b: (a == b) | _unordered(a, b), "neu": lambda a, b: a != b,
    "nan": _unordered, "num": lambda a, b: ~_unordered(a, b),
}  # fmt: skip


def _comparison(instruction: Instruction, slots: Slots) -> Step:
    _, how, *more, kind = instruction.words
    if set(more) - {"ftz"} or len(instruction.operands) != 3:
        raise PtxError("a comparison joined with another predicate")
    target, a, b = instruction.operands
    return _step(slots, target, "pred", COMPARISONS[how], [(a, kind), (b, kind)])


def _selection(instruction: Instruction, slots: Slots) -> Step:
    target, a, b, condition = instruction.operands
    kind = f"b{width(instruction.words[-1])}"
    return _step(slots, target, kind, lambda a, b, c: np.where(c, a, b), [(a, kind), (b, kind), (condition, "pred")])


def _move(instruction: Instruction, slots: Slots) -> Step:
    """Also splits a register into parts, and joins parts."""
    target, source = instruction.operands
    kind = instruction.words[-1]
    kind = kind if kind == "pred" else f"b{width(kind)}"
    if target.startswith("{"):
        parts = vector(target)
        part = f"b{width(kind) // len(parts)}"
        read, writes = slots.read(source, kind), [slots.write(name, part) for name in parts]

        def split(machine, mask: Mask) -> None:
            pieces = read(machine.registers).view(UNSIGNED[width(part)]).reshape(-1, len(parts))
            for i, write in enumerate(writes):
                write(machine, np.ascontiguousarray(pieces[:, i]), mask)

        return split
    if source.startswith("{"):
        parts = vector(source)
        part = f"b{width(kind) // len(parts)}"

        def join(*pieces: Array) -> Array:
            return np.stack(np.broadcast_arrays(*pieces), axis=-1).reshape(-1).view(UNSIGNED[width(kind)])

        return _step(slots, target, kind, join, [(name, part) for name in parts])
    return _step(slots, target, kind, lambda a: a, [(source, kind)])


def _conversion(instruction: Instruction, slots: Slots) -> Step:
    _, *how, to, of = instruction.words
    target, *sources = instruction.operands
    if set(how) - {"rn", "ftz", *ROUNDINGS}:
        raise PtxError(f"unknown {', '.join(how)}")
    if to.endswith("x2"):  # the first source is the upper half
        return _step(
            slots,
            target,
            to,
            lambda high, low: np.stack(np.broadcast_arrays(low, high), -1),
            [(s, of) for s in sources],
        )
    if to in FLOATS:
        return _step(slots, target, to, lambda a: a, [(sources[0], of)])
    dtype = (SIGNED if to[0] == "s" else UNSIGNED)[width(to)]
    if of in FLOATS:
        rounding = next(ROUNDINGS[word] for word in how if word in ROUNDINGS)
        limits = np.iinfo(dtype)

        def compute(x: Array) -> Array:
            whole = np.where(np.isnan(x), 0, rounding(x.astype(np.float64)))
            return np.clip(whole, float(limits.min), float(limits.max)).astype(dtype)

        return _step(slots, target, to, compute, [(sources[0], of)])
    return _step(slots, target, to, lambda a: a.astype(dtype), [(sources[0], of)])


INSTRUCTIONS = dict.fromkeys({*FLOAT, *INTEGER}, _arithmetic) | {
    "shl": _shift, "shr": _shift, "shf": _funnel, "bfe": _bit_field, "lop3": _table, "prmt": _bytes,
    "setp": _comparison, "selp": _selection, "mov": _move, "cvt": _conversion,
}  # fmt: skip
