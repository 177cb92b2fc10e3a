"""The client over Whisper tiny.en and real audio: files at once equal files one by one, beside chats, whatever else ends."""

import asyncio
import threading
from functools import cache

import numpy as np
import pytest
import soundfile

from cai_runtime import APITimeoutError, AsyncClient, BadRequestError, Client
from cai_runtime.cli import main

FAST = {"beam_size": 1, "temperature": [0.0]}
BAD, SILENT = 1, 2  # among the files
TEXT = "Ever tried, ever failed. No matter, try again. Fail again. Fail better."


@pytest.fixture(scope="module")
def sample():
    from cai_runtime.convert.sources import fetch_file

    return soundfile.read(fetch_file("speech-sample", progress=False), dtype="float32")


@pytest.fixture(scope="module")
def files(sample, tmp_path_factory):
    """The sample from different moments on, at different loudness, one file of silence, and a bad one. Twenty: tests/e2e."""
    folder, (samples, rate) = tmp_path_factory.mktemp("talks"), sample
    made = []
    for i in range(4):
        made.append(folder / f"{i:02}.wav")
        part = samples[i * rate // 8 :] * (1 - i / 40)
        soundfile.write(made[-1], np.zeros(rate, np.float32) if i == SILENT else part, rate)
    made[BAD].write_bytes(b"RIFF" + bytes(range(200)))
    return made


@pytest.fixture(scope="module")
def client(whisper_dir, tiny_dir):
    with Client("whisper", models={"whisper": whisper_dir, "chat": tiny_dir}, progress=False) as client:
        yield client


@pytest.fixture(scope="module")
def alone(client, files):
    """The reply to one file that is transcribed alone; called with its number."""
    return cache(lambda i: client.audio.transcriptions.create(file=files[i], **FAST))


def check_free(engine):
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)


def check(found, alone):
    assert isinstance(found[BAD], BadRequestError) and found[BAD].param == "file"
    for i, one in enumerate(found):
        assert i == BAD or one == alone(i), i


def test_the_text(client, sample, alone):
    assert alone(0).text == TEXT and alone(0).language == "en"
    assert alone(SILENT).duration == 1
    array = client.audio.transcriptions.create(file=sample, **FAST)
    assert array.text == TEXT
    events = list(client.audio.transcriptions.create(file=sample, stream=True, **FAST))
    assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == TEXT
    assert events[-1].transcription == array and events[-1].usage.output_tokens > 20


def test_words(client, sample):
    reply = client.audio.transcriptions.create(file=sample, timestamp_granularities=["word"], **FAST)
    assert "".join(word.word for word in reply.words).strip() == reply.text == TEXT
    times = [time for word in reply.words for time in (word.start, word.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= reply.duration


def test_threads_equal_one_by_one_beside_chats(client, files, alone):
    count = len(files)
    chat = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "temperature": 0}
    answer = client.chat.completions.create(**chat).choices[0].message.content
    found, answers = [None] * count, [None] * count

    def transcribe(i):
        try:
            found[i] = client.audio.transcriptions.create(file=files[i], **FAST)
        except BadRequestError as error:
            found[i] = error

    def talk(i):
        answers[i] = client.chat.completions.create(**chat).choices[0].message.content

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count) for work in (transcribe, talk)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(found, alone)
    assert answers == [answer] * count
    check_free(client.engine())


def test_tasks_equal_one_by_one_and_cancelled_ones_free_everything(whisper_dir, files, alone):
    async def run():
        async with AsyncClient("whisper", models={"whisper": whisper_dir}, progress=False) as client:
            create = client.audio.transcriptions.create
            tasks = [asyncio.create_task(create(file=file, **FAST)) for file in files]
            lost = [asyncio.create_task(create(file=file, **FAST)) for file in files[2:4]]
            stream = await create(file=files[0], stream=True, **FAST)
            for task in lost:
                task.cancel()
            await anext(stream)
            await stream.close()
            with pytest.raises(APITimeoutError):
                await create(file=files[0], timeout=1e-3, **FAST)
            found = await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*lost, return_exceptions=True)
            check_free(await client.engine())
            return found

    check(asyncio.run(run()), alone)


def test_the_command(whisper_dir, files, alone, tmp_path, capsys):
    names = [str(file) for file in files[:3]]
    options = ["--model", str(whisper_dir), "--output", str(tmp_path), "--beam-size", "1", "--temperature", "0,0"]
    assert main(["transcribe", *names, *options, "--format", "text"]) == 1
    said = capsys.readouterr().err
    assert "2 transcribed, 1 failed" in said and f"error: {names[BAD]}: " in said
    assert (tmp_path / "00.txt").read_text().split() == TEXT.split() and (tmp_path / "02.txt").exists()
