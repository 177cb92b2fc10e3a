"""Wall time by stage, over all calls that a resumed compression took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Accumulates wall time by stage. spent: seconds by stage of earlier calls. Time in a nested stage counts for that stage
    alone."""

    def __init__(self, spent: Mapping[str, float] | None = None):
        self._spent = dict(spent or {})
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere to a stage."""
        self._spent[stage] = self._spent.get(stage, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Seconds by stage until now, rounded to milliseconds, open stages included."""
        self._count()
        return {stage: round(took, 3) for stage, took in self._spent.items()}

    def _count(self) -> None:
        now = perf_counter()
        if self._open:
            stage = self._open[-1]
            self._spent[stage] = self._spent.get(stage, 0.0) + now - self._since
        self._since = now
