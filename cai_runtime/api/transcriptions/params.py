"""The parameters of transcriptions and translations, checked before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Annotated, Any, Literal, Required

import numpy as np
from pydantic import Field, PlainValidator, SkipValidation, TypeAdapter, with_config
from pydantic_core import PydanticCustomError

from cai_runtime.api.errors import as_api_errors, invalid
from cai_runtime.api.params import STRICT, CallOptions, Unsupported, validated
from cai_runtime.api.transcriptions.languages import AUTO, language_code
from cai_runtime.api.values import Flag, ModelName, Whole, without_arrays
from cai_runtime.audio.vad import VadOptions
from cai_runtime.errors import OptionTypeError, OptionValueError
from cai_runtime.scalars import as_bool, as_integer, as_number, shown
from cai_runtime.speech.options import TEMPERATURES, Options

Task = Literal["transcribe", "translate"]
FORMATS = ("json", "verbose_json", "text", "srt", "vtt")
MAX_RATE = 10_000_000  # samples per second
SERVER_VAD = ("threshold", "silence_duration_ms", "prefix_padding_ms")  # fields of a `chunking_strategy`


@dataclass(frozen=True)
class AudioFile:
    """What `file` names; neither opened nor read yet.

    source: a path, bytes, an open file, or an array of samples. name: of the file, as the caller says; None: not said.
    rate: of an array, samples per second; None: not said.
    """

    source: Any = field(repr=False)
    name: str | None = None
    rate: int | None = None

    @property
    def is_array(self) -> bool:
        return hasattr(self.source, "shape")


def _audio_file(value: Any) -> AudioFile:
    if not isinstance(value, tuple):
        found = _source(value)
        return AudioFile(found, _name_of(found))
    if len(value) == 2 and hasattr(value[0], "shape"):  # as soundfile.read returns it
        rate = as_integer(value[1])
        if rate is None:
            raise PydanticCustomError("file_type", "must give an array's rate as an integer")
        return AudioFile(_source(value[0]), rate=rate)
    # (name, content), (name, content, type) and (name, content, type, headers) of the `openai` package
    if not 2 <= len(value) <= 4 or not isinstance(value[0], str | None):
        raise PydanticCustomError("file_type", "must be (name, content) or (samples, rate) where it is a tuple")
    found = _source(value[1])
    return AudioFile(found, value[0] or _name_of(found))


def _source(value: Any) -> Any:
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (str, bytes, os.PathLike)) or callable(getattr(value, "read", None)):
        return value
    if hasattr(value, "shape") and hasattr(value, "__array__"):
        return value
    raise PydanticCustomError(
        "file_type",
        "must be a path, bytes, a file opened in binary mode, (name, bytes), or an array of samples with its rate",
    )


def _name_of(value: Any) -> str | None:
    """Of a path or an open file; that of a pipe is a number."""
    name = value if isinstance(value, (str, os.PathLike)) else getattr(value, "name", None)
    path = os.fspath(name) if isinstance(name, (str, os.PathLike)) else None
    return path if isinstance(path, str) else None


def _temperature(value: Any) -> tuple[float, ...]:
    """The temperatures to try in turn. The number 0 stands for all, as OpenAI's does; the list [0] does not."""
    value = without_arrays(value)
    numbers = [as_number(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    if not numbers or any(n is None or not 0 <= n <= 1 for n in numbers):
        raise PydanticCustomError("out_of_range", "must be a number from 0 to 1, or a list of such numbers")
    found = tuple(float(number) for number in numbers if number is not None)
    return TEMPERATURES if found == (0.0,) and not isinstance(value, (list, tuple)) else found


def _chunking(value: Any) -> dict[str, Any]:
    """The options of voice activity detection that a `chunking_strategy` stands for."""
    if isinstance(value, str) and value == "auto":
        return {}
    if not isinstance(value, Mapping) or value.get("type") != "server_vad":
        raise PydanticCustomError("chunking", 'must be "auto" or an object of the type "server_vad"')
    given = {name: without_arrays(item) for name, item in value.items() if name != "type" and item is not None}
    if wrong := [name for name in given if name not in SERVER_VAD]:
        raise PydanticCustomError("chunking", "has an unknown field {name}", {"name": shown(wrong[0])})
    try:
        found = VadOptions.server(**given)
    except (OptionTypeError, OptionValueError) as error:
        raise PydanticCustomError("chunking", "can't be used: {why}", {"why": str(error)}) from None
    return {name: item for name, item in asdict(found).items() if item is not None}


def _vad(value: Any) -> bool | dict[str, Any]:
    if (flag := as_bool(value)) is not None:
        return flag
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise PydanticCustomError("vad_type", "must be true, false, or an object of options")
    given = {name: without_arrays(item) for name, item in value.items()}
    try:
        VadOptions.of(given)
    except (OptionTypeError, OptionValueError) as error:
        raise PydanticCustomError("vad", "can't be used: {why}", {"why": str(error)}) from None
    return given


def _keywords(value: Any) -> list[str]:
    found: list[Any] = list(value) if isinstance(value, (list, tuple)) else [None]
    if not all(isinstance(word, str) and word.strip() for word in found):
        raise PydanticCustomError("keywords_type", "must be a list of texts that are not empty")
    return found


def _granularities(value: Any) -> list[str]:
    found: list[Any] = list(value) if isinstance(value, (list, tuple)) else [None]
    if not all(isinstance(item, str) and item in ("word", "segment") for item in found):
        raise PydanticCustomError("granularities_type", 'must be a list of "word" and "segment"')
    return found


def _format(value: Any) -> str:
    if isinstance(value, str) and value in FORMATS:
        return value
    why = ": speakers are not told apart" if isinstance(value, str) and value == "diarized_json" else ""
    raise PydanticCustomError("format", "must be one of {known}{why}", {"known": ", ".join(FORMATS), "why": why})


# What `speech.Options` checks.
Count = Annotated[int, SkipValidation]
Real = Annotated[float, SkipValidation]
Switch = Annotated[bool, SkipValidation]
Text = Annotated[str, SkipValidation]
Given = str | os.PathLike[str] | bytes | IO[bytes] | tuple[Any, ...] | np.ndarray


class SpeechParams(CallOptions, total=False):
    """Keyword arguments of `transcriptions.create` and `translations.create`, besides `stream`.

    file: the audio, or a video by its audio track (.flac, .mp3, .mp4, .mpeg, .mpga, .m4a, .ogg, .wav, .webm): a path,
        bytes, a file opened in binary mode, (name, bytes), or an array of samples [samples] or [samples, channels] with
        `rate`; (array, rate), as soundfile returns it, works too.
    rate: of an array, samples per second.
    model: a name given with `Client(models=...)`, a checkpoint directory or a catalogue id, of a Whisper model. Default:
        the client's.
    prompt: text that comes before the audio's: names, spelling and style follow it. initial_prompt: the same.
    keywords: words and phrases to listen for. hotwords: the same as one text.
    language: of the speech: a code such as "de", or a name such as "german"; "auto" detects it, and so does leaving it
        out, except where the model knows English alone. languages: those that detection chooses from.
    temperature: 0 to 1. 0, the default, searches, and a window that comes out badly is tried again at 0.2, 0.4 ... 1. A
        list is tried in turn: [0] never samples.
    response_format: "json", "verbose_json", "text", "srt" or "vtt". The reply is the verbose object in every case;
        `cai_runtime.speech.subtitles` makes text and subtitles of it.
    timestamp_granularities: a list of "segment" and "word". Segments are always there, words if asked for.
        word_timestamps: true asks for them, too.
    chunking_strategy: "auto", or {"type": "server_vad", "threshold": 0 to 1, "silence_duration_ms", "prefix_padding_ms"}:
        only speech found by voice activity detection is heard. vad: the same as true, or a mapping of
        `audio.vad.VadOptions`. Default: all is heard.
    timeout, extra_headers, extra_query, extra_body: as in chat.

    Every other one is an option of `cai_runtime.speech.options.Options`, which says what it does, its default and range.
    None means "not given" here: thresholds are switched off by a value that nothing reaches.
    """

    file: Required[Annotated[Given, PlainValidator(_audio_file)]]
    rate: Annotated[Whole, Field(ge=1, le=MAX_RATE)] | None
    model: ModelName | None
    prompt: str | None
    initial_prompt: Annotated[str | Sequence[int], SkipValidation] | None
    keywords: Annotated[Sequence[str], PlainValidator(_keywords)] | None
    hotwords: Text | None
    language: str | None
    languages: Annotated[Sequence[str], SkipValidation] | None
    temperature: Annotated[float | Sequence[float], PlainValidator(_temperature)] | None
    response_format: Annotated[str, PlainValidator(_format)] | None
    timestamp_granularities: Annotated[Sequence[str], PlainValidator(_granularities)] | None
    word_timestamps: Switch | None
    chunking_strategy: Annotated[str | Mapping[str, Any], PlainValidator(_chunking)] | None
    vad: Annotated[bool | Mapping[str, Any], PlainValidator(_vad)] | None
    multilingual: Switch | None
    beam_size: Count | None
    best_of: Count | None
    patience: Real | None
    length_penalty: Real | None
    repetition_penalty: Real | None
    no_repeat_ngram_size: Count | None
    compression_ratio_threshold: Real | None
    log_prob_threshold: Real | None
    no_speech_threshold: Real | None
    condition_on_previous_text: Switch | None
    prompt_reset_on_temperature: Real | None
    prefix: Text | None
    suppress_blank: Switch | None
    suppress_tokens: Annotated[Sequence[int], SkipValidation] | None
    without_timestamps: Switch | None
    max_initial_timestamp: Real | None
    max_new_tokens: Count | None
    prepend_punctuations: Text | None
    append_punctuations: Text | None
    hallucination_silence_threshold: Real | None
    batched: Switch | None
    windows_together: Count | None
    clip_timestamps: Annotated[str | Sequence[float], SkipValidation] | None
    seed: Count | None


@with_config(STRICT)
class _Speech(SpeechParams, total=False):
    stream: Flag | None


# Parameters of the schema that are not served: why, and the values that ask for nothing.
UNSUPPORTED: Unsupported = {
    "include": ("tokens' log probabilities are not given: segments have 'avg_logprob', words 'probability'", ([], ())),
    "known_speaker_names": ("speakers are not told apart", ([], ())),
    "known_speaker_references": ("speakers are not told apart", ([], ())),
}
_ADAPTER: TypeAdapter[Any] = TypeAdapter(_Speech)
_NAMES = frozenset(_Speech.__annotations__)
_SAME = (("prompt", "initial_prompt"), ("keywords", "hotwords"), ("chunking_strategy", "vad"))
# Those that are no options of the speech package.
_APART = ("file", "rate", "model", "stream", "response_format", "timestamp_granularities", *CallOptions.__annotations__)


@dataclass(frozen=True)
class SpeechRequest:
    """A checked call.

    language: as given; the model says whether it knows it. options: all others. stream: events are wanted. params:
    `timeout`, if it was given. begun: the work that was begun for it; another engine goes on with that.
    """

    model: str | None
    file: AudioFile
    language: str | None
    options: Options
    stream: bool
    params: Mapping[str, Any]
    begun: list[Any] = field(default_factory=list, compare=False)


def parse_speech(task: Task, params: Mapping[str, Any]) -> SpeechRequest:
    """Check a call before anything is opened.

    Raises:
        BadRequestError: naming the parameter at fault.
    """
    unsupported = UNSUPPORTED if task == "transcribe" else {}
    given = validated(_ADAPTER, params, names=_NAMES | frozenset(unsupported), unsupported=unsupported)
    for one, other in _SAME:
        if one in given and other in given:
            raise invalid(other, f"can't be given beside '{one}', which says the same")
    options = {name: value for name, value in given.items() if name not in _APART and name != "language"}
    if "prompt" in options:
        options["initial_prompt"] = options.pop("prompt")
    if "keywords" in options:
        options["hotwords"] = ", ".join(options.pop("keywords"))
    if "chunking_strategy" in options:
        options["vad"] = options.pop("chunking_strategy")
    if "word" in given.get("timestamp_granularities", ()):
        options["word_timestamps"] = True
    if "languages" in options:
        options["languages"] = _language_codes(options["languages"])
    with as_api_errors():
        checked = Options(task=task, **options)
    return SpeechRequest(
        model=given.get("model"),
        file=_with_rate(given["file"], given.get("rate")),
        language=given.get("language"),
        options=checked,
        stream=given.get("stream", False),
        params={"timeout": given["timeout"]} if "timeout" in given else {},
    )


def _language_codes(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise invalid("languages", f"must be a list of codes or names, got {shown(value)}", "invalid_type")
    found = []
    for item in value:
        if not isinstance(item, str) or item.strip().lower() in ("", AUTO):
            raise invalid("languages", f"must hold codes or names of languages, got {shown(item)}", "invalid_type")
        found.append(language_code(item, "languages"))
    return tuple(found)


def _with_rate(file: AudioFile, rate: int | None) -> AudioFile:
    if not file.is_array:
        if rate is not None:
            raise invalid("rate", "goes with an array of samples alone: a file says its own")
        return file
    if rate is not None and file.rate is not None:
        raise invalid("rate", "is given twice, by itself and in 'file'")
    rate = rate or file.rate
    if rate is None:
        raise invalid("rate", "is missing: an array does not say how many samples a second it has")
    if not 1 <= rate <= MAX_RATE:
        raise invalid("rate", f"must be from 1 to {MAX_RATE} samples a second, got {shown(rate)}")
    return AudioFile(file.source, file.name, rate)
