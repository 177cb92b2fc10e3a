"""Content that is no audio, lies, or is damaged: an answer, or a typed error that names what is wrong."""

import io

import numpy as np
import pytest
import soundfile
from audio_clips import FORMATS, encode, only_video, speech, wav
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai_runtime.audio import open_audio
from cai_runtime.errors import (
    AudioError,
    EmptyAudioError,
    NoAudioTrackError,
    UnreadableAudioError,
    UnsupportedAudioError,
)

RATE = 16_000


def second():
    return speech()[RATE : 2 * RATE]


def pcm(samples=None):
    return ((second() if samples is None else samples) * 32767).astype("<i2").tobytes()


def written(container, subtype, samples=None):
    file = io.BytesIO()
    soundfile.write(file, second() if samples is None else samples, RATE, format=container, subtype=subtype)
    return file.getvalue()


NOT_AUDIO = {
    "one byte": (b"\x07", "can't be decoded"),
    "text": (b"Dear all,\nthe file is attached.\n" * 9, "looks like text"),
    "text in another encoding": ("привет\n".encode() * 700, "looks like text"),
    "html": (b"<!DOCTYPE html><p>Not found", "looks like an HTML page"),
    "subtitles": (b"1\n00:00:00,000 --> 00:00:01,000\nhello\n", "looks like text"),
    "playlist": (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n", "a playlist, which names audio and holds none"),
    "list of files": (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "looks like text"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "looks like a PNG image"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(100), "looks like a JPEG image"),
    "pdf": (b"%PDF-1.7\n" + bytes(100), "looks like a PDF document"),
    "zip": (b"PK\x03\x04" + bytes(100), "looks like a ZIP archive"),
    "encrypted": (b"Salted__" + bytes(range(256)), "looks like an encrypted file"),
    "zeros": (bytes(10_000), "looks like zeros"),
    "random": (np.random.default_rng(0).bytes(50_000), "can't be decoded"),
    "start of a wav": (b"RIFF\x10\0\0\0WAVEfmt \x10", "can't be decoded"),
    "start of an mp3": (b"ID3\x04\0\0\0\0\x0f\x7f" + bytes(100), "can't be decoded"),
}


@pytest.mark.parametrize("case", NOT_AUDIO)
def test_what_is_no_audio_is_named(case, capfd):
    content, message = NOT_AUDIO[case]
    with pytest.raises(UnreadableAudioError, match=f"holiday.mp3 .*{message}"):
        open_audio(("holiday.mp3", content))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("header", "error", "message"),
    [
        ({"channels": 0}, UnreadableAudioError, "Channel count is zero"),
        ({"channels": 1_000}, UnsupportedAudioError, "1000 channels"),
        ({"channels": 65_535}, UnreadableAudioError, "Too many channels"),
        ({"rate": 0}, UnreadableAudioError, "can't be decoded"),
        ({"rate": 1}, UnsupportedAudioError, "1 samples a second: 1000 to 1000000"),
        ({"rate": 2**31 - 1}, UnsupportedAudioError, "2147483647 samples a second"),
        ({"bits": 0}, UnreadableAudioError, "can't be decoded"),
        ({"bits": 255}, UnreadableAudioError, "can't be decoded"),
        ({"tag": 0x9999}, UnreadableAudioError, "can't be decoded"),
    ],
)
def test_headers_that_lie_are_refused(header, error, message, capfd):
    with pytest.raises(error, match=message):
        open_audio(wav(pcm(), **header)).read()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("claimed", [0, 32_001, 2**31 - 1, 2**32 - 1])
def test_headers_that_lie_about_the_length_give_what_is_there(claimed):
    """A header that says less than is there is believed but for 0, which a recorder writes first; so is 2**32 - 1."""
    stream = open_audio(wav(pcm(), claimed=claimed))
    assert len(stream.read()) == RATE
    assert bool(stream.damage) == (claimed == 32_001)


def test_no_samples():
    for content in (wav(b""), written("AIFF", "PCM_16", np.zeros(0)), written("OGG", "VORBIS", np.zeros(0))):
        with pytest.raises(EmptyAudioError, match="no samples"):
            open_audio(content)
    assert len(open_audio(wav(pcm(np.full(1, 0.5)))).read()) == 1


def test_silence_is_audio():
    assert np.array_equal(open_audio(wav(bytes(2 * RATE))).read(), np.zeros(RATE))


@pytest.mark.parametrize(("container", "codec"), [("mp4", "mpeg4"), ("webm", "libvpx"), ("avi", "mpeg4")])
def test_video_without_sound(container, codec):
    with pytest.raises(NoAudioTrackError, match="no audio track: it holds video only"):
        open_audio(only_video(container, codec))


@pytest.mark.parametrize(
    "encoded",
    [
        lambda: wav(pcm()),
        lambda: written("FLAC", "PCM_16"),
        lambda: written("AIFF", "PCM_16"),
        lambda: encode(second(), RATE, "mp3", "libmp3lame"),
        lambda: encode(second(), RATE, "webm", "libopus"),
        lambda: encode(second(), RATE, "mp4", "aac", movflags="frag_keyframe+empty_moov"),
    ],
    ids=["wav", "flac", "aiff", "mp3", "webm", "fragmented mp4"],
)
def test_a_cut_file_gives_what_is_whole_and_says_so(encoded, capfd):
    content = encoded()
    whole = open_audio(content)
    wanted = whole.read()
    assert whole.damage is None
    stream = open_audio(content[: len(content) * 2 // 5])
    found = stream.read()
    assert 0.1 * RATE < len(found) < 0.6 * RATE
    assert stream.damage
    assert np.abs(found[: RATE // 10] - wanted[: RATE // 10]).max() < 0.02
    assert capfd.readouterr() == ("", "")


def test_an_mp4_cut_before_its_index():
    content = encode(second(), RATE, "mp4", "aac")
    with pytest.raises(UnreadableAudioError, match="an MP4 without its index, .* was it cut off"):
        open_audio(content[: len(content) // 2])


def test_damage_within_leaves_the_rest():
    content = bytearray(encode(speech(), RATE, "ipod", "aac"))
    content[20_000:21_000] = bytes(1_000)
    stream = open_audio(bytes(content))
    found = stream.read()
    assert "packets can't be decoded" in stream.damage
    assert len(found) > 8 * RATE


def bases():
    """A second of speech in every format that has a decoder of its own."""
    samples = second()
    files = {suffix: encode(samples, RATE, *FORMATS[suffix]) for suffix in FORMATS}
    for container, codec in (
        ("mpegts", "mp2"),
        ("avi", "libmp3lame"),
        ("wv", "wavpack"),
        ("ipod", "alac"),
        ("adts", "aac"),
    ):
        files[f"{container} {codec}"] = encode(samples, RATE, container, codec)
    files["fragments"] = encode(samples, RATE, "mp4", "aac", movflags="frag_keyframe+empty_moov")
    for container, subtype in (
        ("WAV", "FLOAT"),
        ("WAV", "IMA_ADPCM"),
        ("OGG", "VORBIS"),
        ("AIFF", "PCM_24"),
        ("CAF", "ALAC_16"),
    ):
        files[f"{container} {subtype}"] = written(container, subtype)
    return list(files.values())


@pytest.fixture(scope="module")
def whole():
    return bases()


NUMBERS = st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\1"])


@st.composite
def corrupted(draw):
    """(index of a file, changes of it, another file's index, name). A place is a fraction of the length."""
    place = st.floats(0, 1).map(lambda x: x**3) | st.floats(0, 1)
    change = st.one_of(
        st.tuples(st.just("cut"), st.floats(0.01, 1)),
        st.tuples(st.just("turn"), place, st.integers(0, 7)),
        st.tuples(st.just("put"), place, NUMBERS | st.binary(min_size=1, max_size=30)),
        st.tuples(st.just("drop"), place, st.integers(1, 3_000)),
        st.tuples(st.just("splice"), place, place),
    )
    changes = draw(st.lists(change, min_size=1, max_size=5))
    name = draw(st.sampled_from([*FORMATS, ".txt", ".png", "", "/../a.raw"]))
    return draw(st.integers(0, 99)), changes, draw(st.integers(0, 99)), f"a{name}"


def changed(content, changes, other):
    data = bytearray(content)
    for kind, place, *rest in changes:
        at = min(int(place * len(data)), len(data) - 1) if data else 0
        if kind == "cut":
            del data[at:]
        elif kind == "turn" and data:
            data[at] ^= 1 << rest[0]
        elif kind == "put":
            data[at : at + len(rest[0])] = rest[0]
        elif kind == "drop":
            del data[at : at + rest[0]]
        elif kind == "splice":
            data[at:] = other[int(rest[0] * len(other)) :]
    return bytes(data)


def check_corrupted(whole, case):
    first, changes, second_, name = case
    content = changed(whole[first % len(whole)], changes, whole[second_ % len(whole)])
    try:
        with open_audio((name, content)) as stream:
            count = 0
            for block in stream:
                assert block.dtype == np.float32 and block.ndim == 1 and np.isfinite(block).all() and len(block) < 2**21
                count += len(block)
            assert count == stream.samples_read > 0
    except AudioError as e:
        assert str(e)
        assert e.param == "file"


def bounded(examples):
    """The same examples in every run, so that a failure is the change's and never the day's."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


@bounded(100)
@given(corrupted())
def test_corrupted_files(whole, case):
    check_corrupted(whole, case)


@pytest.mark.slow
@bounded(1_000)
@given(corrupted())
def test_a_thousand_corrupted_files(whole, case):
    check_corrupted(whole, case)


def test_corrupted_files_print_nothing(whole, capfd):
    for k, content in enumerate(whole):
        for changes in (
            [("put", 0.02, b"\xff\xff\xff\xff")],
            [("cut", 0.5)],
            [("put", 0.5, b"\0" * 30)],
            [("drop", 0.3, 500)],
        ):
            check_corrupted(whole, (k, changes, 0, "a.wav"))
        assert content
    assert capfd.readouterr() == ("", "")
