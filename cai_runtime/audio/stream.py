"""Audio of any source as a stream of 16 kHz samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cai_runtime.audio.decode import (
    BLOCK,
    Blocks,
    Decoder,
    MissingPackage,
    Refused,
    check_shape,
    decoders,
    looks_like,
    mono,
)
from cai_runtime.audio.mel import RATE
from cai_runtime.audio.source import ByteSource, open_bytes
from cai_runtime.errors import (
    AudioPackageError,
    AudioSourceError,
    EmptyAudioError,
    NonFiniteAudioError,
    UnreadableAudioError,
    UnsupportedAudioError,
)

LARGEST = 2.0**31  # of any sample: integers of 32 bits that were never scaled
HEAD = 4096  # bytes that an error's message is made from


class AudioStream:
    """Iterates over blocks of fp32 [samples], mono at 16 kHz, of any sizes; each is the caller's to keep. Once only.

    A context manager. Iterating raises NonFiniteAudioError, and AudioSourceError for a read that fails. Not for several
    threads at once; streams of their own are independent.
    """

    def __init__(self, blocks: Blocks, label: str, *, decoder: Decoder | None = None, source: ByteSource | None = None):
        self.name = label
        self.samples_read = 0  # samples at 16 kHz given so far
        self.duration: float | None = (
            decoder.duration if decoder else None
        )  # seconds, as the header claims; None: no claim
        self._decoder, self._source = decoder, source
        self._blocks = _resampled(_checked(blocks, label), label)

    @property
    def damage(self) -> str | None:
        """What the input lost, found so far: truncated, or parts that don't decode. None for a whole input."""
        return self._decoder.damage if self._decoder else None

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        block = next(self._blocks)
        self.samples_read += len(block)
        return block

    def read(self) -> np.ndarray:
        """All that is left, fp32 [samples]."""
        return np.concatenate([np.empty(0, np.float32), *self])

    def close(self) -> None:
        """Release the decoder, and the file unless the caller opened it. Again: nothing."""
        self._blocks = iter(())
        if self._decoder:
            self._decoder.close()
        if self._source:
            self._source.close()

    def __enter__(self) -> AudioStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_audio(source: object, rate: float | None = None, *, name: str | None = None) -> AudioStream:
    """Open audio as a stream of mono samples at 16 kHz; channels are averaged.

    source:
        a path; bytes; a binary file object, read from its position on and left open;
        (name, one of these[, content type[, headers]]), as the openai client takes it;
        a numpy array [samples], or of channels too, the shorter side being the channels, with its rate: integers up to 32
        bits are scaled to -1..1, floats are taken as they are. Also (array, rate).
    rate: samples per second of an array, needed there and allowed nowhere else.
    name: what messages call the source; default its own name.

    A file's content decides how it is decoded, never its name. What is whole of a damaged file is given, see
    `AudioStream.damage`.

    Raises AudioError, as one of: AudioSourceError, EmptyAudioError, UnreadableAudioError (NoAudioTrackError of video without
    sound), UnsupportedAudioError, NonFiniteAudioError, AudioPackageError.
    """
    if isinstance(source, tuple) and len(source) == 2 and hasattr(source[0], "__array__") and rate is None:
        source, rate = source
    if hasattr(source, "__array__"):
        return _of_array(source, rate, name or "the array")
    if rate is not None:
        raise AudioSourceError("rate is for arrays of samples: a file says its own. Leave it out")
    data = open_bytes(source, name)
    try:
        return _of_bytes(data)
    except BaseException:
        data.close()
        raise


def _of_bytes(data: ByteSource) -> AudioStream:
    """The stream of the first decoder that finds a sample."""
    refused: list[Refused] = []
    empty = False
    for open_decoder in decoders(data.head(HEAD)):
        data.seek(0)
        try:
            decoder = open_decoder(data)
        except Refused as e:
            refused.append(e)
            continue
        try:
            blocks = decoder.blocks()
            first = next((block for block in blocks if len(block[1])), None)
            if first is not None:
                return AudioStream(_chained(first, blocks), data.label, decoder=decoder, source=data)
        except BaseException:
            decoder.close()
            raise
        decoder.close()
        if decoder.damage:
            refused.append(Refused(decoder.damage))
        else:
            empty = True
    if empty:
        raise EmptyAudioError(f"{data.label} is empty: no samples")
    reasons = "; ".join(map(str, refused))
    missing = any(isinstance(e, MissingPackage) for e in refused)
    seems = looks_like(data.head(HEAD))
    if seems:
        raise UnreadableAudioError(f"{data.label} is no audio: it looks like {seems}")
    if missing:
        raise AudioPackageError(f"{data.label} can't be decoded: pip install 'cai-runtime[audio]' ({reasons})")
    if data.head(8)[4:] == b"ftyp":
        reasons = f"an MP4 without its index, which is written last: was it cut off? {reasons}"
    raise UnreadableAudioError(
        f"{data.label} can't be decoded as audio: it may be damaged, encrypted, or of an unknown format ({reasons})"
    )


def _of_array(source: Any, rate: Any, label: str) -> AudioStream:
    try:
        values = np.asarray(source)
    except Exception as e:
        raise AudioSourceError(f"{label} can't be read as a numpy array: {e}") from e
    if rate is None:
        raise AudioSourceError(f"{label} needs its rate, in samples per second")
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.integer | np.floating):
        raise AudioSourceError(f"the rate of {label} is {rate!r}: give a number of samples per second")
    rate = float(min(max(rate, -1), 2**63))  # an integer may be too large for a float
    if values.ndim not in (1, 2):
        raise UnsupportedAudioError(f"{label} has {values.ndim} dimensions: give [samples], or [samples, channels]")
    if not values.size:
        raise EmptyAudioError(f"{label} is empty: no samples")
    if values.ndim == 1:
        values = values[None]
    elif values.shape[1] <= values.shape[0]:
        values = values.T
    check_shape(label, rate, len(values))
    mono(values[:, :0], label)  # the dtype, before the first block
    blocks = ((rate, mono(values[:, at : at + BLOCK], label)) for at in range(0, values.shape[1], BLOCK))
    stream = AudioStream(blocks, label)
    stream.duration = values.shape[1] / rate
    return stream


def _chained(first: tuple[float, np.ndarray], rest: Blocks) -> Blocks:
    yield first
    yield from rest


def _checked(blocks: Blocks, label: str) -> Blocks:
    """The same blocks, without NaN, infinity and samples that no scale of audio has."""
    seconds = 0.0
    for rate, block in blocks:
        # NaN makes the comparison false as well.
        if len(block) and not (block.min() >= -LARGEST and block.max() <= LARGEST):
            wrong = int(np.argmin(np.abs(block) <= LARGEST))
            at = seconds + wrong / rate
            value = "NaN" if np.isnan(block[wrong]) else "infinity" if np.isinf(block[wrong]) else f"{block[wrong]:g}"
            raise NonFiniteAudioError(
                f"{label} holds {value} at {at:.3f} s: samples are numbers from -1 to 1. Repair it first",
                seconds=at,
            )
        seconds += len(block) / rate
        yield rate, block


def _resampled(blocks: Blocks, label: str) -> Iterator[np.ndarray]:
    """Blocks at 16 kHz. A rate may change on the way."""
    resampler, current = None, float(RATE)
    for rate, block in blocks:
        if rate != current:
            if resampler is not None:
                yield from _nonempty(resampler.resample_chunk(np.empty(0, np.float32), last=True))
            resampler, current = (_resampler(rate, label) if rate != RATE else None), rate
        if resampler is None:
            yield np.array(block, np.float32)
        else:
            yield from _nonempty(resampler.resample_chunk(np.ascontiguousarray(block)))
    if resampler is not None:
        yield from _nonempty(resampler.resample_chunk(np.empty(0, np.float32), last=True))


def _nonempty(block: np.ndarray) -> Iterator[np.ndarray]:
    if len(block):
        yield block


def _resampler(rate: float, label: str) -> Any:
    try:
        import soxr
    except ImportError as e:
        raise AudioPackageError(
            f"{label} has {rate} samples a second and needs soxr to get {RATE}: pip install 'cai-runtime[audio]'"
        ) from e
    return soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")
