"""Compares speech checkpoints on audio: word error rates, and the divergence of their next-token distributions.

The word error rate is the word edit distance between transcript and output (Levenshtein, "Binary codes capable of
correcting deletions, insertions and reversals", 1966), divided by the words of the transcript, over all clips together.
Both texts are normalized first, as Whisper's authors do: case, punctuation, contractions, numbers.

The rate is a coarse measure on little audio. KL(reference || candidate) of the next token, given the reference's own
transcription, separates models whose words are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from cai_runtime.audio.files import RATE, Clip, Source, cut_windows, find_clips, read_audio, split_clips
from cai_runtime.errors import CompressionError
from cai_runtime.judge.speech_result import ClipResult, SpeechComparison, SpeechDivergence, SpeechScore
from cai_runtime.progress import progress_bar
from cai_runtime.stock.load import SPEECH, dense_reference, slim_as_transformers
from cai_runtime.stock.speech_input import load_processor, speech_batch, window_features
from cai_runtime.stock.transcribe import Prompts, encode, prompt_of

TOGETHER = 8  # windows transcribed in one batch


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
    """Judge one Whisper model, or a candidate against a reference, with transformers. Either may be dense or slim.

    Args:
        reference, candidate: a known name, a URI or a directory (see `cai_runtime.convert.sources.pull`).
        audio: files, directories or lists of clips, see `audio.files.find_clips`; or the clips themselves. A clip longer
            than 30 s is cut into windows.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        dtype: of the weights and activations: "fp32", "bf16" or "fp16"; "auto" is fp32.
        keep: the keep at which to open the candidate, or the only model; that checkpoint must be elastic.
        progress: progress bars on stderr; None shows them on a terminal only.

    Both models are in memory as dense models. Transformers' English normalizer normalizes the words.

    Raises:
        SourceError, CheckpointError: a model can't be fetched or read.
        CompressionError: a model is not a Whisper, the two vocabularies differ, or the audio can't be used.
        KernelError: the device is not there.
    """
    models = [(reference, keep)] if candidate is None else [(reference, None), (candidate, keep)]
    return _compared(models, audio, device, dtype, progress)[0]


def compare_speech_keeps(
    reference: str | Path,
    candidate: str | Path,
    keeps: Sequence[float | None],
    *,
    audio: Source | Sequence[Clip],
    device: str = "auto",
    dtype: str = "auto",
    progress: bool | None = None,
) -> list[SpeechComparison]:
    """`compare_speech` of an elastic candidate at each of `keeps` (None: its largest).

    The reference transcribes each clip once. One candidate is in memory beside it at a time. Raises as `compare_speech`.
    """
    models = [(reference, None), *((candidate, keep) for keep in keeps)]
    return _compared(models, audio, device, dtype, progress)


def _compared(
    models: Sequence[tuple[str | Path, float | None]],
    audio: Source | Sequence[Clip],
    device: str,
    dtype: str,
    progress: bool | None,
) -> list[SpeechComparison]:
    """Judge the first model alone, or each other model against it. models: (name, keep)."""
    from cai_runtime.convert.sources import pull
    from cai_runtime.engine.open import choose_device
    from cai_runtime.stock.load import DTYPES

    if dtype not in ("auto", *DTYPES):
        raise CompressionError(f"dtype must be auto, {', '.join(DTYPES)}, is {dtype!r}")
    found = {name: pull(name, progress=progress) for name, _ in models}
    paths, keeps = [found[name] for name, _ in models], [keep for _, keep in models]
    for path in found.values():
        _require_speech(path)
    clips: list[Clip] = list(audio) if _are_clips(audio) else find_clips(audio)  # type: ignore[arg-type]
    place, precision = str(choose_device(device)), "fp32" if dtype == "auto" else dtype
    run = _Run(paths, keeps, clips, place, DTYPES[precision], progress)
    run.run()
    described = {
        "clips": len(clips),
        "seconds": round(sum(run.seconds), 2),
        "transcribed": sum(clip.text is not None for clip in clips),
    }
    return [
        SpeechComparison(
            reference=run.score(0),
            candidate=run.score(k) if k else None,
            divergence=run.divergence(k) if k else None,
            audio=described,
            device=place,
            dtype=precision,
            clips=run.results(k),
        )
        for k in (range(1, len(paths)) if len(paths) > 1 else [0])
    ]


def speech_quality(
    dense: str | Path, slim: str | Path, calibration: Source, *, progress: bool | None = None
) -> dict[str, Any] | None:
    """The entry "quality" of a speech model's compression report: `compare_speech` on the clips that calibration left out
    (`audio.files.split_clips`). None if it left out no clip."""
    _, judged = split_clips(calibration)
    return for_report(compare_speech(dense, slim, audio=judged, progress=progress)) if judged else None


def for_report(comparison: SpeechComparison) -> dict[str, Any]:
    """A comparison of two models as plain values, without paths and texts."""
    found = replace(comparison, clips=()).to_json()
    del found["clips"], found["reference"]["path"], found["candidate"]["path"]
    return found


def word_errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """The word edit distance: fewest insertions, deletions and substitutions that turn `said` into `heard`."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def english_words(tokenizer: Any = None) -> Callable[[str], list[str]]:
    """A function from text to normalized words, by transformers' English normalizer.

    tokenizer: its table of British spellings is used, if it has one.
    """
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalizer = EnglishTextNormalizer(getattr(tokenizer, "english_spelling_normalizer", None) or {})
    return lambda text: normalizer(text).split()


class _Run:
    """The state of one comparison: each model's transcription of each clip. Model 0 is the reference."""

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
        self.seconds = [0.0 for _ in clips]
        self.heard: list[list[str]] = [[] for _ in paths]  # text by model and clip
        self.spent = [0.0 for _ in paths]  # seconds of transcribing
        # The reference's transcription by clip and window: token ids with prompt and end, and the prompt's length.
        self.transcripts: list[list[tuple[torch.Tensor, int]]] = []
        self.kl: list[list[list[float]]] = [[] for _ in paths]  # KL from the reference, by model, clip and position
        self.same = [0 for _ in paths]  # positions with the reference's most likely token
        self._errors: dict[int, list[tuple[int, int] | None]] = {}

    def run(self) -> None:
        self.extractor, self.tokenizer = load_processor(self.paths[0])
        for path in {path for path in self.paths[1:] if path != self.paths[0]}:
            if load_processor(path)[1].get_vocab() != self.tokenizer.get_vocab():
                raise CompressionError("the two models have different tokens: judge each by itself")
        self.words = english_words(self.tokenizer)
        with progress_bar("evaluate", total=len(self.clips) * len(self.paths), unit="clip", show=self.progress) as bar:
            first = _open(self.paths[0], self.dtype, self.device, self.keeps[0])
            for k in range(len(self.clips)):
                features = self._features(k)
                ids = self._hear(0, first, features)
                if len(self.paths) > 1:
                    self.transcripts.append(_transcript_tokens(first, features, ids))
                bar.update()
            for number in range(1, len(self.paths)):
                model = _open(self.paths[number], self.dtype, self.device, self.keeps[number])
                for k in range(len(self.clips)):
                    features = self._features(k)
                    self._hear(number, model, features)
                    self._diverge(number, first, model, features, self.transcripts[k])
                    bar.update()
                del model

    def _features(self, k: int) -> torch.Tensor:
        """The log-mel features of clip k, [windows, mels, frames]."""
        audio = read_audio(self.clips[k].path)
        self.seconds[k] = len(audio) / RATE
        windows = cut_windows(audio, self.extractor.n_samples / RATE)
        return torch.stack([window_features(self.extractor, w) for w in windows]).to(self.device, self.dtype)

    def _hear(self, number: int, model: Any, features: torch.Tensor) -> list[list[int]]:
        """Transcribe a clip, store the text, and return each window's token ids."""
        start = perf_counter()
        ids = _generate(model, features)
        self.spent[number] += perf_counter() - start
        texts = [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
        self.heard[number].append(" ".join(texts))
        return ids

    @torch.inference_mode()
    def _diverge(
        self,
        number: int,
        first: Any,
        model: Any,
        features: torch.Tensor,
        transcripts: Sequence[tuple[torch.Tensor, int]],
    ) -> None:
        """Compare both models' distributions of each token of the reference's transcription."""
        found: list[float] = []
        for window, (tokens, prompt) in zip(features, transcripts, strict=True):
            batch = speech_batch(window, tokens, prompt)
            predicted = batch.pop("labels")[0].to(self.device) != -100
            inputs = {key: value.to(self.device) for key, value in batch.items()}
            p, q = (m(**inputs, use_cache=False).logits[0, predicted].float().log_softmax(-1) for m in (first, model))
            found += (p.exp() * (p - q)).sum(-1).clamp(min=0.0).tolist()
            self.same[number] += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.kl[number].append(found)

    def errors(self, number: int) -> list[tuple[int, int] | None]:
        """(word errors, words of the transcript) of each clip; None for a clip without a transcript."""
        if number not in self._errors:
            self._errors[number] = found = []
            for clip, text in zip(self.clips, self.heard[number], strict=True):
                said = None if clip.text is None else self.words(clip.text)
                found.append(None if said is None else (word_errors(said, self.words(text)), len(said)))
        return self._errors[number]

    def score(self, number: int) -> SpeechScore:
        from cai_runtime.slim.inspect import inspect_checkpoint

        held = inspect_checkpoint(self.paths[number], keep=self.keeps[number])
        pairs = [pair for pair in self.errors(number) if pair is not None]
        wrong, words = sum(e for e, _ in pairs), sum(n for _, n in pairs)
        rate = self.word_error(number)
        return SpeechScore(
            path=str(self.paths[number]),
            slim=held.format_version is not None,
            keep=self.keeps[number],
            parameters=held.parameters,
            nbytes=held.nbytes,
            words=words,
            errors=wrong if words else None,
            word_error=rate,
            word_error_error=None if rate is None else _ratio_error(pairs),
            word_error_capped=None if rate is None else sum(min(pair) for pair in pairs) / words,
            seconds=round(self.spent[number], 3),
        )

    def word_error(self, number: int) -> float | None:
        pairs = [pair for pair in self.errors(number) if pair is not None]
        words = sum(n for _, n in pairs)
        return sum(e for e, _ in pairs) / words if words else None

    def divergence(self, number: int) -> SpeechDivergence:
        heard = zip(self.heard[0], self.heard[number], strict=True)
        pairs = [(self.words(a), self.words(b)) for a, b in heard]
        words = sum(len(a) for a, _ in pairs)
        rates, kl = [self.word_error(k) for k in (0, number)], self.kl[number]
        positions = sum(map(len, kl))
        return SpeechDivergence(
            word_error=sum(word_errors(a, b) for a, b in pairs) / max(words, 1),
            word_error_ratio=rates[1] / rates[0] if rates[0] and rates[1] is not None else None,
            kl=sum(map(sum, kl)) / max(positions, 1),
            kl_error=_ratio_error([(sum(values), len(values)) for values in kl]),
            top1=self.same[number] / max(positions, 1),
            positions=positions,
        )

    def results(self, number: int) -> tuple[ClipResult, ...]:
        """Each clip's texts and errors of the reference, and of model `number` unless that is 0."""
        errors = [[None if pair is None else pair[0] for pair in self.errors(m)] for m in (0, number)]
        return tuple(
            ClipResult(
                name=clip.path.name,
                seconds=round(self.seconds[k], 2),
                said=clip.text,
                reference=self.heard[0][k],
                reference_errors=errors[0][k],
                candidate=self.heard[number][k] if number else None,
                candidate_errors=errors[1][k] if number else None,
            )
            for k, clip in enumerate(self.clips)
        )


@torch.inference_mode()
def _generate(model: Any, features: torch.Tensor) -> list[list[int]]:
    """The greedy transcription of each window: token ids without prompt, padding and end."""
    # Transformers refuses a task for an English-only model. For a multilingual one it sets no task by itself.
    task = {"task": "transcribe"} if getattr(model.generation_config, "is_multilingual", False) else {}
    ends = {model.generation_config.eos_token_id, model.generation_config.pad_token_id}
    mask = torch.ones(features.shape[0], features.shape[-1], dtype=torch.int64, device=features.device)
    found: list[list[int]] = []
    for part, seen in zip(features.split(TOGETHER), mask.split(TOGETHER), strict=True):
        ids = model.generate(part, attention_mask=seen, do_sample=False, num_beams=1, **task).tolist()
        special = {model.generation_config.decoder_start_token_id, *ends}
        found += [[token for token in row if token not in special] for row in ids]
    return found


@torch.inference_mode()
def _transcript_tokens(
    model: Any, features: torch.Tensor, ids: Sequence[Sequence[int]]
) -> list[tuple[torch.Tensor, int]]:
    """(prompt, text and end of each window, int64 [tokens]; length of the prompt). ids: the transcribed tokens."""
    prompts = Prompts.of(model)
    if len(prompts.languages) > 1:  # the model detects the language
        parts = [prompt_of(model, prompts, encode(model, part), times=False) for part in features.split(TOGETHER)]
        starts = [start for part in parts for start in part]
    else:
        starts = [prompts.begin(*prompts.languages, times=False) for _ in ids]
    found = []
    for start, row in zip(starts, ids, strict=True):
        # `generate` may join several passes: the text then holds timestamps, and may be longer than the decoder's context.
        text = [token for token in row if token < prompts.plain][: model.config.max_target_positions - 5]
        found.append((torch.tensor([*start, *text, prompts.end]), len(start)))
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
        raise CompressionError(f"{path} is a {model_type} model, which takes no audio: leave out --audio")


def _are_clips(audio: Any) -> bool:
    return isinstance(audio, Sequence) and bool(audio) and all(isinstance(item, Clip) for item in audio)


def _ratio_error(pairs: Sequence[tuple[float, int]]) -> float | None:
    """Standard error of the ratio of two sums over clips (Cochran, "Sampling techniques", 1977, section 2.11)."""
    count, weight = len(pairs), sum(n for _, n in pairs)
    if count < 2 or not weight:
        return None
    ratio = sum(e for e, _ in pairs) / weight
    return math.sqrt(sum((e - ratio * n) ** 2 for e, n in pairs) * count / (count - 1)) / weight
