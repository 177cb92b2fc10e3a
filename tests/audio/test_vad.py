"""Speech detection against silero's own ONNX models and its `get_speech_timestamps`."""

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_runtime.audio import silero
from cai_runtime.audio.mel import RATE
from cai_runtime.audio.vad import SpanFinder, SpeechDetector, VadOptions, speech_spans
from cai_runtime.errors import AudioPackageError, NonFiniteAudioError, OptionTypeError, OptionValueError

DATA = Path(importlib.util.find_spec("silero_vad").submodule_search_locations[0]) / "data"


@pytest.fixture(scope="module")
def reference():
    """silero's conversion of probabilities to spans. Importing the package sets torch to one thread: that is undone."""
    import torch

    threads = torch.get_num_threads()
    from silero_vad.utils_vad import get_speech_timestamps_from_probs

    torch.set_num_threads(threads)
    return get_speech_timestamps_from_probs


@pytest.fixture(scope="module")
def speech():
    """A sentence, twice, with silence and noise between: fp32 [samples] at 16 kHz."""
    import soundfile
    import soxr

    from cai_runtime.convert.sources import fetch_file

    samples, rate = soundfile.read(fetch_file("speech-sample"), dtype="float32", always_2d=True)
    said = soxr.resample(samples.mean(axis=1), rate, RATE).astype(np.float32)[: 12 * RATE]
    noise = np.random.default_rng(0).normal(0, 0.01, 3 * RATE).astype(np.float32)
    return np.concatenate((np.zeros(2 * RATE, np.float32), said, noise, said[: 5 * RATE], noise[:100]))


def onnx_probabilities(samples, model):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(DATA / model), providers=["CPUExecutionProvider"])
    frames = np.pad(samples, (0, -len(samples) % silero.FRAME)).reshape(-1, silero.FRAME)
    state, context, found = np.zeros((2, 1, 128), np.float32), np.zeros(64, np.float32), []
    for frame in frames:
        fed = {"input": np.concatenate((context, frame))[None], "state": state, "sr": np.array(RATE, np.int64)}
        probability, state = session.run(None, {name: fed[name] for name in (i.name for i in session.get_inputs())})
        context = frame[-64:]
        found.append(float(probability.reshape(-1)[0]))
    return np.array(found)


def network_probabilities(samples):
    network, step = silero.SileroNetwork(), silero.BLOCK * silero.FRAME
    padded = np.pad(samples, (0, -len(samples) % step))
    found = np.concatenate([network(padded[at : at + step]) for at in range(0, len(padded), step)])
    return found[: -(-len(samples) // silero.FRAME)]


def spans_of(reference, probabilities, length, options):
    settings = {name: getattr(options, name) for name in VadOptions.__dataclass_fields__ if name != "prefix_pad_ms"}
    spans = reference(list(map(float, probabilities)), audio_length_samples=length, **settings)
    return [(span["start"], span["end"]) for span in spans]


@pytest.mark.parametrize("model", ["silero_vad.onnx", "silero_vad_openvino_16k.onnx"])
def test_probabilities_equal_the_onnx_models(speech, model):
    pytest.importorskip("onnxruntime")
    expected = onnx_probabilities(speech, model)
    found = network_probabilities(speech)
    assert expected.max() > 0.9  # there is speech in it
    assert expected.min() < 0.05
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        VadOptions(),
        VadOptions(min_speech_duration_ms=250, min_silence_duration_ms=100, speech_pad_ms=30),
        VadOptions(threshold=0.8, neg_threshold=0.2, max_speech_duration_s=3, speech_pad_ms=200),
    ],
    ids=["default", "silero", "cut"],
)
def test_spans_equal_silero(speech, reference, options):
    expected = spans_of(reference, network_probabilities(speech), len(speech), options)
    assert expected
    assert [(round(a * RATE), round(b * RATE)) for a, b in speech_spans(speech, options)] == expected


LEVELS = st.sampled_from([0.0, 0.2, 0.4, 0.5, 0.9])
RUNS = st.lists(st.tuples(LEVELS, st.integers(1, 20)), max_size=25)
SETTINGS = st.builds(
    VadOptions,
    threshold=st.sampled_from([0.3, 0.5, 0.9]),
    neg_threshold=st.sampled_from([None, 0.1, 0.5]),
    min_speech_duration_ms=st.sampled_from([0, 100, 250]),
    max_speech_duration_s=st.sampled_from([math.inf, 0.5, 2, 5]),
    min_silence_duration_ms=st.sampled_from([0, 100, 300]),
    speech_pad_ms=st.sampled_from([0, 30, 200, 400]),
)


@settings(max_examples=300, deadline=None)
@given(RUNS, SETTINGS, st.integers(0, 511), st.integers(1, 40))
def test_span_finder_equals_silero(reference, runs, options, missing, step):
    probabilities = list(itertools.chain.from_iterable([level] * count for level, count in runs))
    length = max(0, len(probabilities) * silero.FRAME - missing)
    expected = spans_of(reference, probabilities, length, options)
    finder, found = SpanFinder(options), []
    for at in range(0, len(probabilities), step):
        given_out = finder.feed(probabilities[at : at + step])
        found += given_out
        assert finder.begun is None or finder.begun >= (found[-1][1] if found else 0)
        bound = finder.certain
        before = len(found)
        # Nothing that comes later ends before the bound.
        assert all(end >= bound for _, end in expected[before:])
        assert all(start >= bound for start, _ in expected[before + 1 :])
    assert found + finder.finish(length) == expected


def test_spans_do_not_depend_on_the_blocks(speech):
    options = VadOptions(min_silence_duration_ms=100, speech_pad_ms=30)
    whole = list(speech_spans(speech, options))
    edges = [0, 1, 1, 700, 16384, 16385, 60_000, len(speech)]
    blocks = [speech[a:b] for a, b in itertools.pairwise(edges)]
    assert list(speech_spans(blocks, options)) == whole
    assert len(whole) > 2


def test_spans_come_while_the_stream_goes_on(speech):
    detector = SpeechDetector(VadOptions(min_silence_duration_ms=100, speech_pad_ms=30))
    early = []
    for at in range(0, len(speech), RATE):
        early += detector.feed(speech[at : at + RATE])
        heard = (at + RATE) / RATE
        assert all(end <= heard for _, end in early)
        assert heard - detector.certain < 8  # seconds: the longest sentence
    assert len(early) > 2
    assert detector.finish()
    assert detector.finish() == []
    with pytest.raises(RuntimeError, match="finished"):
        detector.feed(speech[:10])


def test_speech_that_goes_on_is_known():
    finder = SpanFinder(VadOptions(speech_pad_ms=32, min_speech_duration_ms=100))
    finder.feed([0, 0, 0.9])
    assert finder.begun is None  # it may be too short to be kept
    finder.feed([0.9] * 10)
    assert finder.begun == finder.certain == silero.FRAME


@pytest.mark.parametrize("kind", ["silence", "noise", "tone", "nothing", "clipped", "offset"])
def test_what_is_no_speech_has_no_span(kind):
    n = 5 * RATE
    samples = {
        "silence": np.zeros(n),
        "noise": np.random.default_rng(0).normal(0, 0.1, n),
        "tone": 0.3 * np.sin(2 * np.pi * 440 * np.arange(n) / RATE),
        "nothing": np.zeros(0),
        "clipped": np.sign(np.sin(2 * np.pi * 100 * np.arange(n) / RATE)),
        "offset": np.full(n, 0.9),
    }[kind].astype(np.float32)
    assert list(speech_spans(samples)) == []


def test_padding_before_and_behind_may_differ():
    options = VadOptions.server(prefix_padding_ms=320, silence_duration_ms=64)
    finder = SpanFinder(options)
    found = finder.feed([0] * 20 + [0.9] * 10 + [0] * 20 + [0.9] * 10 + [0] * 6) + finder.finish(66 * silero.FRAME)
    begin = [20 * 512, 50 * 512]
    assert [start for start, _ in found] == [edge - 5120 for edge in begin]
    assert [end for _, end in found] == [30 * 512 + 1600, 60 * 512 + 1600]


def test_near_spans_share_the_silence_by_their_paddings():
    finder = SpanFinder(VadOptions(min_silence_duration_ms=64, speech_pad_ms=100, prefix_pad_ms=300))
    found = finder.feed([0.9] * 10 + [0] * 8 + [0.9] * 10) + finder.finish(28 * silero.FRAME)
    assert found == [(0, 10 * 512 + 1024), (10 * 512 + 1024, 28 * 512)]


def test_samples_that_are_no_numbers_are_named():
    detector = SpeechDetector()
    detector.feed(np.zeros(RATE, np.float32))
    with pytest.raises(NonFiniteAudioError, match=r"nan at 1\.500 s"):
        detector.feed(np.where(np.arange(RATE) == 8000, np.nan, 0.0).astype(np.float32))


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    silero._weights.cache_clear()
    assert not silero.silero_available()
    with pytest.raises(AudioPackageError, match=r"pip install 'cai-runtime\[vad\]'"):
        SpeechDetector()


@pytest.mark.parametrize("kind", ["another", "cut", "damaged"])
def test_other_weights_are_refused(tmp_path, monkeypatch, kind):
    path = tmp_path / "weights.onnx"
    whole = (DATA / "silero_vad_16k_op15.onnx").read_bytes()
    kinds = {"another": (DATA / "silero_vad_half.onnx").read_bytes(), "cut": whole[:-1000], "damaged": b"\x07" * 50}
    path.write_bytes(kinds[kind])
    monkeypatch.setattr(silero, "_path", lambda: path)
    silero._weights.cache_clear()
    with pytest.raises(AudioPackageError, match="silero-vad"):
        SpeechDetector()


def test_package_is_not_imported():
    import subprocess
    import sys

    code = "from cai_runtime.audio.vad import SpeechDetector; SpeechDetector(); import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"silero_vad", "onnxruntime", "torch"} & set(loaded)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"threshold": 2}, OptionValueError),
        ({"threshold": "0.5"}, OptionTypeError),
        ({"threshold": None}, OptionTypeError),
        ({"neg_threshold": -1}, OptionValueError),
        ({"min_silence_duration_ms": math.inf}, OptionValueError),
        ({"max_speech_duration_s": 0}, OptionValueError),
        ({"speech_pad_ms": math.nan}, OptionValueError),
        ({"speech_pad_ms": True}, OptionTypeError),
        ({"onset": 0.5}, OptionTypeError),
    ],
)
def test_wrong_options_are_named(options, error):
    with pytest.raises(error, match=next(iter(options))):
        VadOptions.of(options)
