"""The engine: one thread owns the model; any number of threads and tasks submit requests to it."""

from __future__ import annotations

import contextlib
import itertools
import queue
import secrets
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from operator import index
from typing import Any

from cai_runtime.engine.detokenizer import Detokenizer, StopStrings, TokenDecoder
from cai_runtime.engine.handle import Handle, Stream
from cai_runtime.engine.kv_cache import KVCache
from cai_runtime.engine.request import Request
from cai_runtime.engine.runner import Runner, sampler_of
from cai_runtime.engine.sampling import SequenceSampler, sampling_batch, tokens_or_errors
from cai_runtime.engine.scheduler import Scheduler, Share
from cai_runtime.engine.sequence import Sequence
from cai_runtime.engine.stats import EngineStats
from cai_runtime.errors import (
    CaiError,
    EngineClosedError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    RequestAbortedError,
    RequestTooLargeError,
    RunnerError,
)


class Engine:
    """Continuous batching over a `Runner`, in this process.

    `runner`: belongs to the engine from here on, which closes it. `tokenizer`: see `detokenizer.TokenDecoder`.
    `eos_token_ids`: tokens that end a text unless a request ignores them. `max_batch`: sequences in a step.
    `prefill_chunk`: prompt tokens in a step, beside the decoding sequences' one each. `prefix_cache`: whether prompts
    reuse the KV of equal beginnings. `max_waiting`: requests that may wait before `submit` refuses more; None: any.

    Attributes: `tokenizer`, `model_config` (config.json as a dict), `max_context` (the most tokens, prompt and
    generated, that one request may have), `vocab_size`.

    Use it as a context manager or call `close()`. An engine that is forgotten, or open when the interpreter exits,
    closes itself after the step it is in.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        *,
        eos_token_ids: Iterable[int],
        model_config: dict[str, Any] | None = None,
        max_batch: int = 64,
        prefill_chunk: int = 512,
        prefix_cache: bool = True,
        max_waiting: int | None = None,
    ):
        if max_batch < 1 or prefill_chunk < 1:
            raise ValueError(f"max_batch ({max_batch}) and prefill_chunk ({prefill_chunk}) must be at least 1")
        self.tokenizer = tokenizer
        self.model_config = dict(model_config or {})
        self.max_context = min(runner.max_context, runner.num_pages * runner.page_size)
        self.vocab_size = runner.vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_waiting = max_waiting
        self._decoder = TokenDecoder(tokenizer)
        self._arrivals = itertools.count()
        self._owner = _Owner(runner, max_batch=max_batch, prefill_chunk=prefill_chunk, prefix_cache=prefix_cache)
        # Not a daemon: those are killed inside native code at exit, which may crash. _close_at_exit ends it instead.
        self._thread = threading.Thread(target=self._owner.run, name=f"cai-engine-{id(self):x}", daemon=False)
        _watch_exit(self._owner)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        """Queue a request; returns at once. May be called from any thread.

        Raises InvalidRequestError, RequestTooLargeError if it could never fit, QueueFullError, EngineClosedError.
        Everything that goes wrong later is raised by the handle.
        """
        try:
            prompt_ids = list(map(index, request.prompt_ids))
        except TypeError as error:
            raise InvalidRequestError(f"prompt_ids must be integers: {error}") from error
        params = request.sampling
        self._check(prompt_ids, request)
        arrival = next(self._arrivals)
        request = replace(request, prompt_ids=prompt_ids, request_id=request.request_id or f"request-{arrival}")
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_token_ids)
        possible = [token_id for token_id in stop_ids if 0 <= token_id < self.vocab_size]
        sequence = Sequence(
            arrival=arrival,
            request=request,
            stop_ids=stop_ids,
            sampler=SequenceSampler(params, prompt_ids, possible, seed=secrets.randbits(64)),
            detokenizer=Detokenizer(self._decoder, skip_special_tokens=request.skip_special_tokens),
            stop_strings=StopStrings(params.stop),
            stream=Stream(),
        )
        self._send(partial(self._owner.add, sequence), limit=self._max_waiting)
        return Handle(
            sequence.stream,
            request_id=request.request_id or "",
            prompt_tokens=len(prompt_ids),
            abort=partial(self._owner.inbox.put, partial(self._owner.abort, sequence.stream)),
            keep_alive=self,
        )

    def _send(self, command: Callable[[], None], limit: int | None = None) -> None:
        self._owner.send(command, limit)
        if not self._thread.is_alive() and not self._owner.closed:
            raise EngineClosedError("this process was forked from the one that opened the engine; open it here")

    def _check(self, prompt_ids: list[int], request: Request) -> None:
        params = request.sampling
        if not prompt_ids:
            raise InvalidRequestError("the prompt has no tokens; give at least one")
        if params.max_tokens < 1:
            raise InvalidRequestError(f"max_tokens is {params.max_tokens}; it must be at least 1")
        for name, ids in (("prompt_ids", prompt_ids), ("logit_bias", params.logit_bias)):
            if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
                bad = next(token_id for token_id in ids if not 0 <= token_id < self.vocab_size)
                raise InvalidRequestError(f"{name} has token id {bad}; the vocabulary is 0..{self.vocab_size - 1}")
        if len(prompt_ids) + params.max_tokens > self.max_context:
            raise RequestTooLargeError(
                f"{len(prompt_ids)} prompt tokens and max_tokens {params.max_tokens} exceed the {self.max_context} "
                "tokens that a request may have here (the model's context or the whole KV cache)"
            )

    def stats(self) -> EngineStats:
        """What the engine has done and holds. Does not wait for the step that runs."""
        scheduler, cache = self._owner.scheduler, self._owner.scheduler.cache
        return replace(
            self._owner.stats,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_total=cache.num_pages,
            pages_free=cache.num_free,
            pages_cached=cache.num_cached,
            pages_used=cache.num_used,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page of the KV cache is accounted for. Runs between two steps."""
        future: Future[None] = Future()
        try:
            self._send(partial(_answer, future, self._owner.scheduler.check_integrity))
        except EngineClosedError:
            self._thread.join()
            self._owner.scheduler.check_integrity()
        else:
            future.result()

    def close(self) -> None:
        """End the engine after the step it is in: every unfinished request fails with EngineClosedError, the model's
        and the cache's memory is given back. Idempotent; raises what the runner's own `close` raised."""
        self._owner.inbox.put(None)
        if self._thread is not threading.current_thread():  # garbage collection may run anywhere
            self._thread.join()
        error, self._owner.close_error = self._owner.close_error, None
        if error is not None:
            raise error

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_owner"):
            self._owner.inbox.put(None)


class _Owner:
    """What the owner thread holds. It knows no Engine, so that a forgotten Engine can be collected, and close it."""

    def __init__(self, runner: Runner, *, max_batch: int, prefill_chunk: int, prefix_cache: bool):
        # SimpleQueue.put is reentrant: finalizers put here, in whatever thread the garbage collector runs.
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.stats = EngineStats()
        cache = KVCache(runner.num_pages, runner.page_size, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(cache, self.stats, max_batch=max_batch, prefill_chunk=prefill_chunk)
        self.close_error: Exception | None = None
        self._runner: Runner | None = runner
        sampler_of(runner)  # loads what it needs
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

    def _step(self, step: list[Share]) -> None:
        """Feed a step to the model, sample, hand the tokens out. If the model fails, each sequence is tried alone."""
        try:
            logits = self._run_model(step)
        except Exception as error:  # noqa: BLE001 - whatever the model raises is a request's failure, not the engine's
            _forget_frames(error)
            if len(step) > 1:
                for share in step:
                    self._step([share])
            else:
                self._fail(step[0].sequence, RunnerError, "the model failed on this request", error)
            return
        self.stats.steps += 1
        for share in step:
            self.scheduler.advance(share)
        sampled = [share.sequence for share in step if share.tokens.sample]
        for sequence, token in zip(sampled, self._next_tokens(logits, sampled), strict=True):
            self._accept(sequence, token)

    def _run_model(self, step: list[Share]) -> Any:
        """The logits, fp32 [sequences that sample, vocab], wherever the runner has them."""
        assert self._runner is not None
        logits = self._runner.run([share.tokens for share in step])
        expected = (sum(share.tokens.sample for share in step), self._runner.vocab_size)
        if tuple(logits.shape) != expected:
            raise RunnerError(f"the runner returned logits of shape {tuple(logits.shape)} instead of {expected}")
        return logits

    def _next_tokens(self, logits: Any, sequences: list[Sequence]) -> list[int | Exception]:
        """Of each sequence the sampled token, or the error that it alone fails with."""
        if not sequences:
            return []
        positions = [len(sequence.token_ids) for sequence in sequences]
        try:
            batch = sampling_batch([sequence.sampler for sequence in sequences], positions)
            return tokens_or_errors(sampler_of(self._runner)(logits, batch).wait(), positions)
        except Exception as error:  # noqa: BLE001 - such as a device out of memory: the step's failure, not the engine's
            _forget_frames(error)
            return [error] * len(sequences)

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


def _answer(future: Future[None], ask: Callable[[], None]) -> None:
    try:
        ask()
        future.set_result(None)
    except Exception as error:  # noqa: BLE001 - raised where the future is awaited
        future.set_exception(error)


def _forget_frames(error: BaseException) -> None:
    """Let go of the local variables (activations, weights) of the frames that an exception went through."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__


# At exit the interpreter waits for every thread that is not a daemon, once the main thread is done. One daemon thread
# waits for that moment and closes the engines that are still open. No atexit hook, and nothing before the first engine.

_open_owners: weakref.WeakSet[_Owner] = weakref.WeakSet()
_watcher: threading.Thread | None = None
_watcher_lock = threading.Lock()


def _watch_exit(owner: _Owner) -> None:
    global _watcher
    with _watcher_lock:
        _open_owners.add(owner)
        if _watcher is None or not _watcher.is_alive():  # not alive: in a forked child
            _watcher = threading.Thread(target=_close_at_exit, name="cai-engine-exit", daemon=True)
            _watcher.start()


def _close_at_exit() -> None:
    threading.main_thread().join()
    with _watcher_lock:
        owners = list(_open_owners)
    for owner in owners:
        owner.inbox.put(None)
