"""Decoders of audio files: soundfile (WAV, FLAC, Ogg, MP3 and others), and PyAV (MP4, WebM, MPEG and others).

Both read a `ByteSource` and give blocks of fp32 [samples], channels averaged, each with its rate. The content
decides, never a name.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from cai_runtime.audio.source import ByteSource
from cai_runtime.errors import NoAudioTrackError, UnsupportedAudioError

BLOCK = 1 << 16  # samples of a block, about
TAG = 1 << 16  # bytes from the start in which an MP3's tag is looked for
GAP = 0.2  # seconds that a frame's timestamp must lie behind the samples before it to be filled with silence
BYTES_OF_SECOND = 500  # a file of fewer for each second, silence included, has wrong timestamps: 4 kbit/s
UNKNOWN_SIZE = 0x7FFFF000  # bytes of samples, from here on, in the header of a file that was written without seeking
LOWEST_RATE, HIGHEST_RATE = 1_000, 1_000_000  # samples per second
MOST_CHANNELS = 64

# Formats of PyAV whose headers say a length; that of others is an estimate.
EXACT_FORMATS = frozenset(["mov", "matroska", "flac", "wav", "w64", "aiff", "caf", "wv", "tta", "ape", "avi"])

AV_DTYPES = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "flt": np.float32, "dbl": np.float64}

Blocks = Iterator[tuple[float, np.ndarray]]  # (rate, fp32 [samples])

# What PyAV may open: audio, and video with audio. No playlists or manifests, which name other files and addresses, and no
# subtitles or images, which text and pictures would pass for.
AV_FORMATS = (
    "aac,ac3,aiff,alaw,amr,ape,asf,asf_o,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,gsm,iff,loas,matroska,webm,mlp,mov,mp4,m4a,3gp,"
    "3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,mxf,nut,ogg,oma,qcp,rm,shn,sox,spdif,tak,truehd,tta,voc,w64,wav,wtv,wv,xwma"
)


class Refused(Exception):
    """A decoder can't read this input. The message is its reason."""


class MissingPackage(Refused):
    """The decoder's package is not installed."""


class Decoder(Protocol):
    """One input, decoded once. `damage` says what was lost so far, None if nothing. `duration` is the header's claim."""

    duration: float | None
    damage: str | None

    def blocks(self) -> Blocks: ...

    def close(self) -> None: ...


def check_shape(label: str, rate: float, channels: int) -> None:
    """Raise UnsupportedAudioError for a rate or number of channels that no audio has."""
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise UnsupportedAudioError(
            f"{label} has {rate} samples a second: {LOWEST_RATE} to {HIGHEST_RATE} are possible. Its header may be wrong"
        )
    if not 1 <= channels <= MOST_CHANNELS:
        raise UnsupportedAudioError(f"{label} has {channels} channels: 1 to {MOST_CHANNELS} are possible")


def seconds_or_none(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) and value > 0 else None


class SoundFileDecoder:
    def __init__(self, source: ByteSource):
        """Raises MissingPackage, Refused, UnsupportedAudioError and what `source.check` raises."""
        try:
            import soundfile
        except (ImportError, OSError) as e:  # OSError: without its C library
            raise MissingPackage(f"soundfile is not installed ({e})") from e
        self.damage: str | None = None
        self._source = source
        try:
            self._file = soundfile.SoundFile(source)
        except Exception as e:
            source.check()
            raise Refused(f"soundfile: {_reason(e)}") from e
        try:
            source.check()
            check_shape(source.label, self._file.samplerate, self._file.channels)
        except BaseException:
            self._file.close()
            raise
        frames, rate = self._file.frames, self._file.samplerate
        self._claimed = frames if 0 < frames < 1 << 62 else None
        # libsndfile takes a cut file for a whole one, and notes the size that the header says.
        said = re.search(r"(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", self._file.extra_info)
        if said and int(said[2]) < int(said[1]) < UNKNOWN_SIZE:
            self.damage = f"its header says {said[1]} bytes of samples, and it holds {said[2]}"
        self.duration = seconds_or_none(self._claimed / rate if self._claimed else None)

    def blocks(self) -> Blocks:
        rate, channels = self._file.samplerate, self._file.channels
        buffer = np.empty((max(BLOCK // channels, 1), channels), np.float32)
        count = 0
        while True:
            try:
                found = self._file.read(out=buffer)
            except Exception as e:  # noqa: BLE001
                self._source.check()
                self.damage = f"it can't be decoded beyond {count / rate:.2f} s ({_reason(e)})"
                return
            self._source.check()
            if not len(found):
                break
            count += len(found)
            # The buffer is used again for the next block.
            yield rate, found[:, 0].copy() if channels == 1 else mono(found.T, self._source.label)
        if self._claimed and count < self._claimed:
            self.damage = f"its header says {self._claimed / rate:.2f} s, and it holds {count / rate:.2f} s"

    def close(self) -> None:
        self._file.close()


class AvDecoder:
    def __init__(self, source: ByteSource):
        """Raises MissingPackage, Refused, NoAudioTrackError, UnsupportedAudioError and what `source.check` raises."""
        try:
            import av
        except (ImportError, OSError) as e:
            raise MissingPackage(f"av is not installed ({e})") from e
        self.damage: str | None = None
        self._source = source
        self._origin: float | None = None  # timestamp of the first sample, seconds
        self._seconds = 0.0  # given so far
        tagged = re.search(b"Xing|Info|VBRI", source.head(TAG)) is not None  # an MP3 that says its number of frames
        try:
            # Not `options=`: until PyAV 18 it corrupts memory for formats whose tracks appear late, such as MPEG.
            allowed = {"format_whitelist": AV_FORMATS, "protocol_whitelist": "none"}
            self._container = av.open(source, "r", container_options=allowed, metadata_errors="replace")
        except Exception as e:
            source.check()
            raise Refused(f"PyAV: {_reason(e)}") from e
        try:
            source.check()
            self._stream = self._audio_track()
            self.duration = self._length()
            exact = EXACT_FORMATS | ({"mp3"} if tagged else set())
            self._claimed = self.duration if exact & set(self._container.format.name.split(",")) else None
        except BaseException:
            self._container.close()
            raise

    def _audio_track(self) -> Any:
        streams = self._container.streams
        if not streams.audio:
            # Not stream.type, which ends the process for an unknown one until PyAV 15.
            held = "video only" if streams.video else "other tracks only" if len(streams) else "no track at all"
            raise NoAudioTrackError(f"{self._source.label} has no audio track: it holds {held}")
        best = getattr(streams, "best", None)
        stream = (best("audio") if best else None) or streams.audio[0]
        if stream.codec_context is None:
            raise Refused("PyAV: no decoder for its audio track, which is encrypted or of an unknown codec")
        return stream

    def _length(self) -> float | None:
        stream = self._stream
        if stream.duration and stream.time_base:
            return seconds_or_none(float(stream.duration * stream.time_base))
        return seconds_or_none(self._container.duration / 1e6 if self._container.duration else None)

    def blocks(self) -> Blocks:
        held: list[np.ndarray] = []
        rate = size = 0
        for frame in self._frames():
            samples = _average(frame, self._source.label)
            lag = self._lag(frame, len(samples))
            if held and (lag or size + len(samples) > BLOCK or frame.sample_rate != rate):
                yield rate, np.concatenate(held)
                held, size = [], 0
            rate = frame.sample_rate
            for begin in range(0, lag, BLOCK):
                yield rate, np.zeros(min(BLOCK, lag - begin), np.float32)
            held.append(samples)
            size += len(samples)
        if held:
            yield rate, np.concatenate(held)

    def _lag(self, frame: Any, count: int) -> int:
        """Samples of silence before a frame of `count`, whose track starts late or pauses. Times stay those of the file."""
        silence = 0
        if frame.time is not None:
            if self._origin is None:
                start = self._container.start_time
                self._origin = start / 1e6 if start is not None else frame.time
            lag = frame.time - self._origin - self._seconds
            # A damaged timestamp, or length, may lie hours ahead.
            most = min(self._source.size / BYTES_OF_SECOND, self.duration or math.inf) + 1 - self._seconds
            if GAP < lag <= most:
                silence = round(lag * frame.sample_rate)
                self._seconds += lag
            elif abs(lag) > GAP:  # the timestamps start anew
                self._origin += lag
        self._seconds += count / frame.sample_rate
        return silence

    def _frames(self) -> Iterator[Any]:
        """Every frame that decodes; `damage` counts the packets that don't."""
        import av

        packets = bad = 0
        demuxed = self._container.demux(self._stream)
        while True:
            packet = reason = None
            try:
                packet = next(demuxed, None)
            except IndexError:  # PyAV on a packet of a track that appears on the way: read on behind it
                demuxed = self._container.demux(self._stream)
                continue
            except Exception as e:  # noqa: BLE001
                reason = _reason(e)
            self._source.check()
            packets += 1
            frames = []
            try:
                frames = packet.decode() if packet is not None else self._stream.codec_context.decode(None)
            except (av.EOFError, av.BlockingIOError):
                pass
            except Exception as e:  # noqa: BLE001
                reason = _reason(e)
            if reason:
                bad += 1
                self.damage = f"{bad} of its {packets} packets can't be decoded ({reason})"
            yield from frames
            if packet is None:
                break
        if not bad and self._claimed and self._seconds < 0.98 * self._claimed - 0.5:
            self.damage = f"its header says {self._claimed:.2f} s, and it holds {self._seconds:.2f} s"

    def close(self) -> None:
        with suppress(Exception):  # nothing is written: a failed close loses nothing
            self._container.close()


def _average(frame: Any, label: str) -> np.ndarray:
    """A frame's samples as fp32 [samples], channels averaged, integers scaled to -1..1."""
    name = frame.format.name
    channels = len(frame.layout.channels)
    check_shape(label, frame.sample_rate, channels)
    kind = AV_DTYPES.get(name.removesuffix("p"))
    if kind is None:
        raise UnsupportedAudioError(f"{label} has samples of the type {name}: convert it to WAV or FLAC first")
    # Neither frame.planes nor to_ndarray: for eight channels or more they read beyond the pointers that there are.
    if name.endswith("p"):  # planar: a channel after the other
        planes = [_plane(frame, k, kind, frame.samples) for k in range(channels)]
        return mono(np.stack(planes) if channels > 1 else planes[0][None], label)
    packed = _plane(frame, 0, kind, frame.samples * channels)
    return mono(packed.reshape(-1, channels).T, label)


def _plane(frame: Any, number: int, kind: Any, count: int) -> np.ndarray:
    """The first `count` samples of a plane."""
    from av.audio.plane import AudioPlane

    plane: Any = AudioPlane(frame, number)  # a buffer, which its types don't say
    return np.frombuffer(plane, kind, count)


def mono(values: np.ndarray, label: str) -> np.ndarray:
    """fp32 [samples] of samples [channels, samples], channels averaged, integers scaled to -1..1.

    Raises UnsupportedAudioError for a dtype that has no agreed scale.
    """
    kind = values.dtype
    if kind.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):  # such samples are refused by their time
            average = values[0] if len(values) == 1 else values.mean(axis=0, dtype=np.promote_types(kind, np.float32))
            return average.astype(np.float32, copy=False)
    if kind not in (np.uint8, np.int8, np.int16, np.int32):
        raise UnsupportedAudioError(
            f"{label} has samples of dtype {kind}: uint8, int8, int16, int32 and floats (-1 to 1) have a scale"
        )
    scale = 2.0 ** (8 * kind.itemsize - 1)
    average = values.mean(axis=0, dtype=np.float64 if kind.itemsize == 4 else np.float32)
    if kind == np.uint8:
        average -= scale
    return (average / scale).astype(np.float32, copy=False)


def _reason(error: BaseException) -> str:
    """A decoder's message without number, the input's name and line breaks."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    return text.split(">: ", 1)[-1].rstrip(".")


def decoders(head: bytes) -> tuple[Callable[[ByteSource], Decoder], ...]:
    """The decoders to try, in order, for content that starts with `head`.

    MPEG audio and CAF go to PyAV, since libsndfile's decoders of them (libmpg123, ALAC) print warnings; to soundfile only
    without PyAV.
    """
    mpeg = head.startswith(b"ID3") or (len(head) > 1 and head[0] == 0xFF and head[1] >= 0xE0)
    if not mpeg and not head.startswith(b"caff"):
        return SoundFileDecoder, AvDecoder
    return (AvDecoder,) if importlib.util.find_spec("av") else (SoundFileDecoder,)


def looks_like(head: bytes) -> str | None:
    """What content that is no audio seems to be, for messages; None if nothing is known."""
    for magic, what in (
        (b"\x89PNG", "a PNG image"),
        (b"\xff\xd8\xff", "a JPEG image"),
        (b"GIF8", "a GIF image"),
        (b"BM", "a BMP image"),
        (b"%PDF", "a PDF document"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"\x1f\x8b", "a gzip archive"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!", "a RAR archive"),
        (b"-----BEGIN PGP", "an encrypted file"),
        (b"Salted__", "an encrypted file"),
        (b"\x7fELF", "a program"),
    ):
        if head.startswith(magic):
            return what
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "a WebP image"
    start = head.lstrip()[:16].lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "an HTML page"
    if start.startswith(b"#extm3u"):
        return "a playlist, which names audio and holds none"
    if not head.strip(b"\0"):
        return "zeros"
    try:
        text = head.decode()
    except UnicodeDecodeError as e:
        if e.start < len(head) - 4:  # not only the last character, cut through
            return None
        text = head[: e.start].decode()
    return "text" if all(char.isprintable() or char in "\r\n\t\f" for char in text) else None
