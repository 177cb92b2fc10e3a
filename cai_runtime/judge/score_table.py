"""The terminal's table of one judged checkpoint, or of a candidate beside its reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from cai_runtime.tables import aligned


class Score(Protocol):
    """What every kind of judgement says of a checkpoint."""

    @property
    def path(self) -> str: ...
    @property
    def slim(self) -> bool: ...
    @property
    def keep(self) -> float | None: ...
    @property
    def parameters(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=Score)


class ScoreTable(Generic[S]):
    """Rows of four cells: a label, a value for each checkpoint, and their ratio. Begins with the names and the sizes."""

    def __init__(self, reference: S, candidate: S | None = None):
        self._models = [reference] if candidate is None else [reference, candidate]
        pair = candidate is not None
        self._rows = [("", "reference", "candidate", "")] if pair else [("", "model", "", "")]
        self.add("", checkpoint_name)
        self.add("parameters", lambda m: f"{m.parameters:,}", self.ratio("parameters"))
        self.add("bytes on disk", lambda m: f"{m.nbytes / 1e6:,.1f} MB", self.ratio("nbytes"))

    def add(self, label: str, show: Callable[[S], str], ratio: str = "") -> None:
        """A row with a value of each checkpoint."""
        values = [*map(show, self._models), ""]
        self._rows.append((label, values[0], values[1], ratio))

    def add_divergence(self, label: str, value: str, note: str = "") -> None:
        """A row with a value of the candidate against the reference."""
        self._rows.append((label, "", value, note))

    def ratio(self, attribute: str) -> str:
        """Candidate over reference; empty for one checkpoint."""
        values = [getattr(model, attribute) for model in self._models]
        return f"{values[1] / values[0]:.3f} x" if len(values) == 2 else ""

    def lines(self) -> list[str]:
        return aligned(self._rows, right=(1, 2, 3))


def checkpoint_name(score: Score) -> str:
    """The directory's name, with its parent's where it says nothing; the keep that was opened; whether it is slim."""
    path = Path(score.path)
    name = path.name if path.name not in ("model", "slim", "dense") else f"{path.parent.name}/{path.name}"
    size = "" if score.keep is None else f" at keep {score.keep:g}"
    return f"{name}{size}{' (slim)' if score.slim else ''}"


def plus_minus(error: float | None, form: str) -> str:
    """ " ± 0.012" of a standard error, in the format `form`; empty where there is none (None or NaN)."""
    return "" if error is None or not math.isfinite(error) else f" \u00b1 {error:{form}}"
