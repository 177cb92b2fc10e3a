"""The step loop: the engine's thread feeds the model, samples, and hands the tokens out."""

from __future__ import annotations

import contextlib
import queue
import threading
import traceback
from collections.abc import Callable

import numpy as np

from cai_runtime.engine.handle import Stream
from cai_runtime.engine.kv_cache import KVCache
from cai_runtime.engine.runner import Runner
from cai_runtime.engine.sampler import sample
from cai_runtime.engine.scheduler import Feed, Scheduler
from cai_runtime.engine.sequence import Sequence
from cai_runtime.engine.stats import EngineStats
from cai_runtime.errors import (
    CaiError,
    EngineClosedError,
    EngineError,
    QueueFullError,
    RequestAbortedError,
    RunnerError,
)


class EngineLoop:
    """The state of the engine's thread. It holds no Engine, so that a forgotten Engine can be collected, which closes it."""

    def __init__(self, runner: Runner, *, max_batch: int, prefill_chunk: int, prefix_cache: bool):
        # SimpleQueue.put is reentrant: finalizers put here, in whatever thread the garbage collector runs.
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.stats = EngineStats()
        cache = KVCache(runner.num_pages, runner.page_size, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(cache, self.stats, max_batch=max_batch, prefill_chunk=prefill_chunk)
        self.close_error: Exception | None = None
        self._runner: Runner | None = runner
        self._sequences: dict[Stream, Sequence] = {}
        self._gate = threading.Lock()  # between send() and the end
        self.closed = False
        self._crash: BaseException | None = None  # an error of the engine itself, which ended it

    # Any thread

    def send(self, command: Callable[[], None], limit: int | None = None) -> None:
        """Have the owner thread call `command` between two steps. `limit`: of requests waiting before this one."""
        with self._gate:
            if self.closed:
                raise self._closed_error()
            if limit is not None and len(self.scheduler.waiting) + self.inbox.qsize() >= limit:
                raise QueueFullError(f"{limit} requests are waiting already; try again later")
            self.inbox.put(command)

    # Owner thread

    def run(self) -> None:
        """The step loop."""
        try:
            while self._receive():
                self._step(self.scheduler.schedule())
        except BaseException as error:  # noqa: BLE001 - raised in every caller, so that none of them waits for ever
            _forget_frames(error)
            self._crash = error
        self._shut_down()

    def _receive(self) -> bool:
        """Carry out what was sent; wait for more while there is nothing to run. False when the engine is to close."""
        while True:
            try:
                command = self.inbox.get(block=not self.scheduler.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _step(self, step: list[Feed]) -> None:
        """Feed a step to the model, sample, hand the tokens out. If the model fails, each sequence is tried alone."""
        try:
            logits = self._run_model(step)
        except Exception as error:  # noqa: BLE001 - whatever the model raises is a request's failure, not the engine's
            _forget_frames(error)
            if len(step) > 1:
                for feed in step:
                    self._step([feed])
            else:
                self._fail(step[0].sequence, RunnerError, "the model failed on this request", error)
            return
        self.stats.steps += 1
        for feed in step:
            self.scheduler.advance(feed)
        sampled = [feed.sequence for feed in step if feed.tokens.sample]
        tokens = sample(logits, [s.sampler for s in sampled], [len(s.token_ids) for s in sampled])
        for sequence, token in zip(sampled, tokens, strict=True):
            self._accept(sequence, token)

    def _run_model(self, step: list[Feed]) -> np.ndarray:
        """The logits, fp32 [sequences that sample, vocab]."""
        assert self._runner is not None
        logits = np.asarray(self._runner.run([feed.tokens for feed in step]), dtype=np.float32)
        expected = (sum(feed.tokens.sample for feed in step), self._runner.vocab_size)
        if logits.shape != expected:
            raise RunnerError(f"the runner returned logits of shape {logits.shape} instead of {expected}")
        return logits

    def _accept(self, sequence: Sequence, token: int | Exception) -> None:
        try:
            if isinstance(token, Exception):
                raise token
            delta = sequence.accept(token)
        except CaiError as error:
            self._end(sequence, error)
        except Exception as error:  # noqa: BLE001 - a tokenizer or a parameter that breaks fails its request alone
            self._fail(sequence, EngineError, "the engine failed on this request", error)
        else:
            self.stats.tokens_decoded += 1
            if delta.finish_reason is not None:
                self._forget(sequence)
                self.stats.finished += 1
            sequence.stream.put(delta)

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.stream] = sequence
        self.scheduler.add(sequence)

    def abort(self, stream: Stream) -> None:
        sequence = self._sequences.get(stream)
        if sequence is not None:
            self._end(sequence, RequestAbortedError(f"{sequence.request.request_id} was aborted"))

    def _fail(self, sequence: Sequence, kind: type[EngineError], message: str, cause: Exception) -> None:
        error = kind(f"{message}: {cause!r}")
        error.__cause__ = cause
        self._end(sequence, error)

    def _end(self, sequence: Sequence, error: CaiError) -> None:
        """Free what a sequence holds, then tell its consumer."""
        self._forget(sequence)
        if isinstance(error, RequestAbortedError):
            self.stats.aborted += 1
        else:
            self.stats.failed += 1
        sequence.stream.fail(error)

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.stream]
        self.scheduler.remove(sequence)

    def _closed_error(self) -> EngineClosedError:
        crash = self._crash
        error = EngineClosedError(
            "the engine was closed" if crash is None else f"the engine stopped on an internal error: {crash!r}"
        )
        error.__cause__ = crash
        return error

    def _shut_down(self) -> None:
        with self._gate:
            self.closed = True  # nothing is sent from here on
        while not self.inbox.empty():
            command = self.inbox.get()
            if command is not None:
                command()
        for sequence in list(self._sequences.values()):
            with contextlib.suppress(Exception):  # a crash may have left the books in disorder; the caller must wake up
                self._forget(sequence)
            self.stats.failed += 1
            sequence.stream.fail(self._closed_error())
        runner, self._runner = self._runner, None
        try:
            if runner is not None:
                runner.close()
        except Exception as error:  # noqa: BLE001 - raised in Engine.close(), in the caller's thread
            self.close_error = error


def _forget_frames(error: BaseException) -> None:
    """Let go of the local variables (activations, weights) of the frames that an exception went through."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
