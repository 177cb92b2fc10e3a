"""Every error that the library raises on purpose. Light to import: no torch, no transformers.

The errors of the API (BadRequestError and its kin, with a status code and a JSON body) are in `cai_runtime.api.errors`.
"""

from __future__ import annotations

from pathlib import Path


class CaiError(Exception):
    """Base of every error that cai_runtime raises on purpose."""


class OptionTypeError(CaiError, TypeError):
    """An option of a client or an engine is of a wrong type, or there is no option of this name."""


class OptionValueError(CaiError, ValueError):
    """An option of a client or an engine has a value that it can't have. The message names what is allowed."""


class CheckpointError(CaiError):
    """A checkpoint can't be used. `.file` and `.tensor` name the place; the message says what is wrong and what to do."""

    def __init__(self, message: str, *, file: str | Path | None = None, tensor: str | None = None):
        self.file = str(file) if file is not None else None
        self.tensor = tensor
        place = ", ".join(
            part for part in (f"file {self.file}" if self.file else "", f"tensor {tensor}" if tensor else "") if part
        )
        super().__init__(f"{message} ({place})" if place else message)


class MissingFileError(CheckpointError):
    """A file that the checkpoint needs is not there."""


class TruncatedFileError(CheckpointError):
    """A file ends before its header says it does."""


class CorruptFileError(CheckpointError):
    """A file's content contradicts its format: an unreadable header, overlapping tensors, values out of their range."""


class TensorMissingError(CheckpointError):
    """A tensor that a module needs is in no shard."""


class TensorShapeError(CheckpointError):
    """A tensor's shape is not what its module's kind and rank imply."""


class TensorDtypeError(CheckpointError):
    """A tensor's dtype is not what its module's store implies."""


class NonFiniteTensorError(CheckpointError):
    """A tensor holds NaN or infinity."""


class InvalidPivotError(CheckpointError):
    """An interpolative module's pivot is not a permutation of its output rows."""


class UnknownKindError(CheckpointError):
    """A module's kind is not one that this version reads."""


class UnknownStoreError(CheckpointError):
    """A core's store is not one that this version reads."""


class UnknownVersionError(CheckpointError):
    """The checkpoint's format_version is not one that this version reads."""


class InvalidConfigError(CheckpointError):
    """config.json or quantization_config is malformed or contradicts itself."""


class KeepError(CheckpointError, ValueError):
    """The `keep` asked for is not one that the checkpoint opens at: it is not elastic, or does not go as low or as high."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint can't be written: the place is taken, the disk is full, or the system refused. Nothing is left."""


class BatchFileError(CaiError):
    """A batch's input can't be read, or its output not be written: the place is taken by something else, or by the results
    of other requests, another process writes there, or the system refused. What was written before is whole."""


class UnsupportedModelError(CaiError):
    """The architecture, or an option of it, is not one that this version runs."""


class SourceError(CaiError):
    """A named model or file can't be fetched. The message lists every place tried and each failure."""


class ConversionError(CaiError):
    """A GGUF or other foreign file can't be converted. The message names the file and the part."""


class AudioError(CaiError):
    """An audio input can't be used. The message names the input, what is wrong and what to do. `.param` is the API's
    parameter that it came by."""

    def __init__(self, message: str, *, param: str = "file"):
        self.param = param
        super().__init__(message)


class AudioSourceError(AudioError):
    """There is nothing to decode: no such file, a directory, text instead of bytes, a wrong type, a failed read."""


class EmptyAudioError(AudioError):
    """The input has no bytes, or no samples."""


class UnreadableAudioError(AudioError):
    """No decoder reads the input: it is no audio, of an unknown format, encrypted, or damaged from its start."""


class NoAudioTrackError(UnreadableAudioError):
    """The container holds other tracks, such as video, and none of audio."""


class UnsupportedAudioError(AudioError):
    """The sampling rate, the number of channels or the type of the samples is not one that this version takes."""


class NonFiniteAudioError(AudioError):
    """A sample is NaN, infinite, or too large for any scale of audio. `.seconds` is its time."""

    def __init__(self, message: str, *, seconds: float, param: str = "file"):
        self.seconds = seconds
        super().__init__(message, param=param)


class AudioPackageError(AudioError):
    """A package that the input needs is not installed. The message names it and the extra that brings it."""


class CompressionError(CaiError):
    """A model can't be compressed as asked."""


class KernelError(CaiError):
    """A kernel backend is missing or refuses its arguments."""


class BenchmarkError(CaiError):
    """A measurement can't be made as asked, or failed."""


class EngineError(CaiError):
    """Base of what a running engine raises for one request."""


class EngineClosedError(EngineError):
    """The engine was closed before or while the request ran."""


class RequestTooLargeError(EngineError):
    """The request can never fit: its tokens exceed the context length or the whole KV cache budget."""


class MemoryBudgetError(EngineError):
    """The model or its KV cache does not fit the memory budget that was given."""


class RequestAbortedError(EngineError):
    """The request was aborted by its caller."""


class ConversationError(CaiError):
    """A conversation can't be put to this model. `.param` is the place, such as `messages[1].content`; `.capability` names
    what the model or this version lacks (`image`, `audio`, `chat`, `tools`), if that is the reason; `.code` is the API's
    code of the error, "invalid_value" unless there is a better one."""

    def __init__(
        self, message: str, *, param: str = "messages", capability: str | None = None, code: str | None = None
    ):
        self.param = param
        self.capability = capability
        self.code = code or (f"{capability}_not_supported" if capability else "invalid_value")
        super().__init__(message)

    @classmethod
    def missing(cls, place: str, note: str = "") -> ConversationError:
        """Something must be given. note: what follows its name."""
        return cls(f"Missing required parameter: '{place}'{note}.", param=place, code="missing_required_parameter")

    @classmethod
    def unknown(cls, place: str) -> ConversationError:
        """Something can't be given."""
        return cls(f"Unknown parameter: '{place}'.", param=place, code="unknown_parameter")


class TranscriptionError(CaiError, ValueError):
    """Audio can't be transcribed as asked. `.param` names the option; `.capability` names what the model lacks
    (`transcription`, `translation`), if that is the reason."""

    def __init__(self, message: str, *, param: str | None = None, capability: str | None = None):
        self.param = param
        self.capability = capability
        super().__init__(message)


class InvalidRequestError(EngineError):
    """A request is malformed: no prompt tokens, a token id outside the vocabulary, max_tokens below 0."""


class GrammarError(EngineError):
    """A grammar can't be compiled, takes too much to compile or to follow, or leaves no token. `.param` is the parameter
    that it came from, such as `response_format`, where that is known."""

    def __init__(self, message: str, *, param: str | None = None):
        self.param = param
        super().__init__(message)


class QueueFullError(EngineError):
    """More requests wait than the engine was told to accept. Try again later."""


class RunnerError(EngineError):
    """The model failed on this request. `__cause__` is what it raised; other requests go on."""


class NonFiniteLogitsError(EngineError):
    """The model produced NaN or infinite logits for this request."""
