"""The step loop: the engine's thread feeds the model, samples, and hands the tokens out."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import traceback
from collections.abc import Callable
from functools import partial

import numpy as np

from cai_runtime.engine.handle import Stream
from cai_runtime.engine.kv_cache import KVCache
from cai_runtime.engine.pacing import PrefillPace, StepLimits
from cai_runtime.engine.runner import Runner
from cai_runtime.engine.sampler import sample
from cai_runtime.engine.scheduler import Feed, Scheduler
from cai_runtime.engine.sequence import Sequence
from cai_runtime.engine.stats import EngineStats
from cai_runtime.errors import (
    CaiError,
    EngineClosedError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    RequestAbortedError,
    RunnerError,
)

logger = logging.getLogger("cai_runtime.engine")

# After these errors every call of CUDA fails in this process.
LOST_DEVICE = (
    "illegal memory access", "misaligned address", "device-side assert", "unspecified launch failure",
    "illegal instruction", "hardware stack error", "uncorrectable ECC error",
)  # fmt: skip


class EngineLoop:
    """The state of the engine's thread. It holds no Engine, so that a forgotten Engine can be collected, which closes it.

    clock: seconds, monotonic. For the other arguments see `Engine`.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch: int,
        prefill_chunk: int,
        prefill_time: float | None,
        prefix_cache: bool,
        max_waiting: int | None,
        clock: Callable[[], float],
    ):
        # SimpleQueue.put is reentrant: finalizers put here, in whatever thread the garbage collector runs.
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.stats = EngineStats()
        cache = KVCache(runner.num_pages, runner.page_size, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(cache, self.stats, max_batch=max_batch)
        self.close_error: Exception | None = None
        self.clock = clock
        self._pace = PrefillPace(prefill_time, prefill_chunk)
        self._limits = StepLimits()
        self._runner: Runner | None = runner
        self._sequences: dict[Stream, Sequence] = {}
        self._gate = threading.Lock()  # guards `closed` and `_places`
        self._places = 0  # requests that were sent and have not ended
        self._most_places = None if max_waiting is None else max_batch + max_waiting
        self.closed = False
        self._crash: BaseException | None = None  # an error of the engine itself, which ended it

    # Any thread

    def send(self, command: Callable[[], None]) -> None:
        """Have the engine's thread call `command` between two steps. Raises EngineClosedError."""
        with self._gate:
            if self.closed:
                raise self._closed_error()
            self.inbox.put(command)

    def send_requests(self, sequences: list[Sequence]) -> None:
        """Queue sequences, all or none. Raises EngineClosedError, QueueFullError, and InvalidRequestError for more at once
        than there are seats and places to wait."""
        count, most = len(sequences), self._most_places
        with self._gate:
            if self.closed:
                raise self._closed_error()
            if most is not None and count > most:
                raise InvalidRequestError(
                    f"{count} sequences at once never fit max_batch {self.scheduler.max_batch} and max_waiting "
                    f"{most - self.scheduler.max_batch}: ask for fewer, or raise one of them"
                )
            if most is not None and self._places + count > most:
                raise QueueFullError(
                    f"{self._places} requests run or wait already, and {most} may: try again later, or raise max_waiting"
                )
            self._places += count
            self.inbox.put(partial(self._add, sequences))

    # The engine's thread

    def run(self) -> None:
        """The step loop."""
        try:
            while self._receive():
                self._run_step()
        except BaseException as error:  # noqa: BLE001 - raised in every caller, so that none of them waits for ever
            _forget_frames(error)
            self._crash = error
            logger.error("the engine stopped on an internal error: %r", error)
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

    def _run_step(self) -> None:
        """Schedule a step, run it, and learn from its duration. At most as many sequences as the runner takes lately go to
        it at once: a row's logits do not depend on that."""
        begin = self.clock()
        budget = self._pace.budget(decoding=self.scheduler.is_decoding)
        step = self.scheduler.schedule(min(budget, self._limits.prompt_tokens or budget))
        for sequence in self.scheduler.newly_admitted:
            sequence.stream.times.queue = begin - sequence.submitted_at
        self.scheduler.newly_admitted.clear()
        prompt_tokens = sum(len(feed.tokens.token_ids) for feed in step if not feed.is_decode)
        size = self._limits.sequences or len(step)
        failed = self.stats.retries
        for at in range(0, len(step), size):
            self._try(step[at : at + size])
        if self.stats.retries == failed:
            self._pace.observe(prompt_tokens, self.clock() - begin)
            self._limits.relax(most_sequences=self.scheduler.max_batch, most_tokens=self._pace.most)

    def _try(self, feeds: list[Feed]) -> bool:
        """Run feeds, in halves if the model fails on them, until the failure is that of one sequence alone. A sequence that
        lacks memory is fed in halves of its tokens; any other failure of one sequence ends its request.

        Returns False if one sequence was to blame. Otherwise their number was, and the one that worked is remembered."""
        try:
            logits = self._run_model(feeds)
        except Exception as error:
            _forget_frames(error)
            if any(text in str(error) for text in LOST_DEVICE):
                raise RunnerError(
                    f"the GPU can't be used in this process any more ({error}): open the model in a new process"
                ) from error
            if len(feeds) == 1 and (len(feeds[0].tokens.token_ids) == 1 or not _is_out_of_memory(error)):
                self._fail(feeds[0].sequence, RunnerError, "the model failed on this request", error)
                return False
            self.stats.retries += 1
            logger.warning("the model failed on a step of %s: trying halves (%r)", _size(feeds), error)
        else:
            self._hand_out(feeds, logits)
            return True
        return self._try_halves(feeds)

    def _try_halves(self, feeds: list[Feed]) -> bool:
        if len(feeds) > 1:
            size = (len(feeds) + 1) // 2
            through = [self._try(half) for half in (feeds[:size], feeds[size:])]
            if all(through):
                self._limits.lower(sequences=size)
            return all(through)
        sequence, count = feeds[0].sequence, len(feeds[0].tokens.token_ids)
        size = (count + 1) // 2
        self._try([Feed.of(sequence, size)])
        if sequence.stream not in self._sequences:  # its request has failed
            return False
        self._limits.lower(prompt_tokens=size)
        self._try([Feed.of(sequence, count - size)])
        return False

    def _run_model(self, feeds: list[Feed]) -> np.ndarray:
        """The logits, fp32 [sequences that sample, vocab]."""
        assert self._runner is not None
        logits = np.asarray(self._runner.run([feed.tokens for feed in feeds]), dtype=np.float32)
        expected = (sum(feed.tokens.sample for feed in feeds), self._runner.vocab_size)
        if logits.shape != expected:
            raise RunnerError(f"the runner returned logits of shape {logits.shape} instead of {expected}")
        return logits

    def _hand_out(self, feeds: list[Feed], logits: np.ndarray) -> None:
        """Sample from the logits of a step that went through, and give each sequence its token."""
        self.stats.steps += 1
        for feed in feeds:
            self.scheduler.advance(feed)
        sampled = [feed.sequence for feed in feeds if feed.tokens.sample]
        with np.errstate(all="ignore"):  # overflows end as a typed error of their request
            tokens = sample(logits, [s.sampler for s in sampled], [len(s.token_ids) for s in sampled])
        now = self.clock()
        for sequence, token in zip(sampled, tokens, strict=True):
            self._accept(sequence, token, now)

    def _accept(self, sequence: Sequence, token: int | Exception, now: float) -> None:
        try:
            if isinstance(token, Exception):
                raise token
            self.scheduler.commit(sequence)
            delta = sequence.accept(token)
        except CaiError as error:
            self._end(sequence, error)
        except Exception as error:  # noqa: BLE001 - a tokenizer or a parameter that breaks fails its request alone
            self._fail(sequence, EngineError, "the engine failed on this request", error)
        else:
            self.stats.tokens_decoded += 1
            if sequence.last_token_at is None:
                sequence.first_token_at = now
            else:
                self.stats.worst_token_gap = max(self.stats.worst_token_gap, now - sequence.last_token_at)
            sequence.last_token_at = now
            if delta.finish_reason is not None:
                self._finish(sequence, now)
            sequence.stream.put(delta)

    def _finish(self, sequence: Sequence, now: float) -> None:
        """Free what a sequence holds, and note how long it took."""
        self._forget(sequence)
        assert sequence.first_token_at is not None
        times, decoding = sequence.stream.times, now - sequence.first_token_at
        times.first_token = sequence.first_token_at - sequence.submitted_at
        times.per_token = decoding / max(1, sequence.num_generated - 1)
        self.stats.finished += 1
        self.stats.queue_seconds += times.queue
        self.stats.first_token_seconds += times.first_token
        self.stats.decode_seconds += decoding

    def _add(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
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
        with self._gate:
            self._places -= 1
        self.scheduler.remove(sequence)

    def _closed_error(self) -> EngineClosedError:
        crash = self._crash
        said = str(crash) if isinstance(crash, CaiError) else f"the engine stopped on an internal error: {crash!r}"
        error = EngineClosedError("the engine was closed" if crash is None else said)
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
        logger.info(
            "the engine is closed: %d requests finished, %d failed, %d preemptions, %d retries, worst gap %.0f ms",
            self.stats.finished, self.stats.failed, self.stats.preemptions, self.stats.retries,
            1000 * self.stats.worst_token_gap,
        )  # fmt: skip


def _is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "OutOfMemory" in type(error).__name__
    )


def _size(feeds: list[Feed]) -> str:
    return f"{len(feeds)} sequences and {sum(len(feed.tokens.token_ids) for feed in feeds)} tokens"


def _forget_frames(error: BaseException) -> None:
    """Let go of the local variables (activations, weights) of the frames that an exception went through."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
