"""Measures the floor together with what is timed, because the speed of a shared machine changes over minutes.

On a CPU a streaming read takes turns with the timed calls, and its median counts, as theirs do. The matrix rates are
measured right before and right after, and the higher counts. A GPU's memory is not shared, so its read bandwidth is
measured in the same way as the matrix rates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from cai_runtime.bench.bandwidth import streaming_read
from cai_runtime.bench.roofs import Roofs, measure_roofs
from cai_runtime.bench.timing import Call, Clock, Schedule, Times, interleaved, make_clock

MeasureRoofs = Callable[[str, int | None], Roofs]
Reader = Callable[[str], tuple[Call, int]]


class Measured(Protocol):
    """A measurement with a floor. roofs: measured at the same time. median_s: seconds, None if it was not measured."""

    @property
    def roofs(self) -> Roofs: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def flops(self) -> int: ...
    @property
    def activations(self) -> str: ...
    @property
    def median_s(self) -> float | None: ...


def floor(r: Measured) -> float:
    """The least time of r's bytes and operations, in seconds."""
    return r.roofs.floor(r.nbytes, r.flops, r.activations)


def floor_fraction(r: Measured) -> float | None:
    """The floor over the median time; None if r was not measured."""
    return None if r.median_s is None else floor(r) / r.median_s


class Floors:
    """Times calls and measures the roofs around them.

    roofs: measures both roofs, by default `measure_roofs`. reader: makes the streaming read, by default `streaming_read`;
    None takes the bandwidth from `roofs`.
    """

    def __init__(self, device: str, roofs: MeasureRoofs = measure_roofs, reader: Reader | None = streaming_read):
        self._device, self._roofs = device, roofs
        self._read = None if reader is None or device.startswith("cuda") else reader(device)

    def timed(
        self, clocks: Sequence[Clock], schedule: Schedule, after_turn: Callable[[], object]
    ) -> tuple[list[Times], Roofs]:
        """(times of each clock as of `interleaved`, roofs at the same time). after_turn: called after each clock's turn."""

        def turn(index: int) -> None:
            if index < len(clocks):
                after_turn()

        before = self._roofs(self._device, None)
        reading = [make_clock([self._read[0]], self._device)] if self._read is not None else []
        found = interleaved([*clocks, *reading], schedule, after_turn=turn)
        roofs = before.higher(self._roofs(self._device, None))
        if self._read is not None:
            roofs = replace(roofs, read=self._read[1] / found.pop().median)
        return found, roofs
