"""Matrix instructions, all warps at once. The layouts of fragments are those of the PTX ISA, sections 9.7.14 and 9.7.15."""

from __future__ import annotations

import re

import numpy as np

from ptx.movement import address, chosen, spread
from ptx.program import Instruction, PtxError
from ptx.values import Array, Mask, Slots, Step, to_float, vector

LANE = np.arange(32)
GROUP, IN_GROUP = LANE // 4, LANE % 4  # of a lane: its row of a fragment, its place in that row


def _read_fragment(machine, reads) -> Array:
    """Registers as [warps, registers, 32]."""
    return np.stack([spread(machine, read(machine.registers)).reshape(-1, 32) for read in reads], axis=1)


def _matrix(registers: Array, kind: str, rows: int) -> Array:
    """Operand fragments [warps, registers, 32] as [warps, rows, K] in float64. A register holds 4 bytes of a row; each
    further one lies 8 rows below (of the first operand), or 16 bytes to the right."""
    dtype = {"s8": np.int8, "f16": np.uint16, "bf16": np.uint16}[kind]
    elements = np.ascontiguousarray(registers).view(dtype)
    values = elements if kind == "s8" else to_float(elements, kind)
    each = 4 // np.dtype(dtype).itemsize
    values = values.reshape(len(registers), registers.shape[1], 8, 4 * each)  # [warps, registers, row, 16 bytes]
    below = rows // 8
    values = values.reshape(len(registers), -1, below, 8, 4 * each).transpose(0, 2, 3, 1, 4)
    return values.reshape(len(registers), rows, -1).astype(np.float64)


def _mma(instruction: Instruction, slots: Slots) -> Step:
    """mma.sync m16n8k16 of halves and m16n8k32 of bytes: D [16, 8] = A [16, K] B [K, 8] + C."""
    words = [word for word in instruction.words if word != "satfinite"]
    _, _, _, shape, a_layout, b_layout, result, kind, b_kind, total = words
    known = {"bf16": ("m16n8k16", "f32"), "f16": ("m16n8k16", "f32"), "s8": ("m16n8k32", "s32")}
    if (
        kind != b_kind
        or known.get(kind) != (shape, result)
        or total != result
        or (a_layout, b_layout) != ("row", "col")
    ):
        raise PtxError("an unknown matrix instruction")
    to, a, b, c = (vector(operand) for operand in instruction.operands)
    whole = "b32" if kind == "s8" else "f32"
    reads_a, reads_b = ([slots.read(name, "b32") for name in names] for names in (a, b))
    reads_c = [slots.read(name, "s32" if kind == "s8" else "f32") for name in c]
    writes = [slots.write(name, whole) for name in to]

    def multiply(machine, mask: Mask) -> None:
        machine.need_whole_warps(mask)
        left = _matrix(_read_fragment(machine, reads_a), kind, 16)
        right = _matrix(_read_fragment(machine, reads_b), kind, 8)
        product = left @ right.transpose(0, 2, 1)
        # Of D, a lane holds two neighbours of its row, then two of the row 8 below.
        pairs = product.reshape(-1, 2, 8, 4, 2).transpose(0, 1, 4, 2, 3).reshape(-1, 4, 32)
        result = pairs + _read_fragment(machine, reads_c)
        result = result.astype(np.int64).astype(np.int32) if kind == "s8" else result.astype(np.float32)
        for i, write in enumerate(writes):
            write(machine, np.ascontiguousarray(result[:, i]).reshape(-1), mask)

    return multiply


def _tiles(instruction: Instruction, operand: str, slots: Slots):
    """Of ldmatrix and stmatrix: how many 8 x 8 matrices, whether transposed, and where their rows start."""
    words = instruction.words
    count, transposed = int(words[4][1:]), "trans" in words
    if words[3] != "m8n8" or words[-1] != "b16":
        raise PtxError("an unknown tile of shared memory")
    read = address(slots, operand, "u32")

    def offsets(machine, mask: Mask) -> tuple[Array, Array]:
        """The warps that take part, and [warps, matrices, 8]: lane 8 j + i has the address of row i of matrix j."""
        machine.need_whole_warps(mask)
        warps = chosen(machine, mask)[::32] // 32
        lanes = machine.every.reshape(-1, 32)[warps, : 8 * count].reshape(-1)
        found = machine.shared.offsets(spread(machine, read(machine.registers))[lanes], lanes, 16)
        return warps, found.reshape(-1, count, 8)

    return count, transposed, offsets


def _load_matrix(instruction: Instruction, slots: Slots) -> Step:
    count, transposed, offsets = _tiles(instruction, instruction.operands[1], slots)
    writes = [slots.write(name, "b32") for name in vector(instruction.operands[0])]

    def load(machine, mask: Mask) -> None:
        warps, at = offsets(machine, mask)
        tiles = machine.shared.bytes.view(np.uint16)[at[..., None] // 2 + np.arange(8)]  # [warps, matrices, 8, 8]
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        registers = np.zeros((count, machine.threads // 32, 32), np.uint32)
        registers[:, warps] = np.ascontiguousarray(tiles).view(np.uint32).reshape(-1, count, 32).swapaxes(0, 1)
        for write, value in zip(writes, registers, strict=True):
            write(machine, value.reshape(-1), mask)

    return load


def _store_matrix(instruction: Instruction, slots: Slots) -> Step:
    count, transposed, offsets = _tiles(instruction, instruction.operands[0], slots)
    reads = [slots.read(name, "b32") for name in vector(instruction.operands[1])]

    def store(machine, mask: Mask) -> None:
        warps, at = offsets(machine, mask)
        tiles = np.ascontiguousarray(_read_fragment(machine, reads)[warps]).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        machine.shared.store((at[..., None] + 2 * np.arange(8)).reshape(-1), [np.ascontiguousarray(tiles).reshape(-1)])

    return store


WARP_GROUP = 128  # threads


def _described(machine, descriptor: Array, rows: int, mask: Mask, across: bool = False) -> Array:
    """What a wgmma descriptor of each warp group names in shared memory: [groups, rows, 32] bytes along K, swizzled. across:
    16-bit elements that lie along the rows rather than along K. Anything for groups that take no part."""
    descriptor = np.where(True if mask is None else mask, descriptor, descriptor[chosen(machine, mask)[0]])
    firsts = descriptor[::WARP_GROUP]
    start, leading, stride = (
        (firsts >> np.uint64(shift) & np.uint64(0x3FFF)).astype(np.int64)[:, None, None] * 16 for shift in (0, 16, 32)
    )
    swizzle = (firsts >> np.uint64(62)).astype(np.int64)
    if (swizzle == 0).any() or (swizzle != swizzle[0]).any():
        raise PtxError("a wgmma operand without swizzle, or with several")
    pitch = 256 >> swizzle[0]  # bytes of the pattern's rows: 128, 64 or 32
    row, column = np.arange(rows)[:, None], np.arange(32)
    if across:  # the pattern holds eight steps of K; `leading` is the way to the next pitch of rows
        k, byte = column // 2, 2 * row + column % 2
        at = start + byte // pitch * leading + byte % pitch + k // 8 * stride + k % 8 * pitch
    else:
        at = start + row // 8 * stride + row % 8 * pitch + column
    at = at ^ (at >> 7 & (7 >> (swizzle[0] - 1))) << 4
    threads = np.repeat(np.arange(len(firsts)) * WARP_GROUP, rows * 32)
    return machine.shared.bytes[machine.shared.offsets(at.reshape(-1), threads, 1)].reshape(at.shape)


def _keep(slots: Slots, operand: str):
    """Whether the sum so far is kept: a predicate, or a number."""
    if operand in ("0", "1"):
        constant = np.array([operand == "1"])
        return lambda registers: constant
    return slots.read(operand, "pred")


def _wgmma(instruction: Instruction, slots: Slots) -> Step:
    """wgmma m64nNk32 of int8 and m64nNk16 of halves: 64 rows to a warp group; the first operand in shared memory or in
    registers, the second in shared memory."""
    words, operands = instruction.words, instruction.operands
    if words[1] != "mma_async":
        return lambda machine, mask: None  # products are done at once, so fences and waits have nothing to do
    kind = words[6]
    shape = re.fullmatch(r"m64n(\d+)k32" if kind == "s8" else r"m64n(\d+)k16", words[4])
    known = {"s8": "s32", "bf16": "f32", "f16": "f32"}
    if shape is None or known.get(kind) != words[5] or words[5:] != (words[5], kind, kind):
        raise PtxError("an unknown matrix instruction")
    in_registers = operands[1].startswith("{")
    flags = [int(flag) for flag in operands[4:]]
    across = (False, False) if kind == "s8" else (not in_registers and flags[2] == 1, flags[-1] == 1)
    if any(flag != 1 for flag in flags[: 0 if kind == "s8" else 2]):
        raise PtxError("a negated operand")
    columns, names = int(shape[1]), vector(operands[0])
    whole = "s32" if kind == "s8" else "f32"
    reads, writes = [slots.read(name, whole) for name in names], [slots.write(name, whole) for name in names]
    reads_a = [slots.read(name, "b32") for name in vector(operands[1])] if in_registers else []
    read_a = None if in_registers else slots.read(operands[1], "b64")
    read_b, keep = slots.read(operands[2], "b64"), _keep(slots, operands[3])

    def from_shared(machine, read, rows: int, across: bool, mask: Mask) -> Array:
        found = _described(machine, spread(machine, read(machine.registers)), rows, mask, across)
        numbers = found.view(np.int8) if kind == "s8" else to_float(np.ascontiguousarray(found).view(np.uint16), kind)
        return numbers.astype(np.float64)

    def multiply(machine, mask: Mask) -> None:
        machine.need_whole_warps(mask)
        if machine.block_threads % WARP_GROUP != 0:
            raise PtxError("wgmma without whole warp groups")
        if read_a is None:
            left = _matrix(_read_fragment(machine, reads_a), kind, 16).reshape(-1, 64, 16)
        else:
            left = from_shared(machine, read_a, 64, across[0], mask)
        right = from_shared(machine, read_b, columns, across[1], mask)
        product = left @ right.transpose(0, 2, 1)
        # Warp w has rows 16 w on; of 8 columns at a time, the fragment of mma.
        pairs = (
            product.reshape(-1, 4, 2, 8, columns // 8, 4, 2).transpose(0, 1, 4, 2, 6, 3, 5).reshape(-1, len(names), 32)
        )
        kept = spread(machine, keep(machine.registers)).reshape(-1, 1, 32)
        result = np.where(kept, _read_fragment(machine, reads), 0) + pairs
        result = result.astype(np.int64).astype(np.int32) if kind == "s8" else result.astype(np.float32)
        for i, write in enumerate(writes):
            write(machine, np.ascontiguousarray(result[:, i]).reshape(-1), mask)

    return multiply


INSTRUCTIONS = {"mma": _mma, "wgmma": _wgmma, "ldmatrix": _load_matrix, "stmatrix": _store_matrix}
