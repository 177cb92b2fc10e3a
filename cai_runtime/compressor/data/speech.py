"""Calibration data of a speech model: windows of audio as log-mel features, and their transcripts as tokens.

A batch is one window. Batching transcripts of different lengths would need padding, and padded positions would enter the
Gram matrices. The encoder's 1500 positions fill the machine anyway.

Audio shorter than a window is padded with silence, as always in Whisper. The silence counts in the encoder's moments,
because the decoder attends to all positions. An encoder calibrated on speech alone would give it noise there. Silence that
does not affect the loss has small gradients, and thus little weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from cai_runtime.audio.files import RATE, Clip, Source, cut_windows, find_clips, read_audio, split_clips
from cai_runtime.compressor.data.repetition import loops
from cai_runtime.errors import CompressionError
from cai_runtime.progress import progress_bar
from cai_runtime.stock.load import DTYPES
from cai_runtime.stock.speech_input import load_processor, speech_batch, window_features
from cai_runtime.stock.transcribe import TOGETHER, Prompts, encode, prompt_of, transcribe

if TYPE_CHECKING:
    from cai_runtime.compressor.options import Options
    from cai_runtime.compressor.stats.block_stack import Batch
    from cai_runtime.compressor.stats.weights import DenseWeights
    from cai_runtime.compressor.work import Work

# Temperatures of further rounds, in which the model transcribes the windows again until there are enough samples.
TEMPERATURES = (0.0, 0.4, 0.8)
STEP = "text"
NO_AUDIO = (
    "a speech model is calibrated on audio, which it can't write itself: give files, a directory, or a list of clips "
    "(--calibration DIR, calibration=); transcripts are welcome and not needed"
)


@dataclass(frozen=True)
class Sample:
    """One window with one transcript.

    window: its index. tokens: ids of prompt, transcript and end. prompt: number of prompt tokens.
    """

    window: int
    tokens: tuple[int, ...]
    prompt: int


@dataclass
class SpeechCalibration:
    """Windows and their transcripts.

    features: fp32 [mels, frames] per window. samples: one of each window first, then further ones. source: description for
    people. provenance: JSON values: files and their SHA-256, seconds, counts of given and generated transcripts.
    """

    features: list[torch.Tensor]
    samples: list[Sample]
    source: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values for the report, with the SHA-256 of all token ids (int64, little-endian)."""
        ids = torch.tensor([t for sample in self.samples for t in sample.tokens], dtype=torch.int64)
        return {
            "source": self.source,
            "sequences": len(self.samples),
            "windows": len(self.features),
            "tokens": len(ids),
            "tokens_sha256": hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
            **self.provenance,
        }


def require_audio(source: Source | None) -> None:
    """Raises CompressionError, which says what to give, unless `source` is audio (see `find_clips`)."""
    if source is None or source == "self":
        raise CompressionError(NO_AUDIO)
    find_clips(source)


def open_clips(clips: Sequence[Clip], progress: bool | None = None) -> None:
    """Read all clips, to find unreadable ones early. Raises what `read_audio` raises."""
    with progress_bar("clips", total=len(clips), unit="clip", show=progress) as bar:
        for clip in clips:
            read_audio(clip.path)
            bar.update()


def speech_samples(
    source: Source | None,
    *,
    model: Any,
    model_path: str | Path,
    samples: int,
    most_tokens: int = 512,
    seed: int = 0,
    progress: bool | None = None,
) -> SpeechCalibration:
    """`samples` windows with a transcript each, or as many as the audio gives.

    Args:
        source: audio files, directories, or lists of clips, see `audio.files.find_clips`. Some clips are held out, see
            `split_clips`. A clip of up to 30 s with a transcript is one sample. Longer clips are cut. The model transcribes
            their windows, and those without a transcript, with timestamps in every other one. With more samples than
            windows, the model transcribes all windows again, greedily and then at higher temperatures.
        model: transformers' Whisper. model_path: directory of its tokenizer and feature extractor.
        most_tokens: of a transcript; longer ones are truncated.
        seed: for the order of the clips, and for sampling.
        progress: bars on stderr; None: on a terminal only.

    The same arguments give the same samples. No global random state is used or changed.

    Raises CompressionError: no audio, unreadable audio, or a file missing in the model's directory.
    """
    require_audio(source)
    assert source is not None
    extractor, tokenizer = load_processor(model_path)
    clips, judged = split_clips(source)
    Random(seed).shuffle(clips)
    features: list[torch.Tensor] = []
    texts: list[str | None] = []
    used: list[Clip] = []
    seconds = 0.0
    with progress_bar("audio", total=samples, unit="window", show=progress) as bar:
        for clip in clips:
            if len(features) >= samples:
                break
            windows = cut_windows(read_audio(clip.path), extractor.n_samples / RATE)
            used.append(clip)
            for window in windows[: samples - len(features)]:
                features.append(window_features(extractor, window))
                texts.append(clip.text if len(windows) == 1 else None)
                seconds += len(window) / RATE
                bar.update()
    found = _samples_of(model, tokenizer, features, texts, samples, most_tokens, seed, progress)
    own = sum(text is None for text in texts)
    words = f"{seconds / 60:.1f} minutes of audio in {len(used)} clips and {len(features)} windows"
    provenance = {
        "seconds": round(seconds, 2),
        "transcribed": len(features) - own,
        "own_texts": len(found) - (len(features) - own),
        "clips": len(clips) + len(judged),
        "set_aside": len(judged),
        "seed": seed,
        "files": [_record(clip.path) for clip in used],
    }
    return SpeechCalibration(features, found, words, provenance)


def calibration_batches(
    weights: DenseWeights, options: Options, work: Work, progress: bool | None, *, judged: bool = False
) -> tuple[list[Batch], list[Batch], dict[str, Any]]:
    """Batches for calibration, batches for healing (unused ones first), and the record for the report. The work directory
    holds them. judged: the held-out clips will be needed; read them all now to find unreadable ones."""
    if judged:
        assert options.calibration is not None  # checked by `make_plan`
        open_clips(split_clips(options.calibration)[1], progress)
    if not work.has(STEP):
        model: Any = weights.resident(DTYPES[options.dtype]).to(options.device)
        found = speech_samples(
            options.calibration,
            model=model,
            model_path=weights.path,
            samples=options.text_samples,
            most_tokens=options.sequence_length,
            seed=options.seed,
            progress=progress,
        )
        tensors = {f"features-{k}": value for k, value in enumerate(found.features)}
        tensors |= {f"tokens-{k}": torch.tensor(s.tokens, dtype=torch.int64) for k, s in enumerate(found.samples)}
        record = {**found.to_json(), "calibrated_on": min(options.samples, len(found.samples))}
        samples = [[sample.window, sample.prompt] for sample in found.samples]
        work.save(STEP, tensors, {"report": record, "samples": samples})
    tensors, record = work.load(STEP)
    batches = [
        speech_batch(tensors[f"features-{window}"].to(DTYPES[options.dtype]), tensors[f"tokens-{k}"], prompt)
        for k, (window, prompt) in enumerate(record["samples"])
    ]
    known, others = batches[: options.samples], batches[options.samples :]
    return known, others + known, record["report"]


def _samples_of(
    model: Any,
    tokenizer: Any,
    features: list[torch.Tensor],
    texts: Sequence[str | None],
    samples: int,
    most: int,
    seed: int,
    progress: bool | None,
) -> list[Sample]:
    """One transcript of every window, then further distinct ones until there are `samples`."""
    most = min(most, model.config.max_target_positions - 4)  # the prompt is up to four tokens
    found: dict[tuple[int, tuple[int, ...]], Sample] = {}
    with progress_bar("texts", total=max(samples, len(features)), unit="text", show=progress) as bar:
        for number, temperature in enumerate((None, *TEMPERATURES)):
            for sample in _round(model, tokenizer, features, texts, number, temperature, most, seed):
                if number > 0 and loops(sample.tokens):
                    continue
                if found.setdefault((sample.window, sample.tokens), sample) is sample:
                    bar.update()
                if number > 0 and len(found) >= samples:
                    break
            if len(found) >= samples:
                break
    return list(found.values())


def _round(
    model: Any,
    tokenizer: Any,
    features: list[torch.Tensor],
    texts: Sequence[str | None],
    number: int,
    temperature: float | None,
    most: int,
    seed: int,
) -> Iterator[Sample]:
    """Round `number`: yields one transcript of each window, of at most `most` tokens.

    temperature None: the given transcripts (`texts`), else greedy ones of the model. Generated transcripts have timestamps
    in every other window, alternating between rounds.
    """
    prompts = Prompts.of(model)
    for start in range(0, len(features), TOGETHER):
        group = range(start, min(start + TOGETHER, len(features)))
        encoded = encode(model, torch.stack(features[start : group.stop]))
        transcribed = [k for k in group if temperature is None and texts[k] is not None]
        if transcribed:
            begins = prompt_of(model, prompts, encoded[[k - start for k in transcribed]], times=False)
            for k, begin in zip(transcribed, begins, strict=True):
                ids = tokenizer(f" {texts[k]}", add_special_tokens=False)["input_ids"]
                yield Sample(k, (*begin, *[*ids, prompts.end][:most]), len(begin))
        for times in (False, True):
            own = [k for k in group if k not in transcribed and bool((k + number) % 2) == times]
            if not own:
                continue
            heard = encoded[[k - start for k in own]]
            begins = prompt_of(model, prompts, heard, times=times)
            keys = [(seed << 40) + (number << 32) + k for k in own]
            said = transcribe(model, heard, begins, most=most, temperature=temperature or 0.0, keys=keys)
            for k, begin, text in zip(own, begins, said, strict=True):
                yield Sample(k, (*begin, *text), len(begin))


def _record(path: Path) -> dict[str, Any]:
    from cai_runtime.convert.cache import sha256_of

    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
