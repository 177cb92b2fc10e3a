"""Audio from paths, bytes, file objects, named contents and arrays, in every format and sample type."""

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_clips import FORMATS, LOSSLESS, encode, speech

from cai_runtime.audio import open_audio
from cai_runtime.errors import AudioError, AudioSourceError, UnsupportedAudioError

RATE = 16_000


@pytest.fixture(scope="module")
def clip():
    return speech()


@pytest.fixture(scope="module")
def wide():
    """The clip at 48 kHz, the right channel half as loud as the left: their average is 3/4."""
    samples = speech(48_000)
    return np.stack([samples, samples / 2], 1)


def read(source, *args, **options):
    with open_audio(source, *args, **options) as stream:
        return stream.read()


def likeness(found, wanted, most_delay=1_200):
    """The highest correlation of a second of `wanted` with what was found about there: codecs shift by some milliseconds."""
    part = wanted[3 * RATE : 4 * RATE]
    around = found[3 * RATE - most_delay : 4 * RATE + most_delay]
    sums = np.correlate(around, part, "valid")
    squares = np.cumsum(np.concatenate([[0.0], around.astype(np.float64) ** 2]))
    norms = np.sqrt((squares[len(part) :] - squares[: -len(part)]) * np.square(part).sum())
    return float((sums / norms).max())


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_of_the_reference(suffix, wide, clip, tmp_path):
    container, codec = FORMATS[suffix]
    data = encode(wide, 48_000, container, codec, video=suffix == ".mp4")
    (tmp_path / f"a{suffix}").write_bytes(data)
    (tmp_path / "a.txt").write_bytes(data)
    with open_audio(tmp_path / f"a{suffix}") as stream:
        blocks = list(stream)
        assert stream.damage is None and stream.duration == pytest.approx(len(clip) / RATE, abs=0.15)
    found = np.concatenate(blocks)
    assert found.dtype == np.float32 and stream.samples_read == len(found) and len(blocks) > 1
    assert len(found) == pytest.approx(len(clip), abs=0.08 * RATE)
    assert likeness(found, clip) > 0.96  # a codec may delay by a part of a sample; bit rates differ between PyAVs
    assert np.square(found).mean() == pytest.approx(np.square(clip * 0.75).mean(), rel=0.15)
    if suffix in LOSSLESS:
        assert np.abs(found - read(wide, 48_000)).max() < 1e-4
    # A wrong name changes nothing.
    assert np.array_equal(read(tmp_path / "a.txt"), found)
    assert np.array_equal(read(("speech.png", data, "image/png")), found)


class Pipe:
    """Bytes that can be read once, in pieces of any size."""

    def __init__(self, data):
        self._data = io.BytesIO(data)

    def read(self, size=-1):
        return self._data.read(min(size, 1_000) if size > 0 else -1)


@pytest.mark.parametrize("suffix", [".flac", ".mp3", ".m4a"])
def test_every_source(suffix, clip, tmp_path):
    data = encode(clip, RATE, *FORMATS[suffix])
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    wanted = read(data)
    behind = io.BytesIO(b"other content" + data)
    behind.seek(len(b"other content"))
    for source in (
        path, str(path), bytearray(data), memoryview(data), behind, Pipe(data), io.BufferedReader(io.BytesIO(data)),
        ("a", data), (None, path), ("a", io.BytesIO(data)), ("a", data, "audio/x"), ("a", data, "audio/x", {}),
    ):  # fmt: skip
        assert np.array_equal(read(source), wanted), source
    assert not behind.closed
    with path.open("rb", buffering=0) as file:
        assert np.array_equal(read(file), wanted)
        assert not file.closed
    with open_audio(data) as stream:
        next(stream)
    assert stream.damage is None  # closed early, not cut


def test_arrays(clip):
    assert np.array_equal(read(clip, RATE), clip)
    assert np.array_equal(read((clip, RATE)), clip)
    both = np.stack([clip, -clip / 2])
    for array in (both, both.T, both.astype(np.float64), np.asfortranarray(both)):
        assert np.abs(read(array, np.int64(RATE)) - clip / 4).max() < 1e-6
    for kind, step in ((np.int8, 2**-7), (np.int16, 2**-15), (np.int32, 2**-22), (np.float16, 2**-11)):
        whole = np.dtype(kind).kind == "i"
        array = (clip * (2.0 ** (8 * np.dtype(kind).itemsize - 1) if whole else 1)).astype(kind)
        assert np.abs(read(array, RATE) - clip).max() <= step, kind
    assert np.abs(read((clip * 128 + 128).astype(np.uint8), RATE) - clip).max() <= 2**-7
    slow = open_audio(clip[:8_000], 8_000.0)
    assert slow.duration == 1.0 and len(slow.read()) == RATE
    original = clip.copy()
    for block in open_audio(clip, RATE):
        block[:] = 0
    assert np.array_equal(clip, original)  # blocks are copies


@pytest.mark.parametrize(
    ("container", "subtype", "step"),
    [
        ("WAV", "PCM_U8", 2**-7), ("WAV", "PCM_16", 2**-15), ("WAV", "PCM_24", 1e-6), ("WAV", "PCM_32", 1e-6),
        ("WAV", "FLOAT", 1e-6), ("WAV", "DOUBLE", 1e-6),
        ("WAV", "ALAW", 0.04), ("WAV", "ULAW", 0.04), ("AIFF", "PCM_16", 2**-15),
        ("FLAC", "PCM_24", 1e-6), ("CAF", "PCM_16", 2**-15), ("W64", "PCM_16", 2**-15), ("RF64", "PCM_16", 2**-15),
    ],
)  # fmt: skip
def test_every_sample_type(container, subtype, step, clip):
    for channels in (1, 6):
        file = io.BytesIO()
        soundfile.write(file, np.stack([clip] * channels, 1), RATE, format=container, subtype=subtype)
        found = read(file.getvalue())
        assert found.shape == clip.shape and np.abs(found - clip).max() <= step


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 96_000, 192_000])
def test_every_rate_in_blocks_equals_the_whole(rate):
    import soxr

    samples = speech(rate)
    found, whole = read(samples, rate), soxr.resample(samples, rate, RATE)
    assert abs(len(found) - len(whole)) <= 1
    shortest = min(len(found), len(whole))
    assert np.abs(found[:shortest] - whole[:shortest]).max() < 1e-4


@pytest.mark.parametrize(("container", "codec"), [("matroska", "flac"), ("wv", "wavpack"), ("matroska", "pcm_f32le")])
def test_eight_channels_of_pyav(container, codec, clip):
    channels = np.stack([clip * (k % 3) for k in range(8)], 1)
    assert np.abs(read(encode(channels, RATE, container, codec)) - channels.mean(1)).max() < 0.02


def test_a_track_that_starts_late_keeps_the_times_of_the_file(clip):
    late = read(encode(clip, RATE, "matroska", "flac", video=True, start=2.0))
    assert len(late) == pytest.approx(len(clip) + 2 * RATE, abs=0.01 * RATE)
    assert np.abs(late[: int(1.9 * RATE)]).max() == 0 and np.abs(late[-len(clip) :] - clip).max() < 1e-3


class Failing(io.BytesIO):
    """Fails once a part is read."""

    def read(self, size=-1):
        if self.tell() > 20_000:
            raise OSError("the disk is gone")
        return super().read(size)


@pytest.mark.parametrize("suffix", [".wav", ".mp3"])
def test_a_read_that_fails_is_said(suffix, clip, capfd):
    with pytest.raises(AudioSourceError, match="a call can't be read: OSError: the disk is gone"):
        read(Failing(encode(clip, RATE, *FORMATS[suffix])), name="a call")
    assert capfd.readouterr().err == ""


def wrong_sources(folder: Path):
    (folder / "none.wav").touch()
    finished = io.BytesIO(b"RIFF")
    finished.read()
    closed = io.BytesIO(b"RIFF")
    closed.close()
    return [
        (folder / "absent.mp3", None, "absent.mp3 is not there"),
        ("https://host/a.mp3", None, "download it first"),
        (folder, None, "is a directory"),
        ("a\0b", None, "can't be opened"),
        ("/dev/null", None, "a device"),
        (folder / "none.wav", None, "none.wav is empty: 0 bytes"),
        (b"", None, "the audio of 0 bytes is empty"),
        (("x.wav", b""), None, "x.wav is empty"),
        (finished, None, r"empty: 0 bytes behind position 4: seek\(0\)"),
        (closed, None, "closed"),
        (io.StringIO("RIFF"), None, "open as text"),
        (Pipe(b""), None, "is empty"),
        (None, None, "can't come from NoneType"),
        (17, None, "can't come from int"),
        ([0.0, 1.0], 16_000, "rate is for arrays"),
        ((), None, "a tuple of audio is"),
        (("a", b"b", "c", {}, 5), None, "a tuple of audio is"),
        ((b"a", "b"), None, "a tuple of audio is"),
        (np.zeros(9), None, "needs its rate"),
        (np.zeros(9), "fast", "give a number of samples per second"),
        (np.zeros(9), 0, "0 samples a second"),
        (np.zeros(9), float("nan"), "nan samples a second"),
        (np.zeros(9), 10**400, "samples a second"),
        (np.zeros(9), -(10**400), "samples a second"),
        (np.zeros(0), 16_000, "empty: no samples"),
        (np.zeros((9, 0)), 16_000, "empty: no samples"),
        (np.zeros((2, 3, 4)), 16_000, "3 dimensions"),
        (np.zeros((99, 100)), 16_000, "99 channels"),
        (np.zeros(9, np.int64), 16_000, "dtype int64"),
        (np.zeros(9, complex), 16_000, "dtype complex128"),
        (np.array(["a"]), 16_000, "dtype <U1"),
        (np.array([object()]), 16_000, "dtype object"),
    ]  # fmt: skip


def test_wrong_sources_are_named(tmp_path):
    for source, rate, message in wrong_sources(tmp_path):
        with pytest.raises(AudioError, match=message) as error:
            open_audio(source, rate)
        assert error.value.param == "file"


def test_a_path_has_no_rate(tmp_path):
    with pytest.raises(AudioSourceError, match="rate is for arrays"):
        open_audio(tmp_path, 16_000)


def test_an_async_file_is_named():
    class File:
        async def read(self, size=-1):
            return b"RIFF"

    with pytest.raises(AudioSourceError, match="gives coroutine, not bytes"):
        open_audio(File())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("where", [0, 70_000, 159_000])
def test_samples_that_are_no_numbers_are_refused_by_their_time(bad, where, clip):
    array = clip[: 10 * RATE - 700].astype(np.float64)
    array[min(where, len(array) - 1)] = bad
    file = io.BytesIO()
    soundfile.write(file, array, RATE, format="WAV", subtype="DOUBLE")
    for source, rate in ((array, RATE), (file.getvalue(), None)):
        with pytest.raises(AudioError, match="NaN|infinity|1e\\+30") as error:
            read(source, rate)
        assert error.value.seconds == pytest.approx(where / RATE, abs=0.05)


def test_more_channels_than_anyone_has():
    with pytest.raises(UnsupportedAudioError, match="65 channels"):
        open_audio(np.zeros((1_000, 65)), RATE)
    file = io.BytesIO()
    soundfile.write(file, np.zeros((10, 65)), RATE, format="WAV")
    with pytest.raises(UnsupportedAudioError, match="65 channels"):
        open_audio(file.getvalue())


def test_streams_of_their_own_in_several_threads(clip):
    data = [encode(clip, RATE, *FORMATS[suffix]) for suffix in (".flac", ".m4a", ".ogg", ".mp3")]
    wanted = [read(item) for item in data]
    found: list[np.ndarray | None] = [None] * 8

    def work(k):
        found[k] = read(data[k % 4])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[k], wanted[k % 4]) for k in range(8))


def test_closing_early_and_twice(clip):
    for suffix in (".flac", ".m4a"):
        stream = open_audio(encode(clip, RATE, *FORMATS[suffix]))
        next(stream)
        stream.close()
        stream.close()
        assert list(stream) == []


def test_without_its_packages(clip, monkeypatch):
    import sys

    data = encode(clip, RATE, *FORMATS[".m4a"])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"pip install 'cai-runtime\[audio\]'.*av is not installed"):
        open_audio(data)
    assert len(read(encode_flac(clip))) == len(clip)  # needs soundfile alone
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(AudioError, match=r"needs soxr to get 16000: pip install 'cai-runtime\[audio\]'"):
        open_audio(clip, 44_100).read()


def encode_flac(clip):
    file = io.BytesIO()
    soundfile.write(file, clip, RATE, format="FLAC")
    return file.getvalue()
