"""Runs one file's transcription: drives the speech package's generator, hands its requests to the engine, and makes the
reply of its segments."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from typing import Any

from cai_runtime.api.errors import RateLimitError, as_api_errors
from cai_runtime.api.timeouts import timed_out, timing_out
from cai_runtime.api.transcriptions.reply import SpeechEvent, SpeechEvents, SpeechReply, reply_of
from cai_runtime.api.transcriptions.work import SpeechWork
from cai_runtime.engine.handle import HandleGroup
from cai_runtime.errors import CaiError, RequestAbortedError
from cai_runtime.speech.results import Segment, Transcript
from cai_runtime.speech.steps import Answer, Ask, Done, Need, Ready

LOOK_AGAIN = 0.05  # seconds after which an engine that takes no more requests is asked again


class SpeechGeneration:
    """A file that is ready to be transcribed: its first requests, or its text where none are needed, are there."""

    def __init__(self, work: SpeechWork):
        self._work = work

    def submit(self, engine: Any) -> SpeechRunning:
        """Hand the first requests to the engine. Raises RateLimitError if it takes no more."""
        running = SpeechRunning(self._work, engine)
        running.start()
        return running


class SpeechRunning:
    """A transcription while it runs. Consume it once: `whole`, `chunks` or their asynchronous twins, as
    `generation.Running`.

    Only what consumes it makes it go on. Its requests of later windows wait where the engine is full; those of the first
    are refused.
    """

    def __init__(self, work: SpeechWork, engine: Any):
        self._work, self._engine = work, engine
        self._lock = threading.RLock()  # of the three below; an RLock, for a collected stream aborts in any thread
        self._groups: list[HandleGroup] = []  # of requests under way
        self._submitted: HandleGroup | None = None  # those of the step that the work is at
        self._aborted = False
        self._events = SpeechEvents()
        self.timeout: float | None = None  # seconds that a stream waits for its next event

    def start(self) -> None:
        if isinstance(self._work.step, (Need, Ask)):
            self._submit(self._work.step)

    def abort(self) -> None:
        """Stop the requests that still run, and close the file. Idempotent, thread-safe."""
        with self._lock:
            self._aborted, groups = True, [*self._groups]
        for group in groups:
            group.abort()
        self._work.close()

    def whole(self, timeout: float | None = None) -> SpeechReply:
        """Wait for the end, at most `timeout` seconds. Aborts on any exception, Ctrl-C included."""
        with as_api_errors(CaiError), self._aborting():
            end = None if timeout is None else time.monotonic() + timeout
            while not isinstance(self._work.step, Transcript):
                if not self._go_on(end):
                    raise timed_out(timeout if self.timeout is None else self.timeout)
            return reply_of(self._work.step, self._work.damage)

    async def awhole(self) -> SpeechReply:
        with as_api_errors(CaiError), self._aborting():
            while not isinstance(self._work.step, Transcript):
                await self._ago_on()
            return reply_of(self._work.step, self._work.damage)

    def chunks(self) -> Generator[SpeechEvent]:
        """Events as segments are done."""
        with as_api_errors(CaiError), self._aborting():
            end = self._next_end()
            while not isinstance(self._work.step, Transcript):
                if segments := self._segments():
                    yield from self._events.of(segments)
                    end = self._next_end()
                if not self._go_on(end):
                    raise timed_out(self.timeout)
            yield self._events.done(self._work.step, self._work.damage)

    async def achunks(self) -> AsyncGenerator[SpeechEvent]:
        with as_api_errors(CaiError), self._aborting():
            end = self._next_end()
            while not isinstance(self._work.step, Transcript):
                if segments := self._segments():
                    for event in self._events.of(segments):
                        yield event
                    end = self._next_end()
                with timing_out(self.timeout):
                    async with asyncio.timeout(None if end is None else max(0.0, end - time.monotonic())):
                        await self._ago_on()
            yield self._events.done(self._work.step, self._work.damage)

    def _next_end(self) -> float | None:
        """When the next event must have come."""
        return None if self.timeout is None else time.monotonic() + self.timeout

    def _segments(self) -> list[Segment]:
        """Those that the work is at, if it is."""
        step = self._work.step
        return list(step.segments) if isinstance(step, Done) else []

    def _go_on(self, end: float | None) -> bool:
        """Do the work's step and go to its next. False if that is not done at `end`."""
        step, answer = self._work.step, None
        if isinstance(step, (Need, Ask)):
            while not self._is_submitted(step):
                if end is not None and time.monotonic() + LOOK_AGAIN > end:
                    return False
                time.sleep(LOOK_AGAIN)
        if (group := self._awaited(step)) is not None:
            answer = group.results(None if end is None else max(0.0, end - time.monotonic()))
            if answer is None:
                return False
        self._work.go_on(self._end_of(step, group, answer))
        return True

    async def _ago_on(self) -> None:
        """The same, not blocking the event loop: audio is read, and features are computed, in a thread."""
        step, answer = self._work.step, None
        if isinstance(step, (Need, Ask)):
            while not self._is_submitted(step):
                await asyncio.sleep(LOOK_AGAIN)
        if (group := self._awaited(step)) is not None:
            answer = await group.aresults()
        await asyncio.to_thread(self._work.go_on, self._end_of(step, group, answer))

    def _awaited(self, step: Any) -> HandleGroup | None:
        """The requests whose results the step needs."""
        if isinstance(step, Answer):
            ticket: HandleGroup = step.ticket
            return ticket
        return self._submitted if isinstance(step, Need) else None

    def _end_of(self, step: Any, awaited: HandleGroup | None, results: Any) -> Any:
        """Take note that a step is done. Returns the answer to it."""
        with self._lock:
            submitted, self._submitted = self._submitted, None
            if awaited is not None:
                self._groups.remove(awaited)
        if isinstance(step, Ready):
            return all(handle.done for handle in step.ticket.handles)
        return submitted if isinstance(step, Ask) else results

    def _is_submitted(self, step: Need | Ask) -> bool:
        """Whether the requests of this step are in the engine; hands them over if they are not. False: it is full."""
        try:
            self._submit(step)
        except RateLimitError as error:
            if error.code != "queue_full":
                raise
            return False
        return True

    def _submit(self, step: Need | Ask) -> None:
        with self._lock, as_api_errors():
            if self._submitted is not None:
                return
            if self._aborted:
                raise RequestAbortedError("the transcription was aborted")
            self._submitted = HandleGroup(self._engine.submit_all(step.requests))
            self._groups.append(self._submitted)

    @contextlib.contextmanager
    def _aborting(self) -> Iterator[None]:
        """Abort whatever is left at the end of the block: after an error, Ctrl-C, a cancelled task, a closed generator. At
        its proper end this closes the file."""
        try:
            yield
        finally:
            self.abort()
