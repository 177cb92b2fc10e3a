"""The result of a comparison on text: values, JSON and a table."""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cai_runtime.judge.score_table import ScoreTable, plus_minus

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ModelScore:
    """One checkpoint's size and how well it predicts the text.

    Attributes:
        keep: the keep at which an elastic checkpoint was opened; None where the caller gave none.
        parameters, nbytes: of the whole checkpoint as stored.
        nats: mean negative log likelihood per scored token.
        perplexity: exp(nats).
        perplexity_error: standard error over windows; NaN for a single window.
        bits_per_byte: negative log likelihood in bits per UTF-8 byte of text. It does not depend on the tokenizer.
        tokens: number of scored tokens.
        seconds: time spent in the model, without the samples.
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
    """Greedy answers to one prompt.

    same_tokens: length of the common prefix in tokens; None for a single model or for different tokenizers.
    """

    prompt: str
    reference: str
    candidate: str | None = None
    same_tokens: int | None = None


@dataclass(frozen=True)
class Divergence:
    """Distance of the candidate's next-token distributions from the reference's. Errors are standard errors over windows.

    Attributes:
        ratio: perplexity of the candidate over the reference's: exp of the mean paired difference in nats.
        kl: mean KL(reference || candidate), nats per token.
        kl_quantiles: quantiles of KL over single positions, keyed "0.5", "0.9", "0.99".
        top1: share of positions at which both models have the same most likely token.
        positions: number of compared positions.
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
    """The result of `compare`.

    Attributes:
        candidate, divergence: None for a single model.
        refused: why two models have no divergence; else None.
        text: source, tokens, window, windows and bytes of the text.
        windows: means of each window: nats of both models, kl, top1.
        position_kl: KL at every position, one fp32 [tokens] for each window; not in the JSON.
    """

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
        """Plain values for JSON; NaN and infinity become None."""
        plain = asdict(replace(self, position_kl=()))
        del plain["position_kl"]
        return _finite(plain)

    def table(self, width: int = 100) -> str:
        """Sizes and figures for a terminal, then the samples, at most `width` columns wide."""
        lines = [*self._figures(), "", *self._notes(), "", *self._sample_lines(width)]
        return "\n".join(lines).rstrip()

    def _figures(self) -> list[str]:
        table, d = ScoreTable(self.reference, self.candidate), self.divergence
        table.add(
            "perplexity",
            lambda m: f"{m.perplexity:,.3f}{plus_minus(m.perplexity_error, '.2f')}",
            f"{d.ratio:.4f} x{plus_minus(d.ratio_error, '.4f')}" if d else "",
        )
        table.add("bits per byte of text", lambda m: f"{m.bits_per_byte:.4f}", table.ratio("bits_per_byte"))
        if d is not None:
            quantiles = ", ".join(f"{float(q):.0%} {v:.3g}" for q, v in d.kl_quantiles.items())
            kl = f"{d.kl:.4f}{plus_minus(d.kl_error, '.4f')}"
            table.add_divergence("KL, nats per token", kl, f"positions: {quantiles}")
            table.add_divergence("top-1 agreement", f"{d.top1:.2%}{plus_minus(d.top1_error, '.2%')}")
        return table.lines()

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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
