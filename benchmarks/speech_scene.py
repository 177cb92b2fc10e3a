"""Hours of speech with silence, noise and music between, and what a transcript of them has wrong. For long_audio.py."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from speech_work import Errors, Normalizer, errors

from cai_runtime.audio.files import RATE, read_audio

GAPS = 4.0, 60.0  # shortest and longest time without speech between two files, seconds
SLACK = 1.0  # seconds from speech at which a segment still touches it: its times are rough
PASSAGE = 5  # words in a row that are not heard: a passage is lost
LEVEL = 0.1  # of noise and music; speech peaks at 0.5 or more
STEP = 0.021  # seconds by which a time may go back: one timestamp


def silence(samples: int, random: np.random.Generator) -> np.ndarray:
    return np.zeros(samples, np.float32)


def room(samples: int, random: np.random.Generator) -> np.ndarray:
    """White noise, 60 dB below full scale."""
    return (0.001 * random.standard_normal(samples)).astype(np.float32)


def noise(samples: int, random: np.random.Generator) -> np.ndarray:
    """Pink noise that swells and fades, as of wind or traffic."""
    spectrum = np.fft.rfft(random.standard_normal(samples))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
    sound = np.fft.irfft(spectrum, samples)
    swell = 0.6 + 0.4 * np.sin(2 * np.pi * random.uniform(0.1, 0.5) * np.arange(samples) / RATE)
    return (LEVEL * swell * sound / np.abs(sound).max()).astype(np.float32)


def music(samples: int, random: np.random.Generator) -> np.ndarray:
    """Chords of tones with harmonics over a beat of noise, at 100 beats a minute."""
    time = np.arange(samples) / RATE
    beat = (time / 0.6) % 1.0
    sound = 0.3 * random.standard_normal(samples) * np.exp(-30 * beat)
    chords = np.array([[0, 4, 7], [9, 12, 16], [5, 9, 12], [7, 11, 14]])
    bar = (time / 2.4).astype(int) % len(chords)
    for voice in range(3):
        pitch = 220 * 2 ** (chords[bar, voice] / 12)
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        sound += sum(np.sin(k * phase) / k**1.5 for k in range(1, 6)) * np.exp(-1.5 * beat)
    return (LEVEL * sound / np.abs(sound).max()).astype(np.float32)


KINDS = (silence, noise, music, room)


def build(out: Path, hours: float, lines: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Write `out`, a FLAC file, unless it is there; returns what is in it, kept beside it.

    "parts": of speech, each "start", "end", "text"; "seconds". Files follow each other in an order drawn once a round.
    """
    import soundfile

    note = out.with_suffix(".json")
    if out.exists() and note.exists():
        return json.loads(note.read_text())
    random = np.random.default_rng(seed)
    parts, at = [], 0
    orders = itertools.chain.from_iterable(random.permutation(len(lines)) for _ in itertools.count())
    with soundfile.SoundFile(out, "w", RATE, 1, format="FLAC") as file:
        for number, chosen in enumerate(orders):
            gap = KINDS[number % len(KINDS)](int(random.uniform(*GAPS) * RATE), random)
            sound = read_audio(lines[chosen]["audio"])
            if (at + len(gap) + len(sound)) / RATE > hours * 3600:
                break
            file.write(gap)
            file.write(sound)
            start = at + len(gap)
            at = start + len(sound)
            parts.append({"start": start / RATE, "end": at / RATE, "text": lines[chosen]["text"]})
        rest = max(int(hours * 3600 * RATE) - at, 0)
        file.write(music(min(rest, int(GAPS[1] * RATE)), random))
        file.write(np.zeros(max(rest - int(GAPS[1] * RATE), 0), np.float32))
    found = {"parts": parts, "seconds": max(at / RATE, hours * 3600)}
    note.write_text(json.dumps(found) + "\n")
    return found


def judge(scene: Mapping[str, Any], segments: Sequence[Any], until: float = float("inf")) -> dict[str, Any]:
    """What segments, of [start, end, text], have wrong. until: seconds that were heard at all.

    word_errors: of the words of segments that touch speech. invented: words of those that do not. lost_passages: times that
    `PASSAGE` words or more in a row were not heard, and lost_words in them. disorder: segments that end before they start,
    start before the one before them, or end behind the file.
    """
    normal = Normalizer()
    parts = scene["parts"]
    heard: list[list[str]] = [[] for _ in parts]
    invented: list[tuple[float, str]] = []
    starts, ends = (np.array([part[name] for part in parts]) for name in ("start", "end"))
    for start, end, text in segments:
        if end > until:
            continue
        touched = np.flatnonzero((starts - SLACK <= end) & (start <= ends + SLACK))
        words = text.split()
        for number, word in enumerate(words):
            moment = start + (end - start) * (number + 0.5) / len(words)
            if len(touched):
                away = np.maximum(np.maximum(starts[touched] - moment, moment - ends[touched]), 0)
                heard[touched[away.argmin()]].append(word)
            elif normal(word, "en"):
                invented.append((round(moment, 2), word))
    total, passages, lost, speech = Errors(), 0, 0, 0.0
    for part, words in zip(parts, heard, strict=True):
        if part["end"] > until:
            break
        speech += (part["end"] - part["start"]) / 3600
        said, got = normal(part["text"], "en"), normal(" ".join(words), "en")
        total += errors(said, got)
        for run in lost_runs(said, got):
            passages, lost = passages + 1, lost + run
    hours = min(scene["seconds"], until) / 3600
    return {
        "hours": round(hours, 3),
        "speech_hours": round(speech, 3),
        "word_errors": total.row(),
        "invented": len(invented),
        "invented_per_hour": round(len(invented) / hours, 2),
        "invented_words": invented[:60],
        "lost_passages": passages,
        "lost_words": lost,
        "disorder": disorder(segments, scene["seconds"]),
        "segments": len(segments),
    }


def lost_runs(said: str, heard: str) -> list[int]:
    """Lengths of the runs of at least `PASSAGE` words that were not heard."""
    import jiwer

    if not heard:
        return [len(said.split())]
    chunks = jiwer.process_words(said, heard).alignments[0]
    lengths = [c.ref_end_idx - c.ref_start_idx for c in chunks if c.type == "delete"]
    return [length for length in lengths if length >= PASSAGE]


def disorder(segments: Sequence[Any], seconds: float) -> int:
    count, before = 0, 0.0
    for start, end, _ in segments:
        count += end < start or start < before - STEP or end > seconds + STEP
        before = start
    return count
