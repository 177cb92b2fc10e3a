"""PTX types as numpy arrays. A register holds bits: an unsigned array over all threads, or of one element where every
thread has the same. Operands are read as a type, results written as one."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.program import Program, PtxError

if TYPE_CHECKING:
    from ptx.machine import Machine

Array = np.ndarray[Any, np.dtype[Any]]
Mask = Array | None  # None: every thread
Read = Callable[[list[Array]], Array]
Write = Callable[["Machine", Array, Mask], None]
Step = Callable[["Machine", Mask], None]

UNSIGNED = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16), 32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}
SIGNED = {8: np.dtype(np.int8), 16: np.dtype(np.int16), 32: np.dtype(np.int32), 64: np.dtype(np.int64)}
FLOATS = ("f64", "f32", "f16", "bf16", "f16x2", "bf16x2")


@functools.cache
def width(kind: str) -> int:
    """Bits of a type."""
    if kind == "pred":
        return 1
    number = re.fullmatch(r"(?:b|u|s|f|bf)(\d+)(x2)?", kind)
    if number is None:
        raise PtxError(f"unknown type {kind}")
    return int(number[1]) * (2 if number[2] else 1)


def bits_type(kind: str) -> np.dtype[Any]:
    return np.dtype(bool) if kind == "pred" else UNSIGNED[width(kind)]


def to_float(bits: Array, kind: str) -> Array:
    """Bits as numbers: float32 [n], or [n, 2] for pairs; float64 of f64."""
    if kind.endswith("x2"):
        return to_float(bits.view(np.uint16), kind[:-2]).reshape(-1, 2)
    if kind == "f64":
        return bits.view(np.float64)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float32) if kind == "f32" else bits.view(np.float16).astype(np.float32)


def from_float(x: Array, kind: str) -> Array:
    """Numbers as bits, rounded to nearest even."""
    if kind.endswith("x2"):
        return from_float(np.ascontiguousarray(x).reshape(-1), kind[:-2]).view(np.uint32)
    if kind == "f64":
        return x.astype(np.float64).view(np.uint64)
    x = x.astype(np.float32)
    if kind == "f32":
        return x.view(np.uint32)
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


class Slots:
    """Where registers, constants and special registers lie in a machine's list of arrays."""

    def __init__(self, program: Program):
        self._kinds = program.registers
        self._slots = {name: i for i, name in enumerate(program.registers)}
        # All bits set where nothing was written: NaN as a float, nowhere as an address.
        self.initial: list[Array] = [
            np.full(1, -1, SIGNED[width(kind)]).view(bits_type(kind)) if kind != "pred" else np.zeros(1, bool)
            for kind in program.registers.values()
        ]
        self.special: dict[str, int] = {}

    def _slot(self, name: str, kind: str) -> tuple[int, str]:
        """Of an operand, and the type it is kept as."""
        if name in self._kinds:
            return self._slots[name], self._kinds[name]
        if re.fullmatch(r"%\w+(\.[xyz])?", name):
            if name not in self.special:
                self.special[name] = self._add(np.zeros(1, np.uint32))
            return self.special[name], "b32"
        bits = width(kind)
        key = f"{name} as {bits} bits"
        if key not in self._slots:
            value = constant(name)
            stored = np.array([bool(value)]) if bits == 1 else np.array([value & (1 << bits) - 1], UNSIGNED[bits])
            self._slots[key] = self._add(stored)
        return self._slots[key], kind

    def _add(self, value: Array) -> int:
        self.initial.append(value)
        return len(self.initial) - 1

    def predicate(self, name: str) -> int:
        return self._slot(name, "pred")[0]

    def read(self, name: str, kind: str) -> Read:
        """How to read an operand as `kind`: integers in its dtype, floats as float32 (f64 as float64), pairs as [n, 2]."""
        slot, kept = self._slot(name, kind)
        wanted, there = width(kind), width(kept)
        if kind == "pred":
            return lambda registers: registers[slot]
        if wanted > there:
            raise PtxError(f"{name} has {there} bits and is read as {kind}")
        unsigned, signed, narrow = UNSIGNED[wanted], SIGNED[wanted], wanted < there
        if kind in FLOATS:
            return lambda registers: to_float(registers[slot].astype(unsigned) if narrow else registers[slot], kind)
        if narrow:
            view = signed if kind[0] == "s" else unsigned
            return lambda registers: registers[slot].astype(unsigned).view(view)
        if kind[0] == "s":
            return lambda registers: registers[slot].view(signed)
        return lambda registers: registers[slot]

    def write(self, name: str, kind: str) -> Write:
        """How to write a result of `kind`; a wider register gets its sign, or zeros, above it."""
        if name == "_":
            return lambda machine, value, mask: None
        if name not in self._kinds:
            raise PtxError(f"{name} is not a register")
        slot, kept = self._slot(name, kind)
        stored = bits_type(kept)
        if width(kind) > width(kept):
            raise PtxError(f"{name} has {width(kept)} bits and is written as {kind}")
        wider = width(kind) < width(kept)

        def write(machine: Machine, value: Array, mask: Mask) -> None:
            if kind in FLOATS:
                value = from_float(value, kind)
            if wider:
                value = value.astype(stored)
            elif value.dtype != stored:
                value = value.view(stored)
            if mask is not None:
                value = np.where(mask, value, machine.registers[slot])
            machine.registers[slot] = value

        return write


def constant(text: str) -> int:
    if text == "global_smem":
        return 0
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    raise PtxError(f"unknown operand {text}")


def vector(operand: str) -> list[str]:
    """The registers of `{a, b}`, or of a single one."""
    return [name.strip() for name in operand.strip("{} ").split(",")]
