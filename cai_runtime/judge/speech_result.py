"""The result of a comparison of speech models: values, JSON and a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cai_runtime.judge.score_table import ScoreTable, plus_minus


@dataclass(frozen=True)
class SpeechScore:
    """One checkpoint's size and word errors.

    Attributes:
        keep: the keep at which an elastic checkpoint was opened; None where the caller gave none.
        parameters, nbytes: of the whole checkpoint as stored.
        words: number of words in the given transcripts.
        errors: word errors of this model (insertions, deletions and substitutions).
        word_error: errors / words.
        word_error_error: standard error of word_error over clips; also None for a single clip.
        word_error_capped: the rate with at most as many errors per clip as it has words. A model may repeat itself
            without end on silence, and one such clip would outweigh all others.
        seconds: time spent transcribing.

    errors and the rates are None without transcripts.
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
    """Distance of the candidate from the reference.

    Attributes:
        word_error: word error rate of the candidate's text, with the reference's text as the transcript.
        word_error_ratio: word error rate of the candidate over the reference's; None without transcripts or errors.
        kl: mean KL(reference || candidate), nats per token, given the reference's transcription.
        kl_error: standard error of kl over clips; None for a single clip.
        top1: share of tokens at which both models have the same most likely token.
        positions: number of compared tokens.
    """

    word_error: float
    word_error_ratio: float | None
    kl: float
    kl_error: float | None
    top1: float
    positions: int


@dataclass(frozen=True)
class ClipResult:
    """One clip: its transcript (`said`, None where none was given) and the text and word errors of each model."""

    name: str
    seconds: float
    said: str | None
    reference: str
    reference_errors: int | None
    candidate: str | None = None
    candidate_errors: int | None = None


@dataclass(frozen=True)
class SpeechComparison:
    """The result of `compare_speech`. candidate, divergence: None for a single model. audio: clips, seconds, transcribed."""

    reference: SpeechScore
    candidate: SpeechScore | None
    divergence: SpeechDivergence | None
    audio: dict[str, Any]
    device: str
    dtype: str
    clips: tuple[ClipResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def table(self, width: int = 100) -> str:
        """Sizes and figures for a terminal, then the clips that the models hear differently, at most `width` columns."""
        lines = [*self._figures(), "", *self._notes()]
        differing = [clip for clip in self.clips if clip.candidate is not None and clip.candidate != clip.reference]
        for clip in differing[:8]:
            texts = {"said": clip.said, "reference": clip.reference, "candidate": clip.candidate}
            lines += ["", f"> {clip.name}"]
            lines += [f"{who:>10}  {_shortened(text, width - 12)}" for who, text in texts.items() if text is not None]
        if len(differing) > 8:
            lines += ["", f"and {len(differing) - 8} more clips that they hear differently"]
        return "\n".join(lines)

    def _figures(self) -> list[str]:
        table, d = ScoreTable(self.reference, self.candidate), self.divergence
        models = [model for model in (self.reference, self.candidate) if model is not None]
        if self.reference.words:
            ratio = f"{d.word_error_ratio:.3f} x" if d and d.word_error_ratio is not None else ""
            table.add("word error rate", lambda m: f"{m.word_error:.2%}{plus_minus(m.word_error_error, '.2%')}", ratio)
            if any(m.word_error != m.word_error_capped for m in models):
                table.add("at most all words of a clip", lambda m: f"{m.word_error_capped:.2%}")
            table.add("words wrong", lambda m: f"{m.errors:,} of {m.words:,}")
        if d is not None:
            table.add_divergence("words unlike the reference's", f"{d.word_error:.2%}")
            table.add_divergence("KL, nats per token", f"{d.kl:.4f}{plus_minus(d.kl_error, '.4f')}")
            table.add_divergence("top-1 agreement", f"{d.top1:.2%}")
        return table.lines()

    def _notes(self) -> list[str]:
        a = self.audio
        return [
            f"audio: {a['clips']} clips, {a['seconds'] / 60:.1f} minutes, {a['transcribed']} with a transcript",
            f"judge: transformers, greedy, {self.device}, {self.dtype}; \u00b1 one standard error over clips",
        ]


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 3, 10)] + "..."
