"""Two speech checkpoints side by side on audio: word error rate, and how far apart they are on the same words.

The word error rate is the least number of words put in, left out or changed to come from what was said to what was heard
(Levenshtein, "Binary codes capable of correcting deletions, insertions and reversals", 1966), over the words said, of all
clips together. Both are normalized first, as Whisper's authors do: case, punctuation, contractions, numbers. It is a coarse
measure on little audio. The divergence of the distributions over the next token, given the reference's own transcription,
tells apart what the words do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from cai_runtime.compress.audio_files import RATE, Clip, Source, cut_windows, find_clips, read_audio
from cai_runtime.compress.evaluate import SPEECH, dense_reference, slim_as_transformers
from cai_runtime.compress.speech import load_processor, speech_batch, split_clips, window_features
from cai_runtime.compress.speech_result import ClipResult, SpeechComparison, SpeechDivergence, SpeechScore
from cai_runtime.compress.transcribe import Prompts, encode, prompt_of
from cai_runtime.errors import CompressionError
from cai_runtime.progress import progress_bar

TOGETHER = 8  # windows transcribed at once


def compare_speech(
    reference: str | Path,
    candidate: str | Path | None = None,
    *,
    audio: Source | Sequence[Clip],
    device: str = "auto",
    dtype: str = "auto",
    keep: float | None = None,
    progress: bool | None = None,
) -> SpeechComparison:
    """Judge one Whisper, or a candidate against a reference, by transformers. Either may be dense or slim.

    Args:
        reference, candidate: a known name, a URI or a directory (see `cai_runtime.convert.sources.pull`).
        audio: files, directories or lists of clips, see `audio_files.find_clips`; or the clips themselves. Those of more
            than 30 s are heard in windows.
        device, dtype: where and in what the models run; "auto": a GPU if there is one, fp32.
        keep: open the candidate, or the only model, at this keep; it must be elastic.
        progress: bars on stderr; None shows them on a terminal only.

    Both models are in memory, multiplied out. Words are normalized by transformers' English normalizer.

    Raises:
        SourceError, CheckpointError: a model can't be fetched or read.
        CompressionError: a model is no Whisper, the two differ in their tokens, or the audio is no good.
    """
    from cai_runtime.compress.options import DTYPES
    from cai_runtime.convert.sources import pull
    from cai_runtime.engine.open import choose_device

    if dtype not in ("auto", *DTYPES):
        raise CompressionError(f"dtype must be auto, {', '.join(DTYPES)}, is {dtype!r}")
    paths = [pull(name, progress=progress) for name in ((reference,) if candidate is None else (reference, candidate))]
    for path in paths:
        _require_speech(path)
    clips: list[Clip] = list(audio) if _are_clips(audio) else find_clips(audio)  # type: ignore[arg-type]
    place, precision = str(choose_device(device)), "fp32" if dtype == "auto" else dtype
    keeps = [None] * (len(paths) - 1) + [keep]
    run = _Run(paths, keeps, clips, place, DTYPES[precision], progress)
    run.run()
    return SpeechComparison(
        reference=run.score(0),
        candidate=run.score(1) if len(paths) == 2 else None,
        divergence=run.divergence(),
        audio={
            "clips": len(clips),
            "seconds": round(sum(run.seconds), 2),
            "transcribed": sum(clip.text is not None for clip in clips),
        },
        device=place,
        dtype=precision,
        clips=run.results(),
    )


def speech_quality(
    dense: str | Path, slim: str | Path, calibration: Source, *, progress: bool | None = None
) -> dict[str, Any] | None:
    """What a compression report says under "quality" of a speech model: `compare_speech` on the clips that calibration left
    out (`speech.split_clips`), as JSON, without paths and texts; None where it left out none."""
    _, judged = split_clips(calibration)
    if not judged:
        return None
    found = replace(compare_speech(dense, slim, audio=judged, progress=progress), clips=()).to_json()
    del found["clips"], found["reference"]["path"], found["candidate"]["path"]
    return found


def word_errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """The least number of words put in, left out or changed to come from `said` to `heard`."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def english_words(tokenizer: Any = None) -> Callable[[str], list[str]]:
    """Transformers' normalizer of English, with the tokenizer's list of British spellings if it has one, as words."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalizer = EnglishTextNormalizer(getattr(tokenizer, "english_spelling_normalizer", None) or {})
    return lambda text: normalizer(text).split()


class _Run:
    """The state of one comparison: what each model heard in each clip."""

    def __init__(
        self,
        paths: list[Path],
        keeps: list[float | None],
        clips: Sequence[Clip],
        device: str,
        dtype: torch.dtype,
        progress: bool | None,
    ):
        self.paths, self.keeps, self.clips, self.device, self.dtype = paths, keeps, clips, device, dtype
        self.progress = progress
        self.seconds: list[float] = []
        self.heard: list[list[str]] = [[] for _ in paths]  # by model and clip
        self.spent = [0.0 for _ in paths]
        self.kl: list[list[float]] = []  # by clip and position
        self.same = 0

    def run(self) -> None:
        extractor, tokenizer = load_processor(self.paths[0])
        if len(self.paths) == 2 and load_processor(self.paths[1])[1].get_vocab() != tokenizer.get_vocab():
            raise CompressionError("the two models have different tokens: judge each by itself")
        self.words = english_words(tokenizer)
        models = [_open(path, self.dtype, self.device, keep) for path, keep in zip(self.paths, self.keeps, strict=True)]
        with progress_bar("evaluate", total=len(self.clips), unit="clip", show=self.progress) as bar:
            for clip in self.clips:
                audio = read_audio(clip.path)
                self.seconds.append(len(audio) / RATE)
                windows = cut_windows(audio, extractor.n_samples / RATE)
                features = torch.stack([window_features(extractor, w) for w in windows]).to(self.device, self.dtype)
                for number, model in enumerate(models):
                    start = perf_counter()
                    ids = _generate(model, features)
                    self.spent[number] += perf_counter() - start
                    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
                    self.heard[number].append(" ".join(texts))
                    if number == 0 and len(models) == 2:
                        self._diverge(models, features, ids)
                bar.update()

    @torch.inference_mode()
    def _diverge(self, models: list[Any], features: torch.Tensor, ids: list[list[int]]) -> None:
        """Both models' distributions over each token of what the reference heard."""
        prompts = Prompts.of(models[0])
        starts = prompt_of(models[0], prompts, encode(models[0], features), times=False)
        found: list[float] = []
        for window, start, row in zip(features, starts, ids, strict=True):
            # A text that was put together of several has times in it, and may be longer than the decoder.
            text = [token for token in row if token < prompts.plain][: models[0].config.max_target_positions - 5]
            batch = speech_batch(window, torch.tensor([*start, *text, prompts.end]), len(start))
            told = batch.pop("labels")[0].to(self.device) != -100
            p, q = (
                model(**{k: v.to(self.device) for k, v in batch.items()}, use_cache=False)
                .logits[0, told]
                .float()
                .log_softmax(-1)
                for model in models
            )
            found += (p.exp() * (p - q)).sum(-1).clamp(min=0.0).tolist()
            self.same += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.kl.append(found)

    def errors(self, number: int) -> list[tuple[int, int] | None]:
        """Words wrong and words said, of each clip with a transcript."""
        found: list[tuple[int, int] | None] = []
        for clip, text in zip(self.clips, self.heard[number], strict=True):
            said = None if clip.text is None else self.words(clip.text)
            found.append(None if said is None else (word_errors(said, self.words(text)), len(said)))
        return found

    def score(self, number: int) -> SpeechScore:
        from cai_runtime.slim.inspect import inspect_checkpoint

        held = inspect_checkpoint(self.paths[number], keep=self.keeps[number])
        told = [pair for pair in self.errors(number) if pair is not None]
        wrong, words = sum(e for e, _ in told), sum(n for _, n in told)
        rate = wrong / words if words else None
        return SpeechScore(
            path=str(self.paths[number]),
            slim=held.format_version is not None,
            keep=self.keeps[number],
            parameters=held.parameters,
            nbytes=held.nbytes,
            words=words,
            errors=wrong if words else None,
            word_error=rate,
            word_error_error=None if rate is None else _ratio_error(told),
            word_error_capped=None if rate is None else sum(min(pair) for pair in told) / words,
            seconds=round(self.spent[number], 3),
        )

    def divergence(self) -> SpeechDivergence | None:
        if len(self.paths) == 1:
            return None
        pairs = [(self.words(a), self.words(b)) for a, b in zip(*self.heard, strict=True)]
        words = sum(len(a) for a, _ in pairs)
        rates = [self.score(k).word_error for k in (0, 1)]
        positions = sum(map(len, self.kl))
        return SpeechDivergence(
            word_error=sum(word_errors(a, b) for a, b in pairs) / max(words, 1),
            word_error_ratio=rates[1] / rates[0] if rates[0] and rates[1] is not None else None,
            kl=sum(map(sum, self.kl)) / max(positions, 1),
            kl_error=_ratio_error([(sum(values), len(values)) for values in self.kl]),
            top1=self.same / max(positions, 1),
            positions=positions,
        )

    def results(self) -> tuple[ClipResult, ...]:
        errors = [[None if pair is None else pair[0] for pair in self.errors(k)] for k in range(len(self.paths))]
        return tuple(
            ClipResult(
                name=clip.path.name,
                seconds=round(self.seconds[k], 2),
                said=clip.text,
                reference=self.heard[0][k],
                reference_errors=errors[0][k],
                candidate=self.heard[1][k] if len(self.paths) == 2 else None,
                candidate_errors=errors[1][k] if len(self.paths) == 2 else None,
            )
            for k, clip in enumerate(self.clips)
        )


@torch.inference_mode()
def _generate(model: Any, features: torch.Tensor) -> list[list[int]]:
    """What the model hears in each window, greedily, without prompt, padding and end."""
    ends = {model.generation_config.eos_token_id, model.generation_config.pad_token_id}
    mask = torch.ones(features.shape[0], features.shape[-1], dtype=torch.int64, device=features.device)
    found: list[list[int]] = []
    for part, seen in zip(features.split(TOGETHER), mask.split(TOGETHER), strict=True):
        ids = model.generate(part, attention_mask=seen, do_sample=False, num_beams=1).tolist()
        special = {model.generation_config.decoder_start_token_id, *ends}
        found += [[token for token in row if token not in special] for row in ids]
    return found


def _open(path: Path, dtype: torch.dtype, device: str, keep: float | None) -> Any:
    from cai_runtime.slim.reader import Checkpoint

    with Checkpoint.open(path, keep=keep) as checkpoint:
        slim = checkpoint.is_slim
    if slim:
        return slim_as_transformers(path, dtype=dtype, device=device, keep=keep)
    return dense_reference(path, dtype=dtype, device=device)


def _require_speech(path: Path) -> None:
    from cai_runtime.slim.inspect import inspect_checkpoint

    model_type = inspect_checkpoint(path).model_type
    if model_type not in SPEECH:
        raise CompressionError(f"{path} is a {model_type}, which hears no audio: leave --audio out")


def _are_clips(audio: Any) -> bool:
    return isinstance(audio, Sequence) and bool(audio) and all(isinstance(item, Clip) for item in audio)


def _ratio_error(pairs: Sequence[tuple[float, int]]) -> float | None:
    """Standard error of the ratio of two sums over clips (Cochran, "Sampling techniques", 1977, section 2.11)."""
    count, weight = len(pairs), sum(n for _, n in pairs)
    if count < 2 or not weight:
        return None
    ratio = sum(e for e, _ in pairs) / weight
    return math.sqrt(sum((e - ratio * n) ** 2 for e, n in pairs) * count / (count - 1)) / weight
