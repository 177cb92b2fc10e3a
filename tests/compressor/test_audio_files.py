"""Clips and transcripts out of files, resampling, windows."""

import json

import numpy as np
import pytest
import soundfile

from cai_runtime.audio.files import RATE, Clip, cut_windows, find_clips, read_audio
from cai_runtime.errors import CompressionError


def tone(seconds, hertz=440.0, rate=RATE):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "clips"
    for name in ("b.wav", "deep/a.flac", "deep/c.ogg", ".hidden/d.wav"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path / name, tone(0.1), RATE)
    (path / "b.txt").write_text("\ufeffask not\n what your country\n")
    (path / "deep/notes.md").write_text("no audio")
    return path


def test_a_directory_with_transcripts_beside(folder):
    clips = find_clips(folder)
    assert [(clip.path.name, clip.text) for clip in clips] == [
        ("b.wav", "ask not what your country"),
        ("a.flac", None),
        ("c.ogg", None),
    ]
    assert find_clips([folder / "b.wav", folder]) == clips  # each file once


def test_lists(folder):
    entries = [{"audio": "deep/a.flac", "text": " one  two "}, {"audio": "b.wav"}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    (folder / "list.tsv").write_text("speaker\taudio\ttext\nx\tdeep/a.flac\tone two\n\ny\tb.wav\t\n")
    wanted = [Clip(folder / "deep/a.flac", "one two"), Clip(folder / "b.wav", "ask not what your country")]
    assert find_clips(folder / "list.jsonl") == find_clips(str(folder / "list.tsv")) == wanted


@pytest.mark.parametrize("first", ["", "b.wav"])
def test_a_later_transcript_of_a_clip_counts_where_the_first_has_none(folder, first):
    (folder / "list.tsv").write_text("audio\ttext\ndeep/a.flac\tsaid\nb.wav\tsomething else\n")
    clips = find_clips([folder / first, folder / "list.tsv", folder])
    assert {(clip.path.name, clip.text) for clip in clips} == {
        ("b.wav", "ask not what your country"),  # the first one's stays
        ("a.flac", "said"),
        ("c.ogg", None),
    }
    assert len(clips) == 3


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_a_list_end_at_newlines_alone(folder, end):
    text = "one\u2028two\x85three\x0bfour\x0cfive\x1csix"
    # \x0b, \x0c and \x1c must be escaped in JSON, the others need not be.
    entry = json.dumps({"audio": "b.wav", "text": text}, ensure_ascii=False)
    assert "\u2028" in entry and "\x85" in entry
    (folder / "list.jsonl").write_text(f"{entry}{end}{entry}{end}", newline="", encoding="utf-8")
    (folder / "list.tsv").write_text(f"audio\ttext{end}b.wav\t{text}{end}", newline="", encoding="utf-8")
    wanted = [Clip(folder / "b.wav", "one two three four five six")]
    assert find_clips(folder / "list.jsonl") == find_clips(folder / "list.tsv") == wanted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"audio": "b.wav"}\n{', "x.jsonl, line 2: not JSON"),
        ("x.jsonl", "[]", "line 1: not an object"),
        ("x.jsonl", '{"audio": 3}', '"audio" must be a file'),
        ("x.jsonl", '{"audio": "b.wav", "text": 3}', "what is said in it"),
        ("x.jsonl", '{"audio": "none.wav"}', "line 1: .*none.wav is not there"),
        ("x.jsonl", "", "no audio in"),
        ("x.tsv", "path\ttext\nb.wav\tx", "must name the columns"),
        ("x.tsv", "audio\ttext\nb.wav", "x.tsv, line 2: 1 columns"),
        ("x.txt", "words", "a speech model takes audio"),
        ("b.txt", b"\xff\xfe\xff", "transcript .*b.txt can't be read"),
    ],
)
def test_what_is_wrong_is_named(folder, name, content, message):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CompressionError, match=message):
        find_clips(folder if name == "b.txt" else path)


def test_places_without_audio(tmp_path):
    for source in ([], tmp_path, tmp_path / "none"):
        with pytest.raises(CompressionError, match="no audio|holds no|is not there"):
            find_clips(source)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_any_rate_becomes_16_khz(tmp_path, rate):
    left, right = tone(1.0, 440.0, rate), tone(1.0, 1000.0, rate)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), rate, subtype="FLOAT")
    wanted = (tone(1.0, 440.0) + tone(1.0, 1000.0)) / 2
    found = read_audio(tmp_path / "a.wav")
    assert found.dtype == np.float32 and abs(len(found) - RATE) <= 1
    inside = slice(RATE // 10, -RATE // 10)
    assert np.abs(found[: len(wanted)][inside] - wanted[: len(found)][inside]).max() < 1e-3


def test_unreadable_audio_is_named(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF, but no more")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(10, np.nan), RATE, subtype="FLOAT")
    for name, message in (("a.wav", "can't be read"), ("empty.wav", "is empty"), ("nan.wav", "NaN")):
        with pytest.raises(CompressionError, match=f"{name} {message}|{name}.*{message}"):
            read_audio(tmp_path / name)


def test_windows_are_cut_in_pauses():
    audio = np.concatenate([tone(27.3), np.zeros(RATE // 2, np.float32), tone(28.0), np.zeros(RATE), tone(3.0)])
    windows = cut_windows(audio)
    assert np.array_equal(np.concatenate(windows), audio)
    lengths = [len(window) / RATE for window in windows]
    assert lengths[0] == pytest.approx(27.55, abs=0.3) and max(lengths) <= 30
    assert [len(w) for w in cut_windows(tone(30.0))] == [30 * RATE]
    assert max(map(len, cut_windows(tone(7.0), 2.0))) <= 2 * RATE
