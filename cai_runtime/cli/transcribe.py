"""Transcribe audio and video files, many at once, to text, subtitles or JSON.

Each file's output is written beside it, or into --output DIR, whole or not at all. A file whose output is there already
is skipped, so that the same command goes on after an interruption. A file that fails stops no other: it is named at the
end, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cai_runtime.api.transcriptions.reply import SpeechReply
    from cai_runtime.client import AsyncClient

HELP = "transcribe audio files to text, subtitles or JSON"
SUFFIXES = {"text": ".txt", "srt": ".srt", "vtt": ".vtt", "tsv": ".tsv", "json": ".json", "verbose_json": ".json"}
STANDARD = "-"  # input and output
TOGETHER = 8


def _temperature(text: str) -> float | list[float]:
    return [float(part) for part in text.split(",")] if "," in text else float(text)


# Options of the request: the flag's type, its placeholder, and its help.
OPTIONS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "language": (str, "L", 'such as "de" or "german"; default: detected'),
    "prompt": (str, "TEXT", "text that comes before the audio's: names, spelling, style"),
    "hotwords": (str, "WORDS", "words to listen for"),
    "temperature": (_temperature, "T", "0 to 1, or a list such as 0,0.4; default: 0, and higher where that fails"),
    "beam_size": (int, "N", "hypotheses of the beam search; default: 5"),
    "best_of": (int, "N", "samples above temperature 0; default: 5"),
    "patience": (float, "P", "of the beam search; default: 1"),
    "length_penalty": (float, "P", "of the beam search; default: 1"),
    "no_speech_threshold": (float, "P", "default: 0.6"),
    "log_prob_threshold": (float, "P", "default: -1"),
    "compression_ratio_threshold": (float, "R", "default: 2.4"),
    "windows_together": (int, "N", "windows of a file, with --batched; default: 8"),
    "clip_timestamps": (str, "S,S...", "seconds of start and end of what is transcribed; default: all"),
    "seed": (int, "N", "of samples"),
}
SWITCHES = {
    "word_timestamps": "find the times of words, which json holds",
    "vad": "hear only what voice activity detection finds to be speech (extra `vad`)",
    "batched": "transcribe windows of a file side by side",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cai_runtime.cli.options import add_model_arguments

    parser.add_argument("files", metavar="FILE", nargs="+", help="audio, or video with sound; - reads standard input")
    parser.add_argument(
        "--model", metavar="MODEL", help="a Whisper model, as of other commands; default: the largest on this machine"
    )
    parser.add_argument("--format", choices=SUFFIXES, default="text", help="default: text; json is the API's object")
    parser.add_argument("--output", metavar="DIR", help="where outputs go; - prints that of one file")
    parser.add_argument("--force", action="store_true", help="transcribe files again whose outputs are there")
    parser.add_argument("--keep-suffix", action="store_true", help="name outputs talk.mp3.srt, and not talk.srt")
    parser.add_argument(
        "--together", type=int, default=TOGETHER, metavar="N", help=f"files at once; default: {TOGETHER}"
    )
    parser.add_argument(
        "--task", choices=("transcribe", "translate"), default="transcribe", help="translate: to English"
    )
    for name, (kind, place, text) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=place, help=text)
    for name, text in SWITCHES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    parser.add_argument(
        "--condition-on-previous-text",
        action=argparse.BooleanOptionalAction,
        help="a window's text is the prompt of the next; default: yes",
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds that a segment may take; default: no limit")
    parser.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="show a bar; default: on a terminal only"
    )
    add_model_arguments(parser)


@dataclass(frozen=True)
class Job:
    """A file and the place of its output; None: standard output."""

    name: str
    target: Path | None


@dataclass
class Outcome:
    """What became of the files: `failed` and `damaged` by name, with the reason."""

    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    jobs = _jobs(args)
    outcome = Outcome(skipped=sum(not args.force and _is_there(job) for job in jobs))
    jobs = [job for job in jobs if args.force or not _is_there(job)]
    try:
        if jobs:
            asyncio.run(_transcribe_all(args, jobs, outcome))
    except KeyboardInterrupt:
        print(f"\ninterrupted after {outcome.done} files: the same command goes on from there", file=sys.stderr)
        raise
    for name, reason in outcome.damaged.items():
        print(f"warning: {name}: {reason}", file=sys.stderr)
    for name, reason in outcome.failed.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    if args.output != STANDARD or outcome.failed:
        skipped = f", {outcome.skipped} skipped: their outputs are there (--force)" if outcome.skipped else ""
        print(f"{outcome.done} transcribed, {len(outcome.failed)} failed{skipped}", file=sys.stderr)
    return 1 if outcome.failed else 0


def _jobs(args: argparse.Namespace) -> list[Job]:
    """Raises OptionValueError: two outputs, or an output and an input, would be one file."""
    from cai_runtime.errors import OptionValueError

    if args.together < 1:
        raise OptionValueError(f"--together must be at least 1, got {args.together}")
    if args.output == STANDARD or args.files == [STANDARD]:
        if len(args.files) > 1:
            raise OptionValueError("--output - prints one file, not several: give a directory")
        if args.output in (None, STANDARD):
            args.output = STANDARD
            return [Job(args.files[0], None)]
    if STANDARD in args.files:
        raise OptionValueError("standard input can't be given beside files, or with a directory: use --output -")
    taken: dict[Path, str] = {Path(name).resolve(): name for name in args.files}
    jobs = []
    for name in dict.fromkeys(args.files):
        path = Path(name)
        folder = path.parent if args.output is None else Path(args.output)
        target = folder / ((path.name if args.keep_suffix else path.stem) + SUFFIXES[args.format])
        if other := taken.get(target.resolve()):
            hint = "" if args.keep_suffix else ", or add --keep-suffix"
            raise OptionValueError(
                f"the output of {name} would be {target}, which {other} has: give another --output{hint}"
            )
        taken[target.resolve()] = f"the output of {name}"
        jobs.append(Job(name, target))
    return jobs


def _is_there(job: Job) -> bool:
    return job.target is not None and job.target.exists()


async def _transcribe_all(args: argparse.Namespace, jobs: list[Job], outcome: Outcome) -> None:
    """Raises the first error that is not one file's own, such as of the model."""
    from cai_runtime.progress import progress_bar

    async with _client(args) as client:
        await client.engine()  # whose errors are told once
        seconds = await asyncio.to_thread(_durations, args, jobs)
        bar = progress_bar("transcribe", total=round(sum(seconds.values())) or None, unit="s", show=args.progress)
        left = iter(jobs)
        with bar:

            async def work() -> None:
                for job in left:
                    await _transcribe(client, args, job, seconds.get(job.name), bar, outcome)

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(args.together, len(jobs))):
                        group.create_task(work())
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None


def _client(args: argparse.Namespace) -> AsyncClient:
    from cai_runtime.api.host import ResolvedModel
    from cai_runtime.api.models import require_speech
    from cai_runtime.cli.options import client_options, find_model
    from cai_runtime.client import AsyncClient

    name, path = find_model(args.model or _largest(), pull=args.pull)
    if path is not None:
        require_speech(ResolvedModel(name, path))  # before its weights are loaded
    options = {**client_options(args), "timeout": args.timeout, "progress": args.progress}
    return AsyncClient(name, models={} if path is None else {name: path}, **options)


def _largest() -> str:
    """The Whisper model on this machine whose weights have most bytes. Raises SourceError if there is none."""
    from cai_runtime.api.host import read_config
    from cai_runtime.cli.options import fetched_models
    from cai_runtime.convert.named import NAMED
    from cai_runtime.errors import SourceError
    from cai_runtime.models.registry import is_speech

    def size(path: Path) -> int:
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))

    found = {name: size(path) for name, path in fetched_models().items() if is_speech(read_config(path))}
    if not found:
        known = ", ".join(f"`cai pull {name}`" for name in NAMED if name.startswith("whisper"))
        raise SourceError(
            f"there is no Whisper model on this machine: fetch one with {known}, or name one with --model"
        )
    return max(found, key=lambda name: found[name])


def _durations(args: argparse.Namespace, jobs: list[Job]) -> dict[str, float]:
    """Seconds of the files, as far as their headers say; for the bar alone."""
    from cai_runtime.audio.stream import open_audio
    from cai_runtime.errors import AudioError

    if not (sys.stderr.isatty() if args.progress is None else args.progress):
        return {}
    found: dict[str, float] = {}
    for job in jobs:
        if job.name == STANDARD:
            continue
        try:
            with open_audio(job.name) as stream:
                if stream.duration is not None:
                    found[job.name] = stream.duration
        except AudioError:  # its transcription will say it
            continue
    return found


async def _transcribe(
    client: AsyncClient, args: argparse.Namespace, job: Job, seconds: float | None, bar: Any, outcome: Outcome
) -> None:
    """One file, from its audio to its output. seconds: of audio, as its header says; None: it does not say."""
    from cai_runtime.api.errors import APIError, APITimeoutError, BadRequestError, InternalServerError

    audio = client.audio.transcriptions if args.task == "transcribe" else client.audio.translations
    shown, most = 0.0, math.inf if seconds is None else seconds
    try:
        source: Any = ("standard input", sys.stdin.buffer) if job.name == STANDARD else job.name
        async with await audio.create(file=source, stream=True, **_request(args)) as events:
            async for event in events:
                if event.type == "transcript.text.segment":
                    heard = max(shown, min(event.end, most))
                    bar.update(heard - shown)
                    shown = heard
                elif event.type == "transcript.text.done":
                    reply = event.transcription
        text = _formatted(reply, args.format)
        if job.target is None:
            sys.stdout.write(text)
        else:
            await asyncio.to_thread(_write, job.target, text)
    except (APIError, OSError) as error:
        own = isinstance(error, (OSError, APITimeoutError, InternalServerError)) or (
            isinstance(error, BadRequestError) and error.param == "file"
        )
        if not own:  # every other file would fail with it
            raise
        outcome.failed[job.name] = str(error)
    else:
        outcome.done += 1
        if reply.damage:
            outcome.damaged[job.name] = reply.damage
    if seconds is not None:
        bar.update(max(0.0, seconds - shown))


def _request(args: argparse.Namespace) -> dict[str, Any]:
    """The parameters of the request that were given."""
    given = {name: getattr(args, name) for name in (*OPTIONS, "condition_on_previous_text")}
    return {
        **{name: value for name, value in given.items() if value is not None},
        **{name: True for name in SWITCHES if getattr(args, name)},
    }


def _formatted(reply: SpeechReply, name: str) -> str:
    from cai_runtime.speech.subtitles import FORMATTERS

    return FORMATTERS[name](reply) if name in FORMATTERS else reply.model_dump_json(indent=2) + "\n"


def _write(target: Path, text: str) -> None:
    """Write a file whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
