"""Real audio through Whisper tiny.en in the engine: transformers' own text, alone and among many."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import audio_clips
import numpy as np
import pytest
import soundfile
import torch

from cai_runtime import Client

RATE = 16_000


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """Ten seconds, fp32 at 16 kHz."""
    return audio_clips.speech(RATE)


@pytest.fixture(scope="module")
def client(whisper_dir: Path, smollm2_dir: Path) -> Iterator[Client]:
    models: dict[str, str | Path] = {"whisper": whisper_dir, "chat": smollm2_dir}
    with Client(models=models, max_batch=24, progress=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def clips(speech: np.ndarray) -> list[np.ndarray]:
    """Twenty unlike clips of 3 to 9 seconds."""
    generator = np.random.default_rng(3)
    found = []
    for _ in range(20):
        length = int(generator.uniform(3, 9) * RATE)
        start = int(generator.uniform(0, max(1, len(speech) - length)))
        found.append(speech[start : start + length])
    return found


def _one(client: Client, audio: np.ndarray, **options):
    return client.audio.transcriptions.create(file=(audio, RATE), model="whisper", beam_size=1, **options)


def _timed(reply) -> list[tuple]:
    return [(s.start, s.end, s.text, tuple(s.tokens), s.avg_logprob) for s in reply.segments]


@torch.inference_mode()
def test_greedy_tokens_are_transformers(client: Client, whisper_dir: Path, speech: np.ndarray):
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(whisper_dir, dtype=torch.float32)
    extract = WhisperFeatureExtractor.from_pretrained(whisper_dir)
    for seconds in (10, 6, 3):
        audio = speech[: seconds * RATE]
        features = extract(audio, sampling_rate=RATE, return_tensors="pt").input_features
        expected = model.generate(features, return_timestamps=True, num_beams=1, do_sample=False)[0].tolist()
        reply = _one(client, audio, temperature=0)
        ours = [token for segment in reply.segments for token in segment.tokens]
        start, end = expected.index(50257) if 50257 in expected else -1, model.generation_config.eos_token_id
        assert ours == [token for token in expected[start + 1 :] if token != end]


def test_twenty_files_beside_twenty_chats_are_as_alone(client: Client, clips: list[np.ndarray]):
    alone = [_timed(_one(client, clip)) for clip in clips]
    found: dict[int, list] = {}
    said: dict[int, str] = {}

    def hear(i: int) -> None:
        found[i] = _timed(_one(client, clips[i]))

    def chat(i: int) -> None:
        message = {"role": "user", "content": f"Name {i + 2} fruits."}
        reply = client.chat.completions.create(model="chat", messages=[message], max_tokens=8, temperature=0)
        said[i] = reply.choices[0].message.content

    threads = [threading.Thread(target=target, args=(i,)) for i in range(20) for target in (hear, chat)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(20)] == alone
    assert len(said) == 20 and all(said.values())


def test_leaving_a_stream_early_frees_the_engine(client: Client, speech: np.ndarray):
    long = np.concatenate([speech] * 6)
    stream = client.audio.transcriptions.create(file=(long, RATE), model="whisper", stream=True, beam_size=1)
    first = next(iter(stream))
    assert first.type == "transcript.text.delta" and first.delta
    stream.close()
    engine = client.engine("whisper")
    for _ in range(200):
        if engine.stats().running == 0:
            break
        threading.Event().wait(0.02)
    assert engine.stats().running == 0 and engine.stats().waiting == 0


def test_a_long_file_loses_nothing(client: Client, speech: np.ndarray, tmp_path: Path):
    """Ninety seconds, as a file: the windows follow the timestamps."""
    quiet = np.zeros(RATE, np.float32)
    path = tmp_path / "long.wav"
    soundfile.write(path, np.concatenate([np.concatenate([speech, quiet])] * 8), RATE)
    once = _one(client, speech).text.split()
    for options in ({}, {"batched": True}):
        reply = client.audio.transcriptions.create(file=path, model="whisper", beam_size=1, **options)
        heard = reply.text.split()
        assert len(heard) >= 7.5 * len(once), options
        starts = [segment.start for segment in reply.segments]
        assert starts == sorted(starts) and reply.segments[-1].end <= reply.duration + 0.02
