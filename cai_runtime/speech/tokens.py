"""The control tokens of a Whisper checkpoint, by name: no id is known beforehand (large-v3 shifted them by one)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cai_runtime.errors import InvalidConfigError, MissingFileError, TranscriptionError
from cai_runtime.speech.heads import word_heads

_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_MULTILINGUAL_VOCABULARY = 51865  # tokens; OpenAI's own criterion: an English-only model has fewer
_FILES = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class SpeechTokens:
    """What transcribing needs to know of a checkpoint beside its weights.

    Attributes:
        sot, eot: <|startoftranscript|>, <|endoftext|>. Text tokens have ids below `eot`.
        sot_prev, no_speech, no_timestamps: <|startofprev|>, <|nospeech|> or <|nocaptions|>, <|notimestamps|>.
        timestamp_begin: <|0.00|>; times follow it in steps of 0.02 s.
        transcribe, translate, sot_lm: the tasks; None where the checkpoint has none.
        languages: code -> token; empty for an English-only model.
        suppress_tokens, begin_suppress_tokens: ids that never come, and that do not come first.
        alignment_heads: (layer, head) of the cross-attention that words are aligned by; see `words.word_heads`.
        max_initial_timestamp: steps of 0.02 s; the checkpoint's, for whoever wants it.
        max_context: positions of the decoder. positions: of the encoder, in a window. mels: of a frame.
    """

    sot: int
    eot: int
    sot_prev: int
    no_speech: int
    no_timestamps: int
    timestamp_begin: int
    transcribe: int | None = None
    translate: int | None = None
    sot_lm: int | None = None
    languages: Mapping[str, int] = field(default_factory=dict)
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    alignment_heads: tuple[tuple[int, int], ...] = ()
    max_initial_timestamp: int | None = None
    max_context: int = 448
    positions: int = 1500
    mels: int = 80

    @property
    def is_multilingual(self) -> bool:
        return bool(self.languages)

    @property
    def vocabulary(self) -> int:
        """Tokens that there are: the last is the time 30.00. A checkpoint may pad its logits."""
        return self.timestamp_begin + self.positions + 1

    @property
    def controls(self) -> tuple[int, ...]:
        """Tokens that are never a part of a transcript: all that stand before the times, but the end and languages."""
        named = (
            self.sot,
            self.sot_prev,
            self.sot_lm,
            self.no_speech,
            self.no_timestamps,
            self.transcribe,
            self.translate,
        )
        return tuple(token for token in named if token is not None)

    def start(self, language: str, task: str) -> list[int]:
        """The tokens that begin a transcript in this language (a code).

        Raises TranscriptionError: the model lacks the language, or can't translate.
        """
        if not self.is_multilingual:
            if task == "translate":
                raise TranscriptionError(
                    "this model is English-only; translation needs a multilingual one",
                    param="task",
                    capability="translation",
                )
            if language != "en":
                raise TranscriptionError(
                    f"this model is English-only; language must be 'en', not {language!r}", param="language"
                )
            return [self.sot]
        token = self.translate if task == "translate" else self.transcribe
        if token is None:
            raise TranscriptionError(f"this model has no token for task {task!r}", param="task")
        return [self.sot, self.language_token(language), token]

    def language_token(self, code: str) -> int:
        """Raises TranscriptionError, naming the languages that there are."""
        if code not in self.languages:
            known = ", ".join(sorted(self.languages)) or "en"
            raise TranscriptionError(
                f"language {code!r} is not one of the model's; there are {known}, and 'auto'", param="language"
            )
        return self.languages[code]

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> SpeechTokens:
        """Read a Hugging Face directory: generation_config.json first, then the tokenizer's names, then config.json.

        Raises:
            MissingFileError: the directory has none of these files.
            InvalidConfigError: a token can be found in none of them, or a value is malformed. The message names it.
        """
        return _Checkpoint(Path(path)).read()


class _Checkpoint:
    """The files of a checkpoint, while its control tokens are looked up."""

    def __init__(self, path: Path):
        self.path = path
        found = {name: _read(path / name) for name in _FILES}
        self._generation, self._config = (found[name] or {} for name in _FILES)
        self._names = _token_names(path)
        if not self._names and not any(found.values()):
            raise MissingFileError("the checkpoint has no generation_config.json, config.json or tokenizer", file=path)

    def read(self) -> SpeechTokens:
        tasks = self._generation.get("task_to_id") or {}
        if not isinstance(tasks, dict):
            raise InvalidConfigError("task_to_id is not an object", file=self.path)
        no_timestamps = self._token("<|notimestamps|>", "no_timestamps_token_id")
        first = self._names.get("<|0.00|>", no_timestamps + 1)  # transformers takes the next id, too
        return SpeechTokens(
            sot=self._token("<|startoftranscript|>", "decoder_start_token_id"),
            eot=self._token("<|endoftext|>", "eos_token_id"),
            sot_prev=self._token("<|startofprev|>", "prev_sot_token_id"),
            # The token before <|notimestamps|>: of two spellings, and in no config.
            no_speech=self._names.get("<|nospeech|>", self._names.get("<|nocaptions|>", no_timestamps - 1)),
            no_timestamps=no_timestamps,
            timestamp_begin=first,
            transcribe=self._optional(tasks.get("transcribe", self._names.get("<|transcribe|>")), "transcribe"),
            translate=self._optional(tasks.get("translate", self._names.get("<|translate|>")), "translate"),
            sot_lm=self._names.get("<|startoflm|>"),
            languages=self._languages(),
            suppress_tokens=self._ids("suppress_tokens"),
            begin_suppress_tokens=self._ids("begin_suppress_tokens"),
            alignment_heads=self._word_heads(),
            max_initial_timestamp=self._optional(
                self._value("max_initial_timestamp_index"), "max_initial_timestamp_index"
            ),
            max_context=self._size("max_target_positions", 448),
            positions=self._size("max_source_positions", 1500),
            mels=self._size("num_mel_bins", 80),
        )

    def _value(self, key: str) -> Any:
        return self._generation[key] if self._generation.get(key) is not None else self._config.get(key)

    def _token(self, name: str, key: str) -> int:
        """The id of a token that must be there."""
        value = self._value(key)
        if isinstance(value, list) and value:  # several tokens that end the text: the first is the model's own
            value = value[0]
        if value is None:
            value = self._names.get(name)
        if value is None:
            raise InvalidConfigError(
                f"{name} is not to be found: neither {key} in {_FILES[0]} nor a token of the tokenizer", file=self.path
            )
        return self._integer(value, key)

    def _integer(self, value: Any, key: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InvalidConfigError(f"{key} is {value!r}; it must be an integer, 0 or more", file=self.path)
        return value

    def _optional(self, value: Any, key: str) -> int | None:
        return None if value is None else self._integer(value, key)

    def _size(self, key: str, default: int) -> int:
        size = self._integer(self._config.get(key, default), key)
        if size < 1:
            raise InvalidConfigError(f"{key} is {size}; it must be at least 1", file=self.path)
        return size

    def _ids(self, key: str) -> tuple[int, ...]:
        value = self._value(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise InvalidConfigError(f"{key} is not a list of token ids", file=self.path)
        return tuple(self._integer(item, key) for item in value)

    def _languages(self) -> dict[str, int]:
        """Code to token; none for an English-only model, whose tokenizer names languages all the same."""
        stored = self._generation.get("lang_to_id")
        if stored is not None and not isinstance(stored, dict):
            raise InvalidConfigError("lang_to_id is not an object", file=self.path)
        many = self._generation.get("is_multilingual")
        if many is None:
            many = bool(stored) or self._size("vocab_size", len(self._names) or 1) >= _MULTILINGUAL_VOCABULARY
        if not many:
            return {}
        names = stored or self._names
        found = {m[1]: self._integer(at, name) for name, at in names.items() if (m := _LANGUAGE.fullmatch(name))}
        if not found:
            raise InvalidConfigError(
                "the model is multilingual, but its languages' tokens are not to be found", file=self.path
            )
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def _word_heads(self) -> tuple[tuple[int, int], ...]:
        """The heads that time words; none if the checkpoint names none and does not say how many there are."""
        stored = self._value("alignment_heads")
        pairs: list[Any] = [] if stored is None else stored if isinstance(stored, list) else [None]
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise InvalidConfigError("alignment_heads is not a list of [layer, head]", file=self.path)
        named = tuple((self._integer(a, "alignment_heads"), self._integer(b, "alignment_heads")) for a, b in pairs)
        if any(self._config.get(key) is None for key in ("decoder_layers", "decoder_attention_heads")):
            return named
        return word_heads(self._size("decoder_layers", 1), self._size("decoder_attention_heads", 1), named)


def _token_names(path: Path) -> dict[str, int]:
    """Content to id of the tokenizer's added tokens, of whichever files are there."""
    names: dict[str, int] = {}
    added = (_read(path / "tokenizer_config.json") or {}).get("added_tokens_decoder")
    if isinstance(added, dict):
        names |= {
            str(item.get("content")): int(at) for at, item in added.items() if isinstance(item, dict) and at.isdigit()
        }
    plain = _read(path / "added_tokens.json") or {}
    names |= {name: at for name, at in plain.items() if isinstance(at, int)}
    listed = (_read(path / "tokenizer.json") or {}).get("added_tokens")
    if isinstance(listed, list):
        names |= {str(item.get("content")): item["id"] for item in listed if isinstance(item.get("id"), int)}
    return names


def _read(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise InvalidConfigError(f"the file can't be read as JSON: {e}", file=path) from e
    if not isinstance(stored, dict):
        raise InvalidConfigError("the file holds no JSON object", file=path)
    return stored
