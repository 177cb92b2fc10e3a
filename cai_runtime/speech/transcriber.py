"""A whole file: options checked against the model, then its windows one after the other or several together."""

from __future__ import annotations

import math
from typing import cast

from cai_runtime.errors import TranscriptionError
from cai_runtime.speech.job import Job
from cai_runtime.speech.options import Options
from cai_runtime.speech.prompts import Prompts, SpeechText
from cai_runtime.speech.record import Record
from cai_runtime.speech.sequential import in_sequence
from cai_runtime.speech.steps import Done, SampledWindows, Steps, Windows
from cai_runtime.speech.together import together
from cai_runtime.speech.tokens import SpeechTokens


def transcribe_steps(windows: Windows, tokens: SpeechTokens, options: Options, text: SpeechText) -> Steps:
    """A generator that transcribes audio; see `steps` for what it yields.

    It returns the Transcript. Errors of the audio and of requests pass through. No audio is read before the first step.

    windows: with `samples` too, as `MelWindows` has them, where the options ask for voice activity detection.

    Raises at once: TranscriptionError for options that the model can't serve, AudioPackageError where voice activity
    detection is asked for without the extra `vad`.
    """
    check(tokens, options)
    record, clips = Record(text), options.clips
    if options.vad is not None:
        from cai_runtime.speech.heard import SpeechOnly  # needs the audio package

        speech = SpeechOnly(cast(SampledWindows, windows), options.vad, clips)
        windows = speech
        record.clock, clips = speech.clock, [(0.0, math.inf)]
    return _steps(Job(windows, tokens, options, text, Prompts(tokens, options, text), record, clips))


def check(tokens: SpeechTokens, options: Options) -> None:
    """Raise TranscriptionError if the model can't do what the options ask for."""
    for code in options.languages:
        if code not in (tokens.languages or ("en",)):
            known = ", ".join(sorted(tokens.languages)) or "en"
            raise TranscriptionError(f"languages has {code!r}; this model has {known}", param="languages")
    if tokens.is_multilingual:
        tokens.start(options.language or next(iter(tokens.languages)), options.task)
    else:
        tokens.start(options.language or "en", options.task)
    if beyond := [token for token in options.suppress_tokens if token >= tokens.vocabulary]:
        raise TranscriptionError(
            f"suppress_tokens has the id {beyond[0]}; the model's ids end at {tokens.vocabulary - 1}",
            param="suppress_tokens",
        )
    if options.word_timestamps and not tokens.alignment_heads:
        raise TranscriptionError(
            "this checkpoint names no alignment_heads, nor the sizes to choose them by; word times need them",
            param="word_timestamps",
            capability="word_timestamps",
        )


def _steps(job: Job) -> Steps:
    options, record = job.options, job.record
    if options.language is not None or not job.tokens.is_multilingual:
        job.language = options.language or "en"
    record.begin(job.prompts.initial)
    yield from together(job) if options.batched else in_sequence(job)
    language = job.language or next(iter(job.tokens.languages))  # of no audio at all, no language is detected
    duration = job.windows.seconds_known
    yield Done([], duration, duration)
    return record.transcript(options.task, language, job.language_probability, duration, words=options.word_timestamps)
