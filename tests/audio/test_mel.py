"""Log-mel features: of one window as transformers', of any length as slices of the whole file's, in flat memory."""

import io
import os
import struct

import numpy as np
import pytest
from audio_clips import speech

from cai_runtime.audio import LogMel, MelWindows, open_audio
from cai_runtime.audio.mel import mel_filters

RATE, HOP, FRAMES, SAMPLES = 16_000, 160, 3_000, 480_000


@pytest.fixture(scope="module")
def long():
    """Fifty seconds, each tenth of another loudness."""
    return np.concatenate([speech() * gain for gain in (0.1, 1.0, 0.3, 2.0, 0.01)])


def blocks(samples, size=7_777):
    return [samples[k : k + size] for k in range(0, len(samples), size)]


def signals():
    clip, noise = speech(), np.random.default_rng(0)
    return {
        "speech": clip,
        "a whole window": np.tile(clip, 4)[:SAMPLES],
        "all but some samples": np.tile(clip, 4)[: SAMPLES - 90],
        "noise": (0.1 * noise.standard_normal(SAMPLES)).astype(np.float32),
        "tone": np.sin(np.arange(SAMPLES) * np.float32(0.17)).astype(np.float32),
        "silence": np.zeros(SAMPLES, np.float32),
        "clipped": np.sign(clip),
        "250 samples": clip[:250],
        "one sample": clip[:1],
    }


@pytest.mark.parametrize("mels", [80, 128])
def test_a_window_equals_the_extractor_of_transformers(mels):
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=mels)
    ours = LogMel(mels)
    assert np.abs(mel_filters(mels) - extractor.mel_filters).max() < 1e-12
    for name, samples in signals().items():
        wanted = extractor(samples, sampling_rate=RATE, return_tensors="np").input_features[0].T
        found, real = MelWindows(blocks(samples), ours).features(0)
        assert found.shape == wanted.shape and found.dtype == np.float32 and found.flags.c_contiguous
        assert np.abs(found - wanted).max() < 1e-5, name
        assert real == max(len(samples) // HOP, 1)
        padded = np.pad(samples, (0, SAMPLES - len(samples)))
        assert np.abs(ours(padded) - wanted).max() < 1e-5, name


def test_features_are_those_of_the_definition():
    """float64 by the definition; fp32 differs most in quiet filters of loud frames."""
    samples = speech()[:SAMPLES]
    padded = np.pad(samples.astype(np.float64), 200, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::HOP][: len(samples) // HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2 @ mel_filters(80)
    log = np.log10(np.maximum(power, 1e-10))
    wanted = (np.maximum(log, log.max() - 8) + 4) / 4
    assert np.abs(LogMel(80)(samples) - wanted).max() < 1e-4


def test_windows_are_slices_of_the_whole_files_features(long):
    mel = LogMel(80)
    whole = mel.log_power(np.concatenate([long[200:0:-1], long, np.zeros(2 * SAMPLES, np.float32)]))
    windows = MelWindows(blocks(long), mel)
    count = len(long) // HOP
    for start in (0, 0, 10, 1_234, 2_999, 2_999, count - 1, count, count + 50):
        found, real = windows.features(start)
        peak = float(whole[: start + FRAMES].max())  # of all audio up to the window's end
        assert np.array_equal(found, mel.scale(whole[start : start + FRAMES].copy(), peak)), start
        assert real == min(max(count - start, 0), FRAMES) and windows.at_end(start) == (start >= count)
    assert windows.ended and windows.seconds_known == pytest.approx(len(long) / RATE)


def test_features_do_not_depend_on_blocks_or_on_windows_before(long):
    wanted = MelWindows([long], 80).features(1_500)[0]
    for size in (159, 160, 30_001):
        windows = MelWindows(blocks(long, size), 80)
        windows.features(700)
        windows.samples(20 * RATE, 45 * RATE)  # read ahead
        assert np.array_equal(windows.features(1_500)[0], wanted)


def test_samples_of_a_window(long):
    windows = MelWindows(blocks(long), 80)
    windows.features(1_000)
    first = 1_000 * HOP
    assert np.array_equal(windows.samples(first, first + 50), long[first : first + 50])
    assert np.array_equal(windows.samples(len(long) - 5, len(long) + 50), long[-5:])
    assert len(windows.samples(len(long) + 1, len(long) + 2)) == 0
    with pytest.raises(ValueError, match="sample 159999 lies before the latest window's start, 160000"):
        windows.samples(first - 1, first)
    with pytest.raises(ValueError, match="frame 999 lies before the latest, at frame 1000"):
        windows.features(999)


def test_no_audio_at_all():
    windows = MelWindows([], 80)
    assert windows.at_end(0)
    features, real = windows.features(0)
    assert real == 0 and np.array_equal(features, np.full((FRAMES, 80), -1.5, np.float32))
    with pytest.raises(ValueError, match="0 mels"):
        LogMel(0)


class EndlessSpeech(io.RawIOBase):
    """A WAV of many seconds of the same speech, made as it is read."""

    def __init__(self, seconds):
        clip = (speech() * 32_767).astype("<i2")[: 9 * RATE]
        self._clip, self._at = clip.tobytes(), 0
        size = seconds * RATE * 2
        form = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
        self._head = (
            b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt \x10\0\0\0" + form + b"data" + struct.pack("<I", size)
        )
        self._size = len(self._head) + size

    def seekable(self):
        return True

    def tell(self):
        return self._at

    def seek(self, offset, whence=os.SEEK_SET):
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size=-1):
        left = self._size - self._at
        size = left if size < 0 else min(size, left)
        if self._at < len(self._head):
            found = self._head[self._at : self._at + size]
        else:
            begin = (self._at - len(self._head)) % len(self._clip)
            found = self._clip[begin : begin + size]
        self._at += len(found)
        return found


def megabytes():
    import psutil

    return psutil.Process().memory_info().rss / 2**20


@pytest.mark.parametrize("hours", [0.5, pytest.param(10, marks=pytest.mark.slow)])
def test_a_long_file_takes_the_memory_of_a_short_one(hours):
    with open_audio(EndlessSpeech(int(hours * 3_600))) as stream:
        windows, start, most, count = MelWindows(stream, 80), 0, 0.0, 0
        while not windows.at_end(start):
            features, _ = windows.features(start)
            assert features.max() < 3
            start, count = start + 2_900, count + 1
            if count == 10:
                settled = megabytes()
            most = max(most, megabytes())
    assert windows.seconds_known == hours * 3_600 == stream.duration
    assert most - settled < 20
