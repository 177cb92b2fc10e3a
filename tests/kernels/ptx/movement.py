"""Loads, stores, asynchronous copies to shared memory, and what the threads of a warp exchange."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ptx.program import Instruction, PtxError
from ptx.values import SIGNED, UNSIGNED, Array, Mask, Read, Slots, Step, bits_type, vector, width

HINTS = {"nc", "weak", "relaxed", "volatile", "L1::evict_last", "L1::evict_first", "L1::no_allocate", "L2::cache_hint",
         "ca", "cg", "cs", "wt", "wb"}  # fmt: skip


def address(slots: Slots, operand: str, kind: str) -> Read:
    """Of `[register + offset]`, in the dtype of `kind`, u32 or u64."""
    found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
    if found is None:
        raise PtxError(f"unknown address {operand}")
    read, dtype = slots.read(found[1], kind), UNSIGNED[width(kind)]
    offset = np.array([int(found[2] or "0", 0)], np.int64).astype(dtype)
    return lambda registers: registers_sum(read(registers), offset)


def registers_sum(a: Array, b: Array) -> Array:
    return a + b if b[0] else a


def spread(machine, value: Array) -> Array:
    """One element for each thread."""
    return np.broadcast_to(value, (machine.threads,))


def chosen(machine, mask: Mask) -> Array:
    """The numbers of the threads that take part."""
    return machine.every if mask is None else np.nonzero(np.broadcast_to(mask, (machine.threads,)))[0]


def _space(instruction: Instruction) -> tuple[bool, int, str]:
    """Whether shared memory; how many elements a thread moves, of which type."""
    _, space, *more, kind = instruction.words
    shared = space in ("shared", "shared::cta")
    vectors = [word for word in more if re.fullmatch(r"v[248]", word)]
    unknown = set(more) - set(vectors) - HINTS
    if unknown or not (shared or space == "global"):
        raise PtxError(f"unknown {', '.join(sorted(unknown)) or space}")
    return shared, int(vectors[0][1:]) if vectors else 1, kind


def _load(instruction: Instruction, slots: Slots) -> Step:
    if instruction.words[1] == "param":
        return _parameter(instruction, slots)
    shared, count, kind = _space(instruction)
    targets = vector(instruction.operands[0])
    kind = kind if kind[0] == "s" else f"b{width(kind)}"
    at, writes = (
        address(slots, instruction.operands[1], "u32" if shared else "u64"),
        [slots.write(t, kind) for t in targets],
    )
    dtype = SIGNED[width(kind)] if kind[0] == "s" else UNSIGNED[width(kind)]
    if len(targets) != count:
        raise PtxError(f"{len(targets)} registers for {count} elements")

    def load(machine, mask: Mask) -> None:
        memory, threads = machine.shared if shared else machine.global_memory(), chosen(machine, mask)
        offsets = memory.offsets(spread(machine, at(machine.registers))[threads], threads, count * dtype.itemsize)
        for write, value in zip(writes, memory.load(offsets, dtype, count), strict=True):
            if mask is not None:
                whole = np.zeros(machine.threads, dtype)
                whole[threads] = value
                value = whole
            write(machine, value, mask)

    return load


def _parameter(instruction: Instruction, slots: Slots) -> Step:
    target, source = instruction.operands
    kind, name = instruction.words[-1], source.strip("[] ")
    write = slots.write(target, kind)
    dtype = SIGNED[width(kind)] if kind[0] == "s" else bits_type(f"b{width(kind)}")
    kind_is_float = kind == "f32"

    def load(machine, mask: Mask) -> None:
        value = np.array([machine.parameters[name]], np.uint64).astype(dtype)
        write(machine, value.view(np.float32) if kind_is_float else value, mask)

    return load


def _store(instruction: Instruction, slots: Slots) -> Step:
    shared, count, kind = _space(instruction)
    at = address(slots, instruction.operands[0], "u32" if shared else "u64")
    reads = [slots.read(name, f"b{width(kind)}") for name in vector(instruction.operands[1])]
    if len(reads) != count:
        raise PtxError(f"{len(reads)} registers for {count} elements")

    def store(machine, mask: Mask) -> None:
        memory, threads = machine.shared if shared else machine.global_memory(), chosen(machine, mask)
        offsets = memory.offsets(spread(machine, at(machine.registers))[threads], threads, count * width(kind) // 8)
        memory.store(offsets, [spread(machine, read(machine.registers))[threads] for read in reads])

    return store


@dataclass
class Copy:
    """A copy to shared memory under way: of some threads, each in the group it had open then."""

    threads: Array
    groups: Array
    offsets: Array
    data: Array  # [threads, bytes]


def _copy(instruction: Instruction, slots: Slots) -> Step:
    """cp.async: what is read lands in shared memory when its group is waited for, never before."""
    words = instruction.words
    if words[1] != "async":
        raise PtxError("a copy that is not cp.async")
    if words[2] == "commit_group":
        return _commit
    if words[2] in ("wait_group", "wait_all"):
        return _wait(int(instruction.operands[0]) if words[2] == "wait_group" else -1)
    if words[2] not in ("ca", "cg") or words[3:5] != ("shared", "global"):
        raise PtxError("an unknown asynchronous copy")
    to, of = address(slots, instruction.operands[0], "u32"), address(slots, instruction.operands[1], "u64")
    size = int(instruction.operands[2], 0)
    read_size = slots.read(instruction.operands[3] if len(instruction.operands) > 3 else str(size), "u32")
    dtype = {4: np.dtype(np.uint32), 8: np.dtype(np.uint64), 16: np.dtype("V16")}[size]

    def copy(machine, mask: Mask) -> None:
        threads = chosen(machine, mask)
        used = spread(machine, read_size(machine.registers))[threads]
        if ((used != 0) & (used != size)).any():
            raise PtxError("a copy with a part of its source")
        offsets = machine.shared.offsets(spread(machine, to(machine.registers))[threads], threads, size)
        data = np.zeros(len(threads), dtype)
        sources = spread(machine, of(machine.registers))[threads][used > 0]
        memory = machine.global_memory()
        data[used > 0] = memory.load(memory.offsets(sources, threads[used > 0], size), dtype, 1)[0]
        machine.copies.append(Copy(threads, machine.groups[threads], offsets, data))

    return copy


def _commit(machine, mask: Mask) -> None:
    machine.groups[chosen(machine, mask)] += 1


def _wait(left: int):
    """All groups but the last `left` are done; with -1, also what no group holds yet."""

    def wait(machine, mask: Mask) -> None:
        waiting = np.zeros(machine.threads, bool)
        waiting[chosen(machine, mask)] = True
        kept = []
        for copy in machine.copies:
            done = waiting[copy.threads] & (copy.groups < machine.groups[copy.threads] - left)
            machine.shared.store(copy.offsets[done], [copy.data[done]])
            if not done.all():
                kept.append(Copy(copy.threads[~done], copy.groups[~done], copy.offsets[~done], copy.data[~done]))
        machine.copies = kept

    return wait


def _shuffle(instruction: Instruction, slots: Slots) -> Step:
    _, _, mode, kind = instruction.words
    target, value, by, clamp, members = instruction.operands
    if (
        clamp != ("0" if mode == "up" else "31")
        or members != "-1"
        or mode not in ("bfly", "idx", "up")
        or "|" in target
    ):
        raise PtxError("an unknown shuffle")
    read, read_by, write = slots.read(value, kind), slots.read(by, "u32"), slots.write(target, kind)

    def shuffle(machine, mask: Mask) -> None:
        machine.need_whole_warps(mask)
        by = spread(machine, read_by(machine.registers)).astype(np.int64)
        lane = machine.every % 32
        if mode == "up":  # the first lanes keep their own
            from_lane = np.where(lane >= by, lane - by, lane)
        else:
            from_lane = (lane ^ by if mode == "bfly" else by) & 31
        source = machine.every - lane + from_lane
        write(machine, spread(machine, read(machine.registers))[source], mask)

    return shuffle


REDUCTIONS = {"max": np.max, "min": np.min, "add": np.sum, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce}


def _reduction(instruction: Instruction, slots: Slots) -> Step:
    _, _, name, kind = instruction.words
    target, value, members = instruction.operands
    reduce, read, write = REDUCTIONS[name], slots.read(value, kind), slots.write(target, kind)
    read_members = slots.read(members, "b32")

    def reduction(machine, mask: Mask) -> None:
        machine.need_whole_warps(mask)
        if (read_members(machine.registers) != 0xFFFFFFFF).any():
            raise PtxError("a reduction over a part of a warp")
        values = spread(machine, read(machine.registers)).reshape(-1, 32)
        write(machine, np.repeat(reduce(values, axis=1).astype(values.dtype), 32), mask)

    return reduction


INSTRUCTIONS = {"ld": _load, "st": _store, "cp": _copy, "shfl": _shuffle, "redux": _reduction}
