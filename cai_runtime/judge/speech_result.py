"""What a comparison of two speech models found: as values, as JSON, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SpeechScore:
    """One checkpoint.

    Attributes:
        keep: that an elastic checkpoint was opened at, None where none was asked for.
        parameters, nbytes: of the whole checkpoint as it is stored.
        words: in the transcripts that were given; errors: of this model; word_error: their share. word_error_error: its
            standard error over clips. None without transcripts (the error: of a single clip).
        word_error_capped: the share with no more errors counted in a clip than it has words. A model may repeat itself
            without end where it hears silence, and one such clip outweighs all others.
        seconds: spent in transcribing.
    """

    path: str
    slim: bool
    keep: float | None
    parameters: int
    nbytes: int
    words: int
    errors: int | None
    word_error: float | None
    word_error_error: float | None
    word_error_capped: float | None
    seconds: float


@dataclass(frozen=True)
class SpeechDivergence:
    """How far the candidate is from the reference.

    word_error: of its text, judged by the reference's. word_error_ratio: of both models' word error rates. kl: KL(reference
    || candidate) of the next token given the reference's transcription, nats per token, and top1: share of the tokens that
    both find the most likely; over `positions` tokens. *_error: standard errors over clips.
    """

    word_error: float
    word_error_ratio: float | None
    kl: float
    kl_error: float | None
    top1: float
    positions: int


@dataclass(frozen=True)
class ClipResult:
    """What was said in a clip (None where nobody wrote it down) and what each model heard; words put in, left out or
    changed."""

    name: str
    seconds: float
    said: str | None
    reference: str
    reference_errors: int | None
    candidate: str | None = None
    candidate_errors: int | None = None


@dataclass(frozen=True)
class SpeechComparison:
    """What `compare_speech` found."""

    reference: SpeechScore
    candidate: SpeechScore | None
    divergence: SpeechDivergence | None
    audio: dict[str, Any]
    device: str
    dtype: str
    clips: tuple[ClipResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def table(self, width: int = 100) -> str:
        """For people: sizes and figures, then the clips that the models hear differently, at most `width` columns."""
        from cai_runtime.tables import aligned

        lines = [*aligned(self._rows(), right=(1, 2, 3)), "", *self._notes()]
        differing = [clip for clip in self.clips if clip.candidate is not None and clip.candidate != clip.reference]
        for clip in differing[:8]:
            texts = {"said": clip.said, "reference": clip.reference, "candidate": clip.candidate}
            lines += ["", f"> {clip.name}"]
            lines += [f"{who:>10}  {_shortened(text, width - 12)}" for who, text in texts.items() if text is not None]
        if len(differing) > 8:
            lines += ["", f"and {len(differing) - 8} more clips that they hear differently"]
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str, str, str]]:
        models = [self.reference] if self.candidate is None else [self.reference, self.candidate]

        def row(what: str, values: Sequence[str], ratio: str = "") -> tuple[str, str, str, str]:
            return (what, values[0], values[1] if len(values) == 2 else "", ratio)

        def ratio(name: str) -> str:
            return f"{getattr(models[1], name) / getattr(models[0], name):.3f} x" if len(models) == 2 else ""

        d = self.divergence
        rows = [
            row("", ["reference", "candidate"] if len(models) == 2 else ["model"]),
            row("", [Path(m.path).name for m in models]),
            row("parameters", [f"{m.parameters:,}" for m in models], ratio("parameters")),
            row("bytes on disk", [f"{m.nbytes / 1e6:,.1f} MB" for m in models], ratio("nbytes")),
        ]
        if self.reference.words:
            ratio_text = f"{d.word_error_ratio:.3f} x" if d and d.word_error_ratio is not None else ""
            rows.append(row("word error rate", [_rate(m) for m in models], ratio_text))
            if any(m.word_error != m.word_error_capped for m in models):
                rows.append(row("at most all words of a clip", [f"{m.word_error_capped:.2%}" for m in models]))
            rows.append(row("words wrong", [f"{m.errors:,} of {m.words:,}" for m in models]))
        if d is not None:
            rows.append(row("words unlike the reference's", ["", f"{d.word_error:.2%}"]))
            error = f" \u00b1 {d.kl_error:.4f}" if d.kl_error is not None else ""
            rows.append(row("KL, nats per token", ["", f"{d.kl:.4f}{error}"]))
            rows.append(row("top-1 agreement", ["", f"{d.top1:.2%}"]))
        return rows

    def _notes(self) -> list[str]:
        a = self.audio
        return [
            f"audio: {a['clips']} clips, {a['seconds'] / 60:.1f} minutes, {a['transcribed']} with a transcript",
            f"judge: transformers, greedy, {self.device}, {self.dtype}; \u00b1 one standard error over clips",
        ]


def _rate(score: SpeechScore) -> str:
    error = "" if score.word_error_error is None else f" \u00b1 {score.word_error_error:.2%}"
    return f"{score.word_error:.2%}{error}" if score.word_error is not None else ""


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 3, 10)] + "..."
