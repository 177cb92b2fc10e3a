"""client.audio over a fake speech model: parameters, replies, events, what is refused. See tests/helpers/fake_speech.py."""

import asyncio
import io
import threading

import openai
import pytest
from openai.types.audio import (
    TranscriptionStreamEvent,
    TranscriptionTextDeltaEvent,
    TranscriptionTextDoneEvent,
    TranscriptionTextSegmentEvent,
    TranscriptionVerbose,
    TranslationVerbose,
)
from pydantic import TypeAdapter
from refusals import refused

import cai_runtime
from cai_runtime import APITimeoutError, BadRequestError, InternalServerError, RateLimitError

EVENT = TypeAdapter(TranscriptionStreamEvent)


def test_a_reply(hearing, speech, valid):
    reply = hearing.audio.transcriptions.create(file=b"wx y")
    valid(reply, TranscriptionVerbose)
    assert (reply.task, reply.language, reply.duration, reply.text) == ("transcribe", "de", 10.0, "xyz yz z")
    assert [(s.id, s.seek, s.start, s.end, s.text) for s in reply.segments] == [
        (0, 0, 0.0, 2.4, " xyz"), (1, 250, 2.5, 4.9, " yz"), (2, 750, 7.5, 9.9, " z"),
    ]  # fmt: skip
    first = reply.segments[0]
    assert (first.temperature, first.avg_logprob, first.compression_ratio, first.no_speech_prob) == (
        0,
        -0.25,
        1.5,
        0.125,
    )
    assert len(first.tokens) == 4 and reply.words is None and reply.damage is None
    assert (reply.usage.type, reply.usage.seconds) == ("duration", 10.0) and reply.language_probability == 0.75
    assert speech.streams[0].closed and speech.closed == ["wx y"]


def test_a_translation(hearing, speech, valid):
    reply = hearing.audio.translations.create(file=b"w", language="german", timestamp_granularities=["word"])
    valid(reply, TranslationVerbose)
    assert (reply.task, reply.language, reply.source_language) == ("translate", "english", "de")
    assert reply.usage.seconds == 2.5 and [word.word for word in reply.words] == [" xyz"]
    assert speech.options[0].task == "translate"


def test_words_are_there_if_asked_for(hearing, valid):
    for asked in ({"timestamp_granularities": ["segment", "word"]}, {"word_timestamps": True}):
        reply = hearing.audio.transcriptions.create(file=b"w", **asked)
        valid(reply, TranscriptionVerbose)
        assert [(word.word, word.start, word.end, word.probability) for word in reply.words] == [(" xyz", 0, 2.4, 0.5)]
        assert len(reply.segments) == 1


def test_silence_and_damage(hearing, valid):
    reply = hearing.audio.transcriptions.create(file=b"   ")
    valid(reply, TranscriptionVerbose)
    assert (reply.text, reply.segments, reply.duration) == ("", [], 7.5)
    assert hearing.audio.transcriptions.create(file=b"w?").damage == "the last frame is cut"


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("audio", [b"wx y", b"w", b"  "])
def test_a_stream_folds_to_the_reply(hearing, valid, audio, batched):
    whole = hearing.audio.transcriptions.create(file=audio, batched=batched)
    events = list(hearing.audio.transcriptions.create(file=audio, batched=batched, stream=True))
    for event in events:
        assert EVENT.validate_json(event.model_dump_json(), strict=True).type == event.type
    *middle, done = events
    valid(done, TranscriptionTextDoneEvent)
    deltas = [event for event in middle if isinstance(event, TranscriptionTextDeltaEvent)]
    pieces = [event for event in middle if isinstance(event, TranscriptionTextSegmentEvent)]
    assert middle == [event for pair in zip(deltas, pieces, strict=True) for event in pair]
    assert "".join(event.delta for event in deltas) == done.text == whole.text
    assert [(e.id, e.start, e.end, e.text) for e in pieces] == [
        (f"seg_{s.id}", s.start, s.end, s.text) for s in whole.segments
    ]
    assert [event.segment_id for event in deltas] == [event.id for event in pieces]
    assert done.transcription == whole
    assert (done.usage.input_tokens, done.usage.output_tokens, done.usage.total_tokens) == (5, 7, 12)
    assert [language.code for language in done.languages] == ["de"]


def test_events_come_as_segments_are_done(hearing, factory):
    factory.pause_before_step(6)  # in the second window
    with hearing.audio.transcriptions.create(file=b"wabc", stream=True) as stream:
        assert next(stream).delta == "xyz" and next(stream).end == 2.4
    assert_free(factory)


def assert_free(factory, aborted=0):
    factory.resume()
    for engine in factory.engines:
        engine.check_integrity()
        stats = engine.stats()
        assert (stats.aborted, stats.running, stats.waiting) == (aborted, 0, 0)


@pytest.mark.parametrize("leave", ["close", "drop", "never begun"])
@pytest.mark.parametrize("batched", [False, True])
def test_a_stream_left_early_frees_everything(hearing, factory, speech, leave, batched):
    factory.pause_before_step(6)
    stream = hearing.audio.transcriptions.create(file=b"wabc", stream=True, batched=batched)
    if leave != "never begun":
        next(stream)
    if leave == "close":
        stream.close()
        assert list(stream) == []
    del stream
    assert speech.streams[0].closed and speech.closed == ["wabc"]
    assert_free(factory, aborted=1 if leave == "never begun" else 3 if batched else 0)


def test_timeouts(hearing, factory, speech):
    hearing.engine()
    factory.runners[0].gate.clear()
    with pytest.raises(APITimeoutError, match="0.05 s"):
        hearing.audio.transcriptions.create(file=b"wab", timeout=0.05)
    with pytest.raises(openai.APITimeoutError):
        list(hearing.audio.transcriptions.create(file=b"wab", timeout=0.05, stream=True))
    assert all(stream.closed for stream in speech.streams) and len(speech.streams) == 2
    assert_free(factory, aborted=2)


def test_async(async_hearing, factory, speech, valid):
    async def run():
        audio = async_hearing.audio
        reply = await audio.transcriptions.create(file=b"wx y")
        valid(reply, TranscriptionVerbose)
        events = [event async for event in await audio.transcriptions.create(file=b"wx y", stream=True)]
        assert events[-1].transcription == reply and len(events) == 7
        assert (await audio.translations.create(file=b"w")).task == "translate"
        factory.runners[0].gate.clear()
        with pytest.raises(APITimeoutError):
            await audio.transcriptions.create(file=b"wab", timeout=0.05)
        stream = await audio.transcriptions.create(file=b"wab", timeout=0.05, stream=True)
        with pytest.raises(APITimeoutError):
            await anext(stream)
        task = asyncio.create_task(audio.transcriptions.create(file=b"wab"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream = await audio.transcriptions.create(file=b"wab", stream=True)
        await stream.close()
        assert [event async for event in stream] == []
        await asyncio.to_thread(assert_free, factory, 4)

    asyncio.run(run())
    assert all(stream.closed for stream in speech.streams) and len(speech.closed) == len(speech.streams) == 7


def test_a_cancelled_task_frees_a_file_that_a_thread_reads(async_hearing, speech):
    reading, go_on = threading.Event(), threading.Event()
    steps = speech.steps

    def slow(letters, options, opened, stream):
        inner = steps(letters, options, opened, stream)
        answer = None
        for _ in range(2):
            answer = yield inner.send(answer)
        reading.set()
        assert go_on.wait(30)
        yield from inner

    speech.steps = slow

    async def run():
        task = asyncio.create_task(async_hearing.audio.transcriptions.create(file=b"wab"))
        await asyncio.to_thread(reading.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not speech.streams[0].closed
        go_on.set()

    asyncio.run(run())  # waits for the thread
    assert speech.streams[0].closed


def test_twenty_at_once_equal_one_by_one_and_a_bad_one_fails_alone(hearing, async_hearing):
    files = [bytes([97 + i, 32, 117 + i % 5]) for i in range(20)]
    files[7] = b"w!"
    alone = [None if b"!" in file else hearing.audio.transcriptions.create(file=file) for file in files]
    found = [None] * len(files)

    def work(i):
        try:
            found[i] = hearing.audio.transcriptions.create(file=files[i])
        except BadRequestError as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def gather():
        calls = (async_hearing.audio.transcriptions.create(file=file) for file in files)
        return await asyncio.gather(*calls, return_exceptions=True)

    for results in (found, asyncio.run(gather())):
        error = results.pop(7)
        assert (error.param, error.code) == ("file", "invalid_audio") and "2.5 s" in error.message
        assert results == alone[:7] + alone[8:]


def test_errors_in_the_middle_of_a_stream(hearing, speech):
    events, stream = [], hearing.audio.transcriptions.create(file=b"w!", stream=True)
    with pytest.raises(BadRequestError, match="middle of a frame"):
        for event in stream:
            events.append(event)  # noqa: PERF402
    assert len(events) == 2 and speech.streams[0].closed


def test_an_empty_file_fails_before_the_stream(hearing):
    refused(lambda: hearing.audio.transcriptions.create(file=b"", stream=True), "file", "invalid_audio")


def test_a_failing_model_fails_the_file(hearing, factory, speech):
    factory.prepare = lambda runner: setattr(runner, "fail", RuntimeError("no"))
    with pytest.raises(InternalServerError):
        hearing.audio.transcriptions.create(file=b"wab")
    assert speech.streams[0].closed


def test_an_engine_that_has_ended_is_opened_again_and_the_file_goes_on(hearing, factory, speech):
    hearing.audio.transcriptions.create(file=b"w")
    factory.engines[0].close()
    file = io.BytesIO(b"wx")
    assert hearing.audio.transcriptions.create(file=file).text == "xyz yz"
    # Between the opening of the audio and its first requests.
    open_work = FakeEnd(speech, factory)
    import cai_runtime.api.transcriptions as endpoint

    endpoint.begin_work = open_work  # the fixture of `speech` puts it back
    assert hearing.audio.transcriptions.create(file=io.BytesIO(b"wx")).text == "xyz yz"
    assert open_work.calls == 1 and len(factory.engines) == 3


class FakeEnd:
    """Begins the work, and closes the newest engine once."""

    def __init__(self, speech, factory):
        self.speech, self.factory, self.calls = speech, factory, 0

    def __call__(self, *args):
        self.calls += 1
        self.factory.engines[-1].close()
        return self.speech(*args)


def test_a_full_engine_refuses_the_first_window_and_lets_later_ones_wait(speech, speech_models, new_client, factory):
    client = new_client("whisper", models=speech_models)
    engine = client.engine()
    submit_all, counts = engine.submit_all, {"calls": 0}

    def full_at(numbers):
        def submit(requests):
            counts["calls"] += 1
            if counts["calls"] in numbers:
                from cai_runtime.errors import QueueFullError

                raise QueueFullError("full")
            return submit_all(requests)

        return submit

    engine.submit_all = full_at({1})
    with pytest.raises(RateLimitError):
        client.audio.transcriptions.create(file=b"wx")
    counts["calls"], engine.submit_all = 0, full_at({2, 3})
    assert client.audio.transcriptions.create(file=b"wx").text == "xyz yz" and counts["calls"] == 4
    counts["calls"], engine.submit_all = 0, full_at(range(2, 100))
    with pytest.raises(APITimeoutError):
        client.audio.transcriptions.create(file=b"wx", timeout=0.2)


def test_models_of_the_wrong_kind_are_refused_before_they_load(hearing, factory, ask):
    for create in (hearing.audio.transcriptions.create, hearing.audio.translations.create):
        refused(lambda create=create: create(file=b"w", model="abc"), "model", "audio_not_supported", "supports_audio")
    for call in (
        lambda: hearing.chat.completions.create(**ask),
        lambda: hearing.completions.create(prompt="a"),
        lambda: hearing.responses.create(input="a"),
        lambda: hearing.embeddings.create(input="a"),
    ):
        refused(call, "model", "chat_not_supported", "support_chat_completion.*client.audio")
    assert factory.opened == []


def test_capabilities(hearing, speech_models):
    models = {model.id: model for model in hearing.models.list().data[16:]}
    assert set(models) == set(speech_models)
    found = {name: model.capabilities for name, model in models.items()}
    for name in ("whisper", "whisper.en"):
        assert found[name] == {
            "supports_audio": True, "supports_image": False, "supports_function_calling": False,
            "support_chat_completion": False, "supports_responses": False, "supports_embeddings": False,
            "supports_translation": name == "whisper",
        }  # fmt: skip
    assert found["abc"]["supports_audio"] is found["abc"]["supports_translation"] is False


def test_the_function(speech, speech_models, factory):
    cai_runtime.configure(model="whisper", models=speech_models, _engine_factory=factory)
    try:
        assert cai_runtime.transcribe(b"w").text == "xyz"
        assert [event.type for event in cai_runtime.transcribe(b" ", stream=True)] == ["transcript.text.done"]
    finally:
        cai_runtime.close()
