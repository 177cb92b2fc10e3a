"""What a comparison of two checkpoints found: as values, as JSON, as a table."""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ModelScore:
    """One checkpoint's size and how well it predicts the text.

    Attributes:
        keep: that an elastic checkpoint was opened at, None where none was asked for.
        parameters, nbytes: of the whole checkpoint as it is stored.
        nats: mean negative log likelihood per scored token; `perplexity` is exp of it. `perplexity_error`: standard
            error over windows (NaN of a single one).
        bits_per_byte: of the text's UTF-8, which does not depend on the tokenizer.
        tokens: scored.
        seconds: in the model, samples left out.
    """

    path: str
    slim: bool
    keep: float | None
    parameters: int
    nbytes: int
    perplexity: float
    perplexity_error: float
    nats: float
    bits_per_byte: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Sample:
    """Greedy answers to one prompt. same_tokens: how many tokens both begin with alike; None for one model alone, or
    for different tokenizers."""

    prompt: str
    reference: str
    candidate: str | None = None
    same_tokens: int | None = None


@dataclass(frozen=True)
class Divergence:
    """How far the candidate's next-token distributions are from the reference's.

    ratio: of the perplexities, candidate over reference, exp of the mean paired difference in nats. kl: KL(reference ||
    candidate), nats per token; kl_quantiles: of its values at single positions. top1: share of positions at which both
    find the same token the most likely. *_error: standard errors over windows.
    """

    ratio: float
    ratio_error: float
    kl: float
    kl_error: float
    kl_quantiles: dict[str, float]
    top1: float
    top1_error: float
    positions: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `refused` says why there is no divergence between two models that were both given.
    `windows`: means over each window: nats of both models, kl, top1. `position_kl`: fp32 [windows][tokens], KL at every
    position; not part of the JSON."""

    reference: ModelScore
    candidate: ModelScore | None
    divergence: Divergence | None
    refused: str | None
    text: dict[str, Any]
    backend: str
    device: str
    dtype: str
    samples: tuple[Sample, ...] = ()
    windows: dict[str, list[float]] = field(default_factory=dict)
    position_kl: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not a finite number is None."""
        plain = asdict(replace(self, position_kl=()))
        del plain["position_kl"]
        return _finite(plain)

    def table(self, width: int = 100) -> str:
        """For people: sizes and figures, then the samples, at most `width` columns."""
        from cai_runtime.tables import aligned

        lines = aligned(self._rows(), right=(1, 2, 3))
        lines += ["", *self._notes(), "", *self._sample_lines(width)]
        return "\n".join(lines).rstrip()

    def _rows(self) -> list[tuple[str, str, str, str]]:
        models = [self.reference] if self.candidate is None else [self.reference, self.candidate]

        def row(what: str, values: list[str], ratio: str = "") -> tuple[str, str, str, str]:
            return (what, values[0], values[1] if len(values) == 2 else "", ratio)

        def ratio(name: str) -> str:
            return f"{getattr(models[1], name) / getattr(models[0], name):.3f} x" if len(models) == 2 else ""

        d = self.divergence
        rows = [
            row("", ["reference", "candidate"] if len(models) == 2 else ["model"]),
            row("", [_name(m) for m in models]),
            row("parameters", [f"{m.parameters:,}" for m in models], ratio("parameters")),
            row("bytes on disk", [f"{m.nbytes / 1e6:,.1f} MB" for m in models], ratio("nbytes")),
            row(
                "perplexity",
                [f"{m.perplexity:,.3f}{_error(m.perplexity_error, 2)}" for m in models],
                f"{d.ratio:.4f} x{_error(d.ratio_error, 4)}" if d else "",
            ),
            row("bits per byte of text", [f"{m.bits_per_byte:.4f}" for m in models], ratio("bits_per_byte")),
        ]
        if d is not None:
            quantiles = ", ".join(f"{float(q):.0%} {v:.3g}" for q, v in d.kl_quantiles.items())
            rows.append(
                row("KL, nats per token", ["", f"{d.kl:.4f}{_error(d.kl_error, 4)}"], f"positions: {quantiles}")
            )
            rows.append(row("top-1 agreement", ["", f"{d.top1:.2%}{_percent_error(d.top1_error)}"]))
        return rows

    def _notes(self) -> list[str]:
        t = self.text
        lines = [
            f"text: {t['source']}; {t['tokens']:,} tokens in {t['windows']} windows of {t['window']}, each by itself",
            f"judge: {self.backend}, {self.device}, {self._precision}; \u00b1 one standard error over windows",
        ]
        if self.refused:
            lines.append(f"no KL and no top-1 agreement: {self.refused}; compare bits per byte")
        return lines

    @property
    def _precision(self) -> str:
        if self.dtype != "auto":
            return self.dtype
        return "fp32" if self.backend == "transformers" else "weights as the engine holds them"

    def _sample_lines(self, width: int) -> list[str]:
        lines = []
        for sample in self.samples:
            same = "" if sample.same_tokens is None else f"   (the first {sample.same_tokens} tokens are the same)"
            lines.append(f"> {sample.prompt}{same}")
            if sample.candidate is None:
                lines += _wrapped(sample.reference, width)
            else:
                half = max((width - 3) // 2, 20)
                left, right = _wrapped(sample.reference, half), _wrapped(sample.candidate, half)
                for k in range(max(len(left), len(right))):
                    a, b = (part[k] if k < len(part) else "" for part in (left, right))
                    lines.append(f"{a:<{half}} | {b}".rstrip())
            lines.append("")
        return lines


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for line in text.strip().splitlines():
        lines += textwrap.wrap(line, width) or [""]
    return lines or ["(nothing)"]


def _name(model: ModelScore) -> str:
    path = Path(model.path)
    name = path.name if path.name not in ("model", "slim", "dense") else f"{path.parent.name}/{path.name}"
    size = "" if model.keep is None else f" at keep {model.keep:g}"
    return f"{name}{size}{' (slim)' if model.slim else ''}"


def _percent_error(value: float) -> str:
    return f" \u00b1 {value:.2%}" if math.isfinite(value) else ""


def _error(value: float, digits: int) -> str:
    return f" \u00b1 {value:.{digits}f}" if math.isfinite(value) else ""


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
