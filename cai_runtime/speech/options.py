"""The options of a transcription: their defaults, and one check of all of them. Light to import."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai_runtime.errors import TranscriptionError
from cai_runtime.scalars import as_bool, as_integer, as_number, shown

TASKS = ("transcribe", "translate")
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
CHECKPOINT = -1  # in `suppress_tokens`: the list of the checkpoint


@dataclass(frozen=True)
class Options:
    """How audio is transcribed. Names and defaults are faster-whisper's where it has the option.

    Making one checks and normalizes every value, and raises TranscriptionError with `.param` for a wrong one.

    Attributes:
        task: "transcribe", or "translate" to English.
        language: a code such as "en"; "auto" or None detects it, once a file (English-only models: "en").
        languages: codes that detection chooses from; empty: all of the model.
        multilingual: detect the language of every window anew.
        temperature: tried in this order until a window's text passes the thresholds. 0 searches, others sample.
        beam_size: hypotheses of the beam search at temperature 0; 1 is greedy.
        best_of: samples at temperatures above 0, of which the likeliest is taken.
        patience: beam search goes on until round(beam_size * patience) hypotheses are finished.
        length_penalty: hypotheses are ranked by their sum of log probabilities / length ** length_penalty.
        repetition_penalty: logits of text tokens that this window has are divided by it (multiplied where negative).
        no_repeat_ngram_size: no n text tokens come twice in a window; 0: off.
        compression_ratio_threshold: text that zlib shrinks by more than this factor has failed; None: no such test.
        log_prob_threshold: a text with a lower mean log probability has failed; None: no such test.
        no_speech_threshold: windows with a higher probability of no speech are skipped, unless the mean log probability
            passes its threshold; None: none is skipped.
        condition_on_previous_text: the text before a window is its prompt. Batched windows do not wait for each other:
            each gets the caller's `initial_prompt` instead.
        prompt_reset_on_temperature: text that took a higher temperature is no prompt for what follows.
        initial_prompt: text, or token ids, given as text before the first window (batched: before every window).
        prefix: text that the first window's transcript goes on from (batched: the first window's, too). Not in the result.
        hotwords: text put before the prompt of every window, such as names that occur.
        suppress_blank: the text does not begin with a space alone, or end at once.
        suppress_tokens: ids that never come; -1 stands for the checkpoint's list. Control tokens never come anyhow.
        without_timestamps: no timestamp tokens: one segment a window, and windows follow each other without a gap.
        max_initial_timestamp: seconds into the window at which its first segment starts at the latest.
        max_new_tokens: tokens of a window at most; None: what the model's positions leave.
        word_timestamps: times of words, by cross-attention.
        prepend_punctuations, append_punctuations: characters that belong to the word behind, and before.
        hallucination_silence_threshold: with word times, text that looks invented is dropped where silence longer than
            this many seconds surrounds it; None: off.
        vad: None: off. A dict of `VadOptions`' fields (or True): only speech found by voice activity detection is heard.
        batched: windows of the file are decoded together, `windows_together` at a time.
        windows_together: see `batched`.
        clip_timestamps: seconds, in pairs of start and end; only these clips are heard; the last may lack its end. As
            text: "0,10,20,30".
        seed: of the samples. None is 0: the same audio gives the same text.
    """

    task: str = "transcribe"
    language: str | None = None
    languages: tuple[str, ...] = ()
    multilingual: bool = False
    temperature: tuple[float, ...] = TEMPERATURES
    beam_size: int = 5
    best_of: int = 5
    patience: float = 1.0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    compression_ratio_threshold: float | None = 2.4
    log_prob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    condition_on_previous_text: bool = True
    prompt_reset_on_temperature: float = 0.5
    initial_prompt: str | tuple[int, ...] | None = None
    prefix: str | None = None
    hotwords: str | None = None
    suppress_blank: bool = True
    suppress_tokens: tuple[int, ...] = (CHECKPOINT,)
    without_timestamps: bool = False
    max_initial_timestamp: float = 1.0
    max_new_tokens: int | None = None
    word_timestamps: bool = False
    prepend_punctuations: str = "\"'“¿([{-"
    append_punctuations: str = "\"'.。,，!！?？:：”)]}、"
    hallucination_silence_threshold: float | None = None
    vad: Mapping[str, Any] | None = None
    batched: bool = False
    windows_together: int = 8
    clip_timestamps: tuple[float, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.task not in TASKS:
            raise _wrong("task", self.task, "'transcribe' or 'translate'")
        if self.hallucination_silence_threshold is not None and not self.word_timestamps:
            raise TranscriptionError(
                "hallucination_silence_threshold needs word_timestamps=True", param="hallucination_silence_threshold"
            )

    @property
    def clips(self) -> list[tuple[float, float]]:
        """(start, end) of each clip in seconds; the end of the last may be infinity."""
        points = list(self.clip_timestamps) or [0.0]
        if len(points) % 2:
            points.append(math.inf)
        return list(zip(points[::2], points[1::2], strict=True))


def _wrong(name: str, value: Any, allowed: str) -> TranscriptionError:
    return TranscriptionError(f"{name} is {shown(value)}; it must be {allowed}", param=name)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "a text")
    return value


def _text_or_none(name: str, value: Any) -> str | None:
    return None if value is None else _text(name, value)


def _language(name: str, value: Any) -> str | None:
    """A code in lower case; None for detection."""
    code = _text_or_none(name, value)
    return None if code is None or code.strip().lower() in ("", "auto") else code.strip().lower()


def _languages(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise _wrong(name, value, "a list of language codes")
    return tuple(_text(name, code).strip().lower() for code in value)


def _flag(name: str, value: Any) -> bool:
    found = as_bool(value)
    if found is None:
        raise _wrong(name, value, "True or False")
    return found


def _number(least: float = -math.inf, most: float = math.inf, *, above: bool = False, none: bool = False) -> Any:
    """A check for a finite number in [least, most]; above: greater than `least`. none: or None."""
    bounds = [f"above {least:g}" if above else f"at least {least:g}"] if least > -math.inf else []
    bounds += [f"at most {most:g}"] if most < math.inf else []
    allowed = " ".join(["a number", " and ".join(bounds)]).strip() + (", or None" if none else "")

    def check(name: str, value: Any) -> float | None:
        if value is None and none:
            return None
        number = as_number(value)
        if number is None or not least <= number <= most or (above and number == least):
            raise _wrong(name, value, allowed)
        return float(number)

    return check


def _whole(least: int, most: int, *, none: bool = False) -> Any:
    """A check for an integer in [least, most]. none: or None."""

    def check(name: str, value: Any) -> int | None:
        if value is None and none:
            return None
        number = as_integer(value)
        if number is None or not least <= number <= most:
            raise _wrong(name, value, f"an integer from {least} to {most}" + (", or None" if none else ""))
        return number

    return check


def _temperatures(name: str, value: Any) -> tuple[float, ...]:
    single = as_number(value) is not None
    values = (value,) if single else value
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise _wrong(name, value, "a number from 0 to 2, or a list of them")
    found = tuple(_number(0, 2)(name, item) for item in values)
    if not found:
        raise _wrong(name, value, "a list of at least one number")
    return found


def _prompt(name: str, value: Any) -> str | tuple[int, ...] | None:
    if value is None or isinstance(value, str):
        return value or None
    ids = _ids(name, value)
    if any(token < 0 for token in ids):
        raise _wrong(name, value, "a text, or a list of token ids")
    return ids or None


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    numbers = [] if isinstance(value, (str, bytes)) or not isinstance(value, Iterable) else list(value)
    ids = [as_integer(item) for item in numbers]
    if None in ids or (not ids and not isinstance(value, Sequence)) or isinstance(value, (str, bytes)):
        raise _wrong(name, value, "a list of token ids")
    return tuple(item for item in ids if item is not None)


def _suppressed(name: str, value: Any) -> tuple[int, ...]:
    ids = _ids(name, value)
    if any(token < CHECKPOINT for token in ids):
        raise _wrong(name, value, "a list of token ids, or -1 for the checkpoint's list")
    return ids


def _clips(name: str, value: Any) -> tuple[float, ...]:
    allowed = "seconds in rising order, start and end in turn, such as '0,10,20,30'"
    if value is None:
        return ()
    if isinstance(value, str):
        parts: list[Any] = [part for part in value.split(",") if part.strip()]
        try:
            values = [float(part) for part in parts]
        except ValueError:
            raise _wrong(name, value, allowed) from None
    elif isinstance(value, Iterable):
        values = list(value)
    else:
        raise _wrong(name, value, allowed)
    points = [float(point) for item in values if (point := as_number(item)) is not None and point >= 0]
    if len(points) < len(values) or points != sorted(points):
        raise _wrong(name, value, allowed)
    return tuple(points)


def _vad(name: str, value: Any) -> Mapping[str, Any] | None:
    if value is None or value is False:
        return None
    if value is True:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong(name, value, "None, True, or a dict of VadOptions' fields")
    return dict(value)


_CHECKS: dict[str, Any] = {
    "task": _text,
    "language": _language,
    "languages": _languages,
    "multilingual": _flag,
    "temperature": _temperatures,
    "beam_size": _whole(1, 64),
    "best_of": _whole(1, 64),
    "patience": _number(0, 64, above=True),
    "length_penalty": _number(-10, 10),
    "repetition_penalty": _number(0, 100, above=True),
    "no_repeat_ngram_size": _whole(0, 1000),
    "compression_ratio_threshold": _number(0, none=True),
    "log_prob_threshold": _number(none=True),
    "no_speech_threshold": _number(none=True),
    "condition_on_previous_text": _flag,
    "prompt_reset_on_temperature": _number(),
    "initial_prompt": _prompt,
    "prefix": _text_or_none,
    "hotwords": _text_or_none,
    "suppress_blank": _flag,
    "suppress_tokens": _suppressed,
    "without_timestamps": _flag,
    "max_initial_timestamp": _number(0, 30),
    "max_new_tokens": _whole(1, 1 << 20, none=True),
    "word_timestamps": _flag,
    "prepend_punctuations": _text,
    "append_punctuations": _text,
    "hallucination_silence_threshold": _number(0, none=True),
    "vad": _vad,
    "batched": _flag,
    "windows_together": _whole(1, 1024),
    "clip_timestamps": _clips,
    "seed": _whole(-(1 << 63), (1 << 64) - 1, none=True),
}
