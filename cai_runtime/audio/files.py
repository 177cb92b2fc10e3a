"""Finds audio files with their transcripts, reads them at 16 kHz and cuts them into windows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cai_runtime.audio.mel import RATE
from cai_runtime.audio.stream import open_audio
from cai_runtime.errors import AudioError, CompressionError

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
LIST_SUFFIXES = (".jsonl", ".tsv")
WINDOW = 30  # seconds of a model's input
LOOK_BACK = 5.0  # a window is cut within its last seconds, this many
PAUSE = 0.2  # seconds over which the power is summed to find the quietest moment
SET_ASIDE = 10  # every tenth clip is set aside for evaluation
MOST_SET_ASIDE = 64  # evaluation takes about as long as the clips last

Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Clip:
    """An audio file and its transcript, None if there is none."""

    path: Path
    text: str | None = None


def find_clips(source: Source) -> list[Clip]:
    """The clips of a source in order, each file once, with its first transcript.

    source: one or several of these:
        an audio file;
        a directory, searched at any depth, without hidden files and directories;
        a list of clips: .jsonl with "audio" and "text" in each line, or .tsv with these columns. Paths are relative to
        the list.
    A file `a.wav` without a transcript takes `a.txt` beside it, if there is one.

    Raises CompressionError, with the file and line, for a missing path, no audio, or a malformed list.
    """
    given = [source] if isinstance(source, (str, Path)) else list(source)
    clips: dict[Path, Clip] = {}
    for item in given:
        for clip in _clips_of(Path(item).expanduser()):
            kept = clips.setdefault(clip.path.resolve(), clip)
            if kept.text is None and clip.text is not None:
                clips[clip.path.resolve()] = replace(kept, text=clip.text)
    if not clips:
        raise CompressionError(f"no audio in {', '.join(map(str, given)) or 'an empty list'}")
    return list(clips.values())


def read_audio(path: str | Path) -> np.ndarray:
    """Read a whole audio file as fp32 [samples] at 16 kHz: channels averaged, resampled by soxr.

    Raises CompressionError for a file that can't be decoded whole, is empty or holds NaN or infinity, or for a missing
    package.
    """
    try:
        with open_audio(path) as stream:
            samples = stream.read()
            damage = stream.damage
    except AudioError as e:
        raise CompressionError(f"audio file {path} can't be read: {e}") from e
    if damage:  # its transcript says more than is left
        raise CompressionError(f"audio file {path} can't be read whole: {damage}")
    return samples


def cut_windows(audio: np.ndarray, seconds: float = WINDOW) -> list[np.ndarray]:
    """Cut audio [samples] at 16 kHz into consecutive windows of at most `seconds`.

    Each cut lies in the quietest moment of the window's last `LOOK_BACK` seconds.
    """
    most, pause = int(seconds * RATE), int(PAUSE * RATE)
    found = []
    while len(audio) > most:
        begin = most - int(min(LOOK_BACK, seconds / 2) * RATE)
        power = np.square(audio[begin:most], dtype=np.float64).cumsum()
        cut = begin + int((power[pause:] - power[:-pause]).argmin()) + pause // 2
        found.append(audio[:cut])
        audio = audio[cut:]
    return [*found, audio]


def _clips_of(path: Path) -> list[Clip]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in AUDIO_SUFFIXES)
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not files:
            raise CompressionError(f"directory {path} holds no {', '.join(AUDIO_SUFFIXES)} file")
        return [_with_text(file) for file in files]
    if not path.exists():
        raise CompressionError(f"{path} is not there: a speech model takes audio files, or a directory or list of them")
    suffix = path.suffix.lower()
    if suffix in AUDIO_SUFFIXES:
        return [_with_text(path)]
    if suffix not in LIST_SUFFIXES:
        raise CompressionError(
            f"{path} ends in none of {', '.join((*AUDIO_SUFFIXES, *LIST_SUFFIXES))}: a speech model takes audio"
        )
    try:
        # Not splitlines, which also splits at U+2028 and others; a transcript may hold them. Reading as text has turned
        # \r\n and \r into \n.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise CompressionError(f"list {path} can't be read: {e}") from e
    return (_jsonl if suffix == ".jsonl" else _tsv)(path, lines)


def _with_text(path: Path) -> Clip:
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return Clip(path)
    try:
        text = " ".join(beside.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as e:
        raise CompressionError(f"transcript {beside} can't be read: {e}") from e
    return Clip(path, text)


def _jsonl(path: Path, lines: list[str]) -> list[Clip]:
    clips = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise CompressionError(f"{path}, line {number}: not JSON: {e}") from e
        if not isinstance(entry, dict):
            raise CompressionError(f'{path}, line {number}: not an object with "audio" and "text"')
        clips.append(_entry(path, number, entry.get("audio"), entry.get("text")))
    return clips


def _tsv(path: Path, lines: list[str]) -> list[Clip]:
    names = lines[0].split("\t") if lines else []
    if "audio" not in names:
        raise CompressionError(f'{path}: its first line must name the columns, "audio" and "text" among them')
    clips = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != len(names):
            raise CompressionError(f"{path}, line {number}: {len(cells)} columns, the first line names {len(names)}")
        entry = dict(zip(names, cells, strict=True))
        clips.append(_entry(path, number, entry["audio"], entry.get("text") or None))
    return clips


def _entry(path: Path, number: int, audio: object, text: object) -> Clip:
    if not isinstance(audio, str) or not audio or not isinstance(text, str | None):
        raise CompressionError(
            f'{path}, line {number}: "audio" must be a file, and "text" what is said in it, if given'
        )
    file = path.parent / Path(audio).expanduser()
    if not file.is_file():
        raise CompressionError(f"{path}, line {number}: {file} is not there")
    return _with_text(file) if text is None else Clip(file, " ".join(text.split()))


def split_clips(source: Source) -> tuple[list[Clip], list[Clip]]:
    """(clips for calibration, clips for evaluation).

    Evaluation gets every tenth clip, none of fewer than ten, and of more than 640 clips 64, spread evenly.

    Raises CompressionError as `find_clips`.
    """
    clips = find_clips(source)
    count = min(len(clips) // SET_ASIDE, MOST_SET_ASIDE)
    spread = max(len(clips), SET_ASIDE * MOST_SET_ASIDE)
    judged = [(k + 1) * spread // MOST_SET_ASIDE - 1 for k in range(count)]
    left = set(range(len(clips))).difference(judged)
    return [clips[k] for k in sorted(left)], [clips[k] for k in judged]
