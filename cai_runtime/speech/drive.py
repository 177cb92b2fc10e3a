"""Runs a transcription on an engine: submits its requests, waits, and aborts what runs when it is left early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any, Protocol

from cai_runtime.engine.request import Finished, Request
from cai_runtime.speech.results import Transcript
from cai_runtime.speech.steps import Answer, Ask, Done, Ready, Step, Steps


class Running(Protocol):
    """A submitted request, such as an engine's `Handle`."""

    @property
    def done(self) -> bool: ...

    def result(self) -> Finished: ...

    async def aresult(self) -> Finished: ...

    def abort(self) -> None: ...


class Submits(Protocol):
    """The part of `Engine` that a transcription needs."""

    def submit_all(self, requests: list[Request]) -> Sequence[Running]: ...


def drive(steps: Steps, engine: Submits) -> Generator[Done, None, Transcript]:
    """Run a transcription in this thread. Yields what is `Done`, and returns the Transcript.

    Leaving it early, by `close` or an exception, aborts the requests that run. Errors of the audio and of requests pass
    through.
    """
    tickets = _Tickets(engine)
    try:
        ended, step = _advance(steps, None)
        while not ended:
            answer: Any = None
            if isinstance(step, Done):
                yield step
            else:
                answer = tickets.of(step)
                if isinstance(step, Ready):
                    answer = all(handle.done for handle in answer)
                elif not isinstance(step, Ask):
                    answer = tickets.spend(answer, [handle.result() for handle in answer])
            ended, step = _advance(steps, answer)
        return step
    finally:
        tickets.abort()
        steps.close()


async def adrive(steps: Steps, engine: Submits) -> AsyncGenerator[Done | Transcript, None]:
    """`drive` for an event loop: yields what is `Done`, and the Transcript last. Audio is decoded in a thread.

    Cancelling the task that waits, or closing the generator, aborts the requests that run.
    """
    tickets = _Tickets(engine)
    loop, thread = asyncio.get_running_loop(), None
    answer: Any = None
    try:
        while True:
            thread = loop.run_in_executor(None, _advance, steps, answer)
            ended, step = await asyncio.shield(thread)
            answer = None
            if isinstance(step, Done):
                yield step
            elif ended:
                yield step
                return
            else:
                answer = tickets.of(step)
                if isinstance(step, Ready):
                    answer = all(handle.done for handle in answer)
                elif not isinstance(step, Ask):
                    answer = tickets.spend(answer, [await handle.aresult() for handle in answer])
    finally:
        tickets.abort()
        if thread is None or thread.done():
            steps.close()
        else:  # the generator can't be closed while the thread runs it
            thread.add_done_callback(lambda done: _close(done, steps))


def _close(done: asyncio.Future[Any], steps: Steps) -> None:
    """Close the steps that a thread was busy with; nobody waits for what it found."""
    if not done.cancelled():
        done.exception()
    steps.close()


def _advance(steps: Steps, answer: Any) -> tuple[bool, Any]:
    """(whether it is over, the next step or the Transcript)."""
    try:
        return False, steps.send(answer)
    except StopIteration as end:
        return True, end.value


class _Tickets:
    """The requests that were submitted and not waited for yet. A ticket is the list of their handles."""

    def __init__(self, engine: Submits):
        self._engine = engine
        self._open: list[Sequence[Running]] = []

    def of(self, step: Step) -> Sequence[Running]:
        """The ticket that a step means: a new one, unless it brings one."""
        if isinstance(step, (Answer, Ready)):
            return step.ticket
        assert not isinstance(step, Done)
        self._open.append(self._engine.submit_all(step.requests))
        return self._open[-1]

    def spend(self, ticket: Sequence[Running], results: list[Finished]) -> list[Finished]:
        self._open = [one for one in self._open if one is not ticket]
        return results

    def abort(self) -> None:
        for ticket in self._open:
            for handle in ticket:
                handle.abort()
