"""The floor under a measurement, taken in the same minute: a shared machine is not equally fast all the time.

On a CPU a streaming read takes turns with what is timed, and its median counts as theirs do. Everything else is measured
right before and right after, and the higher counts. On a GPU, whose memory is not shared, so is the read.
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
    """What has a floor. roofs: while it was measured. median_s: None when it could not be."""

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
    """Seconds."""
    return r.roofs.floor(r.nbytes, r.flops, r.activations)


def floor_fraction(r: Measured) -> float | None:
    """Floor over median."""
    return None if r.median_s is None else floor(r) / r.median_s


class Floors:
    """Times clocks and the roofs around them.

    roofs, reader: how they are measured (`measure_roofs`, `streaming_read`); reader None: by `roofs` alone.
    """

    def __init__(self, device: str, roofs: MeasureRoofs = measure_roofs, reader: Reader | None = streaming_read):
        self._device, self._roofs = device, roofs
        self._read = None if reader is None or device.startswith("cuda") else reader(device)

    def timed(
        self, clocks: Sequence[Clock], schedule: Schedule, after_turn: Callable[[], object]
    ) -> tuple[list[Times], Roofs]:
        """Times of every clock, see `interleaved`, and the roofs meanwhile. after_turn: called after each clock's turn."""

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
