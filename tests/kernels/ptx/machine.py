"""Executes a program: threads in lockstep, parted where branches part them, together again where their ways meet."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ptx import matrix, movement, scalar
from ptx.memory import Global, Shared
from ptx.program import Instruction, Program, PtxError, parse
from ptx.values import Array, Mask, Slots, Step

INSTRUCTIONS = scalar.INSTRUCTIONS | movement.INSTRUCTIONS | matrix.INSTRUCTIONS
# Order memory accesses, which here are in order, or advise.
NOTHING = {"fence", "membar", "griddepcontrol", "discard", "prefetch", "nanosleep"}
THREADS = 2048  # of the blocks that run together


@dataclass(frozen=True)
class Decoded:
    instruction: Instruction
    step: Step | None
    predicate: int | None
    target: int | None = None  # of a branch


class Code:
    """A program whose instructions are found and whose operands have places."""

    def __init__(self, program: Program):
        self.program = program
        self.slots = Slots(program)
        self.instructions = [self._decoded(instruction) for instruction in program.instructions]
        self.waits = any(i.words[:2] == ("griddepcontrol", "wait") for i in program.instructions)

    def _decoded(self, instruction: Instruction) -> Decoded:
        try:
            predicate = None if instruction.predicate is None else self.slots.predicate(instruction.predicate)
            name = instruction.words[0]
            if name == "bra":
                return Decoded(instruction, None, predicate, self.program.labels[instruction.operands[0]])
            if name in ("ret", "exit", "bar", "barrier", *NOTHING):
                return Decoded(instruction, None, predicate)
            if name not in INSTRUCTIONS:
                raise PtxError("unknown instruction")
            return Decoded(instruction, INSTRUCTIONS[name](instruction, self.slots), predicate)
        except (PtxError, KeyError, ValueError, IndexError) as error:
            raise PtxError(f"{instruction.text}: {error}") from error


@functools.lru_cache(maxsize=256)
def code_of(ptx: str) -> Code:
    return Code(parse(ptx))


class Machine:
    """Some blocks of a launch."""

    def __init__(self, code: Code, memory: Global, parameters: Mapping[str, int], blocks: list[tuple[int, ...]],
                 grid: tuple[int, ...], shared_bytes: int):  # fmt: skip
        self.block_threads = code.program.threads
        self.threads = len(blocks) * self.block_threads
        self.every = np.arange(self.threads)
        self.memory, self.parameters = memory, parameters
        self.shared = Shared(shared_bytes, len(blocks), self.block_threads)
        self.registers = list(code.slots.initial)
        self.copies: list[movement.Copy] = []
        self.groups = np.zeros(self.threads, np.int64)
        self._code = code
        self._waited = not code.waits
        self._live = np.ones(self.threads, bool)
        thread = self.every % self.block_threads
        special = {"%tid.x": thread, "%laneid": thread % 32, "%warpid": thread // 32, "%ntid.x": self.block_threads}
        for i, axis in enumerate("xyz"):
            special |= {f"%ctaid.{axis}": np.repeat([b[i] for b in blocks], self.block_threads)}
            special |= {f"%nctaid.{axis}": grid[i]}
        for name, slot in code.slots.special.items():
            if name not in special:
                raise PtxError(f"unknown register {name}")
            self.registers[slot] = np.atleast_1d(np.asarray(special[name])).astype(np.uint32)

    def global_memory(self) -> Global:
        """Raises PtxError for a kernel that has yet to wait for the one ahead of it."""
        if not self._waited:
            raise PtxError("global memory before griddepcontrol.wait")
        return self.memory

    def need_whole_warps(self, mask: Mask) -> None:
        """Raises PtxError if a warp takes part with some of its threads only."""
        if mask is not None:
            warps = np.broadcast_to(mask, (self.threads,)).reshape(-1, 32)
            if (warps.any(axis=1) != warps.all(axis=1)).any():
                raise PtxError("a part of a warp takes part")

    def run(self) -> None:
        """Of the groups of threads that are at different instructions, the one furthest behind goes on."""
        waiting: dict[int, Array] = {0: np.ones(self.threads, bool)}
        while waiting:
            at = min(waiting)
            active = waiting.pop(at)
            self._run(at, active, waiting)

    def _run(self, at: int, active: Array, waiting: dict[int, Array]) -> None:
        """Until the threads part, end, or meet others."""
        meeting = min(waiting, default=len(self._code.instructions))
        everyone: Mask = None if active.all() else active
        while at < meeting:
            decoded = self._code.instructions[at]
            at += 1
            mask = everyone
            if decoded.predicate is not None:
                taken = self.registers[decoded.predicate]
                taken = ~taken if decoded.instruction.negated else taken
                if not taken.all():
                    mask = taken if mask is None else mask & taken
                    if not mask.any():
                        continue
            if decoded.step is not None:
                try:
                    decoded.step(self, mask)
                except (PtxError, ValueError, TypeError, IndexError) as error:
                    raise PtxError(f"{decoded.instruction.text}: {error}") from error
                continue
            name = decoded.instruction.words[0]
            if name in ("bar", "barrier"):
                self._need_whole_blocks(mask)
            elif name == "griddepcontrol":
                self._waited |= decoded.instruction.words[1] == "wait"
            elif name not in NOTHING:
                goes = active if mask is None else active & np.broadcast_to(mask, active.shape)
                if decoded.target is not None:
                    waiting[decoded.target] = waiting.get(decoded.target, False) | goes
                else:
                    self._live &= ~goes
                if (stays := active & ~goes).any():
                    waiting[at] = waiting.get(at, False) | stays
                return
        if at < len(self._code.instructions):
            waiting[at] = waiting.get(at, False) | active

    def _need_whole_blocks(self, mask: Mask) -> None:
        if mask is None:
            return
        there = np.broadcast_to(mask, (self.threads,)).reshape(-1, self.block_threads)
        live = self._live.reshape(-1, self.block_threads)
        if ((there != live).any(axis=1) & there.any(axis=1)).any():
            raise PtxError("a part of a block is at a barrier")


def run(ptx: str, memory: Global, parameters: list[int], grid: tuple[int, int, int], shared_bytes: int) -> None:
    """Execute a whole launch. parameters: the bits of each, in order."""
    code = code_of(ptx)
    if len(parameters) != len(code.program.parameters):
        raise PtxError(f"{len(parameters)} parameters, the kernel takes {len(code.program.parameters)}")
    named = dict(zip(code.program.parameters, parameters, strict=True))
    blocks = list(itertools.product(*(range(n) for n in grid)))
    together = max(1, THREADS // code.program.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), together):
            Machine(code, memory, named, blocks[first : first + together], grid, shared_bytes).run()
