"""Recording a forward pass on the CPU kernels, to run it with one call: what a CUDA graph is on a GPU.

A model's pass runs once on `Value`s in place of tensors. Each operation that meets a Value notes itself in the `Recorder`
and returns a new Value. The finished `Program` runs the same operations over any number of rows, with no Python between
them. The arithmetic is that of the single calls, bit for bit. csrc/cpu/program.h says how C++ learns a new operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.batch import AttentionBatch


class Axis(IntEnum):
    """What the rows of a value are. csrc/cpu/program.h: Axis."""

    TOKENS = 0  # the flattened tokens of a step
    SEQUENCES = 1
    WANTED = 2  # rows whose logits are wanted
    ENCODER = 3  # positions of an encoder's output
    EXPERT = 4  # rows dealt to experts


TYPE_CODES = {torch.float32: 0, torch.int32: 1}  # csrc/cpu/program.h: ValueType; both take four bytes


class NotRecordable(KernelError):
    """An operation of the pass runs only one call at a time; run the pass unrecorded."""


@dataclass(frozen=True)
class Value:
    """A matrix of the recorded pass, [rows, width], contiguous. A step says how many rows an axis has."""

    index: int
    axis: Axis
    width: int
    dtype: torch.dtype
    recorder: Recorder = field(repr=False, compare=False)


@dataclass(frozen=True)
class Input:
    """What a program takes at each run: a tensor [rows, width], contiguous, on the CPU."""

    axis: Axis
    width: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Operation:
    """One noted operation. attributes: numbers and texts. bindings: tensors that stay where they are."""

    name: str
    inputs: tuple[Value, ...]
    output: Value
    attributes: Mapping[str, int | float | str]
    bindings: Mapping[str, torch.Tensor]


class Recorder:
    """Notes operations in order. `keep` holds on to what their bindings point to."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.operations: list[Operation] = []
        self.groups: list[str] = []
        self.keep: list[object] = []

    def value(self, axis: Axis, width: int, dtype: torch.dtype = torch.float32) -> Value:
        if dtype not in TYPE_CODES:
            raise KernelError(f"a value of a recorded pass is float32 or int32, not {dtype}")
        self.values.append(Value(len(self.values), axis, width, dtype, self))
        return self.values[-1]

    def note(
        self,
        name: str,
        inputs: Sequence[Value],
        width: int,
        *,
        axis: Axis | None = None,
        dtype: torch.dtype = torch.float32,
        attributes: Mapping[str, int | float | str] | None = None,
        bindings: Mapping[str, torch.Tensor] | None = None,
        keep: object = None,
    ) -> Value:
        """Note an operation that csrc/cpu registers as `name`. axis: of the result; None: that of the first input."""
        if any(v.recorder is not self for v in inputs):
            raise KernelError(f"{name}: its inputs are of different recordings")
        output = self.value(inputs[0].axis if axis is None else axis, width, dtype)
        self.operations.append(Operation(name, tuple(inputs), output, attributes or {}, bindings or {}))
        self.keep.append(keep)
        return output

    def forget(self) -> None:
        """Let go of everything. Each Value holds its recorder: a cycle otherwise, and the weights in it."""
        self.values, self.operations, self.keep = [], [], []

    def group(self, name: str) -> str:
        """Have the program take the page table of this cache group."""
        if name not in self.groups:
            self.groups.append(name)
        return name


class Program:
    """A recorded pass. Called with the tensors of its inputs by name, and a batch where it has attention.

    A tensor of one column may have one dimension. Several threads may call it. Raises KernelError for tensors that don't
    fit.
    """

    def __init__(self, recorder: Recorder, inputs: Mapping[str, Value], result: Value):
        if not recorder.operations or result in inputs.values():
            raise KernelError("nothing was recorded")
        self._inputs = dict(inputs)
        self._result = result
        self._groups = tuple(recorder.groups)
        self._keep = recorder.keep
        self._results = cpu_library.ResultMemory()
        arguments = [*inputs.values(), result]
        places, columns = place(recorder.operations, arguments)
        recorded = {
            "axes": [int(v.axis) for v in recorder.values],
            "widths": [v.width for v in recorder.values],
            "types": [TYPE_CODES[v.dtype] for v in recorder.values],
            "places": [places[v.index] for v in recorder.values],
            "columns": columns,
            "groups": recorder.groups,
            "arguments": [*inputs, "the result"],
            "operations": [
                {
                    "name": o.name,
                    "inputs": [v.index for v in o.inputs],
                    "output": o.output.index,
                    "attributes": dict(o.attributes),
                    "bindings": dict(o.bindings),
                }
                for o in recorder.operations
            ],
        }
        self._run = cpu_library.guarded(cpu_library.operation("make_program")(recorded))

    def __call__(self, batch: AttentionBatch | None = None, **tensors: torch.Tensor) -> torch.Tensor:
        """-> [rows, width] of the result, on the CPU."""
        if tensors.keys() != self._inputs.keys():
            raise KernelError(f"the program takes {', '.join(self._inputs)}, not {', '.join(tensors) or 'nothing'}")
        tensors = {name: t.unsqueeze(1) if t.dim() == 1 else t for name, t in tensors.items()}
        given = [tensors[name] for name in self._inputs]
        out = self._results.empty(self._rows(batch, tensors), self._result.width, self._result.dtype)
        if batch is None:
            if self._groups:
                raise KernelError("a program with attention needs a batch")
            self._run(None, None, None, *given, out)
            return out
        missing = [g for g in self._groups if g not in batch.tables]
        if missing:
            raise KernelError(f"the batch has no page table of the cache group {missing[0]!r}")
        tables = [t for g in self._groups for t in (batch.tables[g].slots, batch.tables[g].pages)]
        self._run(batch.positions, batch.query_start, batch.context_len, *tables, *given, out)
        return out

    def _rows(self, batch: AttentionBatch | None, tensors: Mapping[str, torch.Tensor]) -> int:
        axis = self._result.axis
        for name, value in self._inputs.items():
            if value.axis == axis and tensors[name].dim() == 2:
                return tensors[name].shape[0]
        if batch is not None and axis in (Axis.TOKENS, Axis.SEQUENCES):
            return len(batch.positions if axis is Axis.TOKENS else batch.context_len)
        raise KernelError(f"no input of the program says how many rows {axis.name} has")


def place(operations: Sequence[Operation], arguments: Sequence[Value]) -> tuple[dict[int, int], list[int]]:
    """Where values lie, by index, and the columns of workspace that each axis needs.

    A place is a column of the axis' part of the workspace, shared by values that are not alive together, or -1 - i for
    argument i. First fit in order of creation; columns are multiples of 16, so that rows begin on a cache line where all
    rows of a value lie together.
    """
    places = {v.index: -1 - i for i, v in enumerate(arguments)}
    last: dict[int, int] = {}
    for i, o in enumerate(operations):
        for v in (o.output, *o.inputs):
            last[v.index] = i
    alive: dict[Axis, list[tuple[int, int, int]]] = {axis: [] for axis in Axis}  # (column, width, last use)
    columns = [0] * len(Axis)
    for i, o in enumerate(operations):
        value = o.output
        if value.index in places:
            continue
        axis = value.axis
        alive[axis] = sorted(a for a in alive[axis] if a[2] >= i)
        width = -(-value.width // 16) * 16
        at = 0
        for start, size, _ in alive[axis]:
            if at + width <= start:
                break
            at = max(at, start + size)
        places[value.index] = at
        alive[axis].append((at, width, last[value.index]))
        columns[axis] = max(columns[axis], at + width)
    return places, columns


def record(function: Callable[..., Value], inputs: Mapping[str, Input]) -> Program:
    """Run `function` on a Value for each input, by name, and make a program of what it did.

    Raises NotRecordable where an operation runs only one call at a time.
    """
    recorder = Recorder()
    values = {name: recorder.value(i.axis, i.width, i.dtype) for name, i in inputs.items()}
    try:
        return Program(recorder, values, function(**values))
    finally:
        recorder.forget()
