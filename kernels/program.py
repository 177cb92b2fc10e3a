"""Recording a forward pass on the CPU kernels, to run it with one call: what a CUDA graph is on a GPU.

A model's blocks run once on a `Slot` in place of a tensor; each operation that meets one notes itself in the `Recorder` and
returns a new Slot. The finished `Program` runs the same operations over any number of rows, with no Python between them.
The arithmetic is that of the single calls, bit for bit.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library

# csrc/cpu/program.cpp: OpCode
RMS_NORM, LINEAR, ATTENTION, SWIGLU = range(4)
OP_FIELDS = 10


class NotRecordable(KernelError):
    """An operation of the pass runs only one call at a time; run the pass unrecorded."""


def bits(value: float) -> int:
    """A double's bits as the integer that carries it."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@dataclass(frozen=True)
class AttentionBatch:
    """Where each row of a step's flattened tokens belongs. All int32, on the model's device.

    T tokens of S sequences, sequence i owning rows query_start[i] to query_start[i + 1]. context_len counts a sequence's
    tokens in the cache after this step. A slot is page * page_size + offset.
    """

    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T]
    query_start: torch.Tensor  # [S + 1]
    context_len: torch.Tensor  # [S]
    page_table: torch.Tensor  # [S, P]


def batch_addresses(batch: AttentionBatch) -> torch.Tensor:
    """What C++ reads of a batch; `batch` must outlive it. Raises KernelError for tensors that are not int32 on the CPU."""
    tensors = (batch.positions, batch.slots, batch.query_start, batch.context_len, batch.page_table)
    for t in tensors:
        if t.dtype != torch.int32 or t.device.type != "cpu" or not t.is_contiguous():
            raise KernelError(
                f"a batch for the CPU kernels is of contiguous int32 on the CPU, not {t.dtype} {t.device}"
            )
    sizes = (batch.context_len.shape[0], batch.page_table.shape[1])
    return torch.tensor([*(t.data_ptr() for t in tensors), *sizes], dtype=torch.int64)


@dataclass(frozen=True)
class Slot:
    """A value of the recorded pass: [rows, width] fp32."""

    index: int
    width: int
    recorder: Recorder = field(repr=False, compare=False)


@dataclass
class Operation:
    code: int
    source: Slot
    target: Slot
    arguments: tuple[int, ...]
    residual: Slot | None = None


class Recorder:
    """Notes operations in order. `keep` holds on to whatever the noted addresses point to."""

    def __init__(self, width: int):
        self.slots = [Slot(0, width, self)]
        self.operations: list[Operation] = []
        self.scratch_columns = 0
        self.keep: list[object] = []

    @property
    def input(self) -> Slot:
        return self.slots[0]

    def note(
        self, code: int, source: Slot, width: int, *arguments: int, residual: Slot | None = None, keep: object = None
    ) -> Slot:
        target = Slot(len(self.slots), width, self)
        self.slots.append(target)
        self.operations.append(Operation(code, source, target, arguments, residual))
        self.keep.append(keep)
        return target


class Program:
    """A recorded pass, x [M, in] -> [M, out]."""

    def __init__(self, recorder: Recorder, result: Slot):
        if not recorder.operations or result.index == 0:
            raise KernelError("nothing was recorded")
        self.in_features, self.out_features = recorder.input.width, result.width
        self._keep = recorder.keep
        offsets, columns = _place(recorder.operations, result)
        self._workspace_columns = columns + recorder.scratch_columns
        # In C++ slot 0 is the input and slot 1 the output; the rest follow.
        order = [s for s in recorder.slots if s.index not in (0, result.index)]
        number = {0: 0, result.index: 1, **{s.index: i + 2 for i, s in enumerate(order)}}
        fields = [len(recorder.slots), len(recorder.operations), columns]
        fields += [0, self.in_features, 0, self.out_features]
        for s in order:
            fields += [offsets[s.index], s.width]
        for o in recorder.operations:
            entry = [o.code, number[o.source.index], number[o.target.index], *o.arguments]
            if o.code == LINEAR:
                entry.append(-1 if o.residual is None else number[o.residual.index])
            fields += entry + [0] * (OP_FIELDS - len(entry))
        self._fields = torch.tensor(fields, dtype=torch.int64)
        self._run = cpu_library.function("run_program")

    def __call__(self, x: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        x = cpu_library.check_rows(x, self.in_features, "program").contiguous()
        rows = x.shape[0]
        out = torch.empty(rows, self.out_features)
        places = batch_addresses(batch)
        if len(batch.positions) != rows or len(batch.slots) != rows:
            raise KernelError(f"{rows} rows, but {len(batch.positions)} positions and {len(batch.slots)} slots")
        fields, workspace = self._fields.data_ptr(), torch.empty(rows * self._workspace_columns)
        try:
            self._run(fields, x.data_ptr(), rows, out.data_ptr(), workspace.data_ptr(), places.data_ptr())
        except (IndexError, ValueError) as e:
            raise KernelError(str(e)) from None
        return out


def _place(operations: list[Operation], result: Slot) -> tuple[dict[int, int], int]:
    """Column offsets in the workspace, shared by slots that are not alive together, and the columns needed in all.

    First fit in order of creation. The input and the result are the caller's memory.
    """
    last: dict[int, int] = {}
    for i, o in enumerate(operations):
        last[o.target.index] = max(last.get(o.target.index, i), i)
        for s in (o.source, o.residual):
            if s is not None:
                last[s.index] = i
    alive: list[tuple[int, int, int]] = []  # (offset, width, last use)
    offsets: dict[int, int] = {}
    columns = 0
    for i, o in enumerate(operations):
        if o.target.index == result.index:
            continue
        alive = sorted(a for a in alive if a[2] >= i)
        width = -(-o.target.width // 16) * 16
        at = 0
        for start, size, _ in alive:
            if at + width <= start:
                break
            at = max(at, start + size)
        offsets[o.target.index] = at
        alive.append((at, width, last[o.target.index]))
        columns = max(columns, at + width)
    return offsets, columns


def record(function: Callable[[Slot], Slot], width: int) -> Program:
    """Run `function` on a slot of `width` columns and make a program of what it did."""
    recorder = Recorder(width)
    return Program(recorder, function(recorder.input))
