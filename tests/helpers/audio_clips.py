"""Real speech, encoded in the formats that users send."""

from __future__ import annotations

import io
import struct

import numpy as np

# suffix -> (container, codec): the nine formats of the API's reference
FORMATS = {
    ".flac": ("flac", "flac"),
    ".mp3": ("mp3", "libmp3lame"),
    ".mp4": ("mp4", "aac"),  # with a video track
    ".mpeg": ("mpeg", "mp2"),
    ".mpga": ("mp2", "mp2"),
    ".m4a": ("ipod", "aac"),
    ".ogg": ("ogg", "libopus"),
    ".wav": ("wav", "pcm_s16le"),
    ".webm": ("webm", "libopus"),
}
LOSSLESS = {".flac", ".wav"}


def speech(rate: int = 16_000) -> np.ndarray:
    """Ten seconds of read English, fp32 [samples]."""
    import soundfile
    import soxr

    from cai_runtime.convert.sources import fetch_file

    samples, own = soundfile.read(fetch_file("speech-sample", progress=False), dtype="float32")
    return samples if own == rate else soxr.resample(samples, own, rate)


def encode(
    samples: np.ndarray, rate: int, container: str, codec: str, *, video: bool = False, start: float = 0.0, **options
) -> bytes:
    """A file of samples [samples, channels] or [samples]. video: with a video track of a second. start: seconds at which the
    audio track begins. options: of the container."""
    import av

    channels = 1 if samples.ndim == 1 else samples.shape[1]
    layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[channels]
    out = io.BytesIO()
    with av.open(out, "w", format=container, options={key: str(value) for key, value in options.items()}) as file:
        pictures = file.add_stream("mpeg4", rate=10, width=64, height=64, pix_fmt="yuv420p") if video else None
        track = file.add_stream(codec, rate=rate)
        track.layout = layout
        frame = av.AudioFrame(format="flt", layout=layout, samples=len(samples))
        frame.sample_rate, frame.pts = rate, 0
        frame.planes[0].update(np.ascontiguousarray(samples, np.float32))
        wanted = track.codec_context.codec.audio_formats[0].name
        if pictures:
            for k in range(10):
                picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * k, np.uint8), format="rgb24")
                file.mux(pictures.encode(picture))
            file.mux(pictures.encode(None))
        for converted in av.AudioResampler(format=wanted, layout=layout, rate=rate).resample(frame):
            converted.pts = round(start * rate)
            file.mux(track.encode(converted))
        file.mux(track.encode(None))
    return out.getvalue()


def only_video(container: str, codec: str) -> bytes:
    import av

    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        track = file.add_stream(codec, rate=10, width=64, height=64, pix_fmt="yuv420p")
        for k in range(10):
            file.mux(track.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * k, np.uint8), format="rgb24")))
        file.mux(track.encode(None))
    return out.getvalue()


def wav(data: bytes, *, tag=1, channels=1, rate=16_000, bits=16, claimed: int | None = None) -> bytes:
    """A WAV with any header. claimed: bytes of samples that the header says; default those of data."""
    claimed = len(data) if claimed is None else claimed
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * block & 0xFFFFFFFF, block & 0xFFFF, bits)
    size = min(36 + claimed, 0xFFFFFFFF)
    return (
        b"RIFF"
        + struct.pack("<I", size)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", claimed)
        + data
    )
