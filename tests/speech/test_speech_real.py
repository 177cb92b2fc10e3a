"""Whisper tiny.en on real audio, computed by transformers: the long form against transformers' own, and every option."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import speech
from speech import FakeEngine, SpeechText, Track, WhisperLogits

from cai_runtime.speech.options import Options
from cai_runtime.speech.steps import FRAMES
from cai_runtime.speech.tokens import SpeechTokens

PLAIN = Options(
    beam_size=1,
    temperature=0,
    condition_on_previous_text=False,
    compression_ratio_threshold=None,
    log_prob_threshold=None,
    no_speech_threshold=None,
)
RATE = 16_000


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    """Ten seconds of speech, fp32 at 16 kHz."""
    import soundfile
    import soxr

    from cai_runtime.convert.sources import fetch_file

    audio, rate = soundfile.read(fetch_file("speech-sample", progress=False), dtype="float32")
    return soxr.resample(audio, rate, RATE).astype(np.float32)


@pytest.fixture(scope="module")
def long_audio(sample) -> np.ndarray:
    """The sample three times with pauses: about 45 s."""
    pauses = [np.zeros(round(seconds * RATE), np.float32) for seconds in (0.7, 12, 1)]
    return np.concatenate([part for pause in pauses for part in (sample, pause)])


@pytest.fixture(scope="module")
def features_of(whisper_dir):
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor.from_pretrained(whisper_dir)

    def features(audio: np.ndarray) -> np.ndarray:
        found = extractor(audio, sampling_rate=RATE, return_tensors="np", truncation=False, padding="longest")
        return found.input_features[0]

    return features


@pytest.fixture(scope="module")
def logits(whisper_dir) -> WhisperLogits:
    return WhisperLogits(whisper_dir)


@pytest.fixture(scope="module")
def tokens(whisper_dir) -> SpeechTokens:
    return SpeechTokens.from_checkpoint(whisper_dir)


@pytest.fixture(scope="module")
def text(whisper_dir, tokens) -> SpeechText:
    from tokenizers import Tokenizer

    return SpeechText(Tokenizer.from_file(str(whisper_dir / "tokenizer.json")), tokens)


class Heard(Track):
    """Features [mels, frames] of a whole audio, zeros behind its end, as transformers pads them."""

    def __init__(self, features: np.ndarray):
        self.all = np.ascontiguousarray(features.T)
        self.frames, self.mels = self.all.shape
        self.starts = []


def transcribe(logits, tokens, text, features, options):
    engine = FakeEngine(logits, tokens.eot, attention=logits.attention)
    transcript, _, _ = speech.run(None, options, tokens, Heard(features), text=text, engine=engine)
    return transcript


@pytest.mark.slow
def test_long_form_equals_transformers(logits, tokens, text, long_audio, features_of):
    import torch

    features = features_of(long_audio)
    mask = torch.ones(1, features.shape[1], dtype=torch.long)
    expected = logits.model.generate(
        torch.from_numpy(features)[None],
        attention_mask=mask,
        return_timestamps=True,
        return_segments=True,
        temperature=0.0,
        condition_on_prev_tokens=False,
    )["segments"][0]
    transcript = transcribe(logits, tokens, text, features, PLAIN)
    theirs = [(round(float(s["start"]), 2), [int(t) for t in s["tokens"] if t < tokens.eot]) for s in expected]
    ours = [(round(s.start, 2), [t for t in s.tokens if t < tokens.eot]) for s in transcript.segments]
    assert ours == [one for one in theirs if one[1]]
    assert len(ours) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("batched", [False, True])
def test_every_option_at_once(logits, tokens, text, long_audio, features_of, batched):
    options = Options(
        beam_size=2,
        best_of=2,
        temperature=(0.0, 0.4),
        initial_prompt="A reading.",
        hotwords="Beckett",
        batched=batched,
        windows_together=2,
        word_timestamps=True,
    )
    transcript = transcribe(logits, tokens, text, features_of(long_audio), options)
    assert transcript.text.lower().count("fail better") == 3
    assert transcript.words == tuple(word for segment in transcript.segments for word in segment.words)
    assert "".join(word.word for word in transcript.words) == transcript.text
    reached = 0.0
    for word in transcript.words:
        assert reached <= word.start <= word.end <= transcript.duration
        assert 0 <= word.probability <= 1
        reached = word.end


def test_prefix_and_plain_text(logits, tokens, text, sample, features_of):
    features = features_of(sample)
    whole = transcribe(logits, tokens, text, features, replace(PLAIN, without_timestamps=True))
    assert [(s.start, s.end) for s in whole.segments] == [(0.0, features.shape[1] / 100)]
    assert not [t for s in whole.segments for t in s.tokens if t >= tokens.timestamp_begin]
    words = whole.text.split()
    rest = transcribe(logits, tokens, text, features, replace(PLAIN, prefix=" ".join(words[:3])))
    assert rest.text.split()[:3] == words[3:6]
    assert features.shape[1] < FRAMES
