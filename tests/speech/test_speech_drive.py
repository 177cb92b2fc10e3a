"""Drivers: results handed over, errors passed through, everything aborted when a transcription is left early."""

from __future__ import annotations

import asyncio

import pytest
from speech import FakeEngine, FakeHandle, SpeechText, Track, WordTokenizer, scripted, small_tokens, transcribe_steps

from cai_runtime.errors import RunnerError
from cai_runtime.speech.drive import adrive, drive
from cai_runtime.speech.options import Options
from cai_runtime.speech.results import Transcript

TOKENS = small_tokens()
T = TOKENS.timestamp_begin
LOGITS = scripted(lambda encoder: [T, 1, T + 1500], TOKENS)
MODES = pytest.mark.parametrize("batched", [False, True])


def steps(batched=False, frames=9000, track=None):
    options = Options(beam_size=1, temperature=0, batched=batched, windows_together=2)
    return transcribe_steps(track or Track(frames), TOKENS, options, SpeechText(WordTokenizer(), TOKENS))


def driven(steps, engine):
    found, run = [], drive(steps, engine)
    while True:
        try:
            found.append(next(run))
        except StopIteration as end:
            return found, end.value


@MODES
def test_async_equals_sync(batched):
    async def run():
        return [one async for one in adrive(steps(batched), FakeEngine(LOGITS, TOKENS.eot))]

    *done, transcript = asyncio.run(run())
    assert (done, transcript) == driven(steps(batched), FakeEngine(LOGITS, TOKENS.eot))
    assert isinstance(transcript, Transcript) and len(transcript.segments) == 3 + batched


class Stuck(FakeHandle):
    """A request that never ends."""

    def __init__(self):
        super().__init__(run=lambda: None, done=False)

    async def aresult(self):
        await asyncio.Event().wait()


class Failing(FakeEngine):
    """The second submission fails, or never ends."""

    def __init__(self, error=None):
        super().__init__(LOGITS, TOKENS.eot)
        self.error, self.calls = error, 0

    def submit_all(self, requests):
        self.calls += 1
        made = super().submit_all(requests)
        if self.calls == 2:
            made = [Stuck() if self.error is None else FakeHandle(self.fail) for _ in made]
            self.handles += made
        return made

    def fail(self):
        raise self.error


def is_closed(steps) -> bool:
    return steps.gi_frame is None


@MODES
def test_errors_of_requests_pass_through_and_abort_the_others(batched):
    engine, one = Failing(RunnerError("broken")), steps(batched)
    with pytest.raises(RunnerError, match="broken"):
        driven(one, engine)
    assert is_closed(one)
    assert all(handle.aborted for handle in engine.handles[-2:])


@MODES
def test_errors_of_the_audio_pass_through(batched):
    class Broken(Track):
        def features(self, start):
            if start:
                raise OSError("no more")
            return super().features(start)

    engine, one = FakeEngine(LOGITS, TOKENS.eot), steps(batched, track=Broken(9000))
    with pytest.raises(OSError, match="no more"):
        driven(one, engine)
    assert is_closed(one)


@MODES
def test_leaving_early_aborts(batched):
    engine, one = FakeEngine(LOGITS, TOKENS.eot, done=False), steps(batched, frames=30_000)
    run = drive(one, engine)
    next(run)
    run.close()
    assert is_closed(one)
    assert [handle.aborted for handle in engine.handles[:2]] == [False, False]
    assert any(handle.aborted for handle in engine.handles) == batched


@MODES
def test_cancelling_aborts(batched):
    engine, one = Failing(), steps(batched, frames=30_000)

    async def run():
        async for _ in adrive(one, engine):
            pass

    async def cancelled():
        task = asyncio.create_task(run())
        while engine.calls < 2 or not isinstance(engine.handles[-1], Stuck):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert is_closed(one)
    assert all(handle.aborted for handle in engine.handles if isinstance(handle, Stuck))
