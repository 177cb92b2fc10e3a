"""The engine: one thread owns the model; any number of threads and tasks submit requests to it."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from operator import index
from typing import Any

from cai_runtime.byte_sizes import format_bytes
from cai_runtime.engine.detokenizer import TokenDecoder
from cai_runtime.engine.handle import Handle
from cai_runtime.engine.lifetime import check_same_process, enter_process, watch_exit
from cai_runtime.engine.loop import EngineLoop
from cai_runtime.engine.outbox import Outbox, TokenLog
from cai_runtime.engine.output import OutputSpec, TextOutput
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.engine.runner import Runner
from cai_runtime.engine.sampling import SequenceSampler
from cai_runtime.engine.sequence import Sequence
from cai_runtime.engine.stats import EngineStats
from cai_runtime.errors import EngineClosedError, InvalidRequestError, RequestTooLargeError

logger = logging.getLogger("cai_runtime.engine")


class Engine:
    """Continuous batching over a `Runner`, in this process.

    `runner`: belongs to the engine from here on, which closes it. `tokenizer`: see `detokenizer.TokenDecoder`.
    `eos_token_ids`: tokens that end a text unless a request ignores them. `max_batch`: sequences in a step.
    `prefill_chunk`: prompt tokens in a step at most, beside the decoding sequences' one each. `prefill_time`: seconds
    that a step of both should take, which bounds its prompt tokens further (see `pacing.PrefillPace`); None: no bound.
    `prefix_cache`: whether prompts reuse the KV of equal beginnings. `max_waiting`: requests that may be under way beyond
    `max_batch` before `submit` refuses more; None: any. `clock`: monotonic seconds, for tests.

    Attributes: `tokenizer`, `model_config` (config.json as a dict), `vocab_size`, `max_context` (the most tokens, prompt
    and generated, that one request may have), `model_context` (what the model could take), `context_limit` (a sentence:
    what makes max_context what it is).

    Use it as a context manager or call `close()`. An engine that is forgotten, or open when the interpreter exits,
    closes itself after the step it is in. Raises EngineClosedError in a child forked from a process with an engine.
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
        prefill_time: float | None = 0.1,
        prefix_cache: bool = True,
        max_waiting: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if max_batch < 1 or prefill_chunk < 1:
            raise ValueError(f"max_batch ({max_batch}) and prefill_chunk ({prefill_chunk}) must be at least 1")
        if prefill_time is not None and not prefill_time > 0:
            raise ValueError(f"prefill_time is {prefill_time}; give seconds above 0, or None for no bound")
        if max_waiting is not None and max_waiting < 0:
            raise ValueError(f"max_waiting is {max_waiting}; give 0 or more, or None for no bound")
        enter_process()
        self.tokenizer = tokenizer
        self.model_config = dict(model_config or {})
        positions = runner.num_pages * runner.page_size
        self.max_context = min(runner.max_context, positions)
        self.model_context: int = getattr(runner, "model_context", runner.max_context)
        self.context_limit = _context_limit(runner, self.model_context)
        if positions < runner.max_context:
            logger.warning("%s", self.context_limit)
        self.vocab_size = runner.vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._decoder = TokenDecoder(tokenizer)
        self._arrivals = itertools.count()
        self._process = os.getpid()
        self._loop = EngineLoop(
            runner,
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
            prefill_time=prefill_time,
            prefix_cache=prefix_cache,
            max_waiting=max_waiting,
            clock=clock,
        )
        # Not a daemon: those are killed inside native code at exit, which may crash. watch_exit() ends it instead.
        self._thread = threading.Thread(target=self._loop.run, name=f"cai-engine-{id(self):x}", daemon=False)
        watch_exit(self._loop)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests: it was not closed, did not stop on an internal error, and this is its process."""
        return not self._loop.closed and os.getpid() == self._process

    def submit(self, request: Request) -> Handle:
        """Queue a request; returns at once. May be called from any thread.

        Raises InvalidRequestError, RequestTooLargeError if it could never fit, QueueFullError, EngineClosedError.
        Everything that goes wrong later is raised by the handle.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Iterable[Request]) -> list[Handle]:
        """Queue several requests, such as the choices of one, all or none: `submit` for each. What equal lists of prompt
        tokens have in common is computed once."""
        check_same_process(self._process)
        prompts: dict[int, tuple[list[int], list[bytes]]] = {}  # by the list's id: its tokens, the digests of its pages
        outbox, sequences = Outbox(), []
        for i, request in enumerate(requests):
            key = id(request.prompt_ids)
            if key not in prompts:
                prompts[key] = self._checked_prompt(request), []
            sequences.append(self._sequence(request, *prompts[key], TokenLog(outbox, i)))
        handles = [
            Handle(
                sequence.log,
                request_id=sequence.request.request_id or "",
                prompt_tokens=sequence.num_prompt,
                abort=partial(self._loop.inbox.put, partial(self._loop.abort, sequence.log)),
                keep_alive=self,
            )
            for sequence in sequences
        ]
        try:
            if sequences:
                self._loop.send_requests(sequences)
        except BaseException:  # a signal handler's exception, which may come after they were sent
            for handle in handles:
                handle.abort()
            raise
        return handles

    def _sequence(
        self, request: Request, prompt_ids: list[int], prompt_digests: list[bytes], log: TokenLog
    ) -> Sequence:
        params = request.sampling
        self._check(prompt_ids, params)
        arrival = next(self._arrivals)
        request = replace(request, prompt_ids=prompt_ids, request_id=request.request_id or f"request-{arrival}")
        ends: dict[int, str | None] = dict.fromkeys(() if params.ignore_eos else self._eos_token_ids)
        ends |= dict.fromkeys(params.stop_token_ids)
        ends |= {token_id: stop for stop in params.stop if (token_id := self._decoder.special_id(stop)) is not None}
        possible = [token_id for token_id in ends if 0 <= token_id < self.vocab_size]
        spec = OutputSpec(self._decoder, prompt_ids, ends, params.stop, params.min_tokens, request.skip_special_tokens)
        return Sequence(
            arrival=arrival,
            request=request,
            sampler=SequenceSampler(params, prompt_ids, possible, seed=secrets.randbits(64)),
            output=(request.output or TextOutput)(spec),
            log=log,
            prompt_digests=prompt_digests,
            submitted_at=self._loop.clock(),
        )

    def _checked_prompt(self, request: Request) -> list[int]:
        try:
            prompt_ids = list(map(index, request.prompt_ids))
        except TypeError as error:
            raise InvalidRequestError(f"prompt_ids must be integers: {error}") from error
        if not prompt_ids:
            raise InvalidRequestError("the prompt has no tokens; give at least one")
        self._check_ids("prompt_ids", prompt_ids)
        return prompt_ids

    def _check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        if params.max_tokens < 1:
            raise InvalidRequestError(f"max_tokens is {params.max_tokens}; it must be at least 1")
        self._check_ids("logit_bias", params.logit_bias)
        if len(prompt_ids) + params.max_tokens > self.max_context:
            raise RequestTooLargeError(
                f"{len(prompt_ids)} prompt tokens and max_tokens {params.max_tokens} need "
                f"{len(prompt_ids) + params.max_tokens} positions, but {self.context_limit}"
            )

    def _check_ids(self, name: str, ids: Collection[int]) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            bad = next(token_id for token_id in ids if not 0 <= token_id < self.vocab_size)
            raise InvalidRequestError(f"{name} has token id {bad}; the vocabulary is 0..{self.vocab_size - 1}")

    def stats(self) -> EngineStats:
        """What the engine has done and holds. Does not wait for the step that runs."""
        scheduler, cache = self._loop.scheduler, self._loop.scheduler.cache
        return replace(
            self._loop.stats,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_total=cache.num_pages,
            pages_free=cache.num_free,
            pages_cached=cache.num_cached,
            pages_used=cache.num_used,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page of the KV cache is accounted for. Runs between two steps."""
        check_same_process(self._process)
        future: Future[None] = Future()
        try:
            self._loop.send(partial(_answer, future, self._loop.scheduler.check_integrity))
        except EngineClosedError:
            self._thread.join()
            self._loop.scheduler.check_integrity()
        else:
            future.result()

    def close(self) -> None:
        """End the engine after the step it is in: every unfinished request fails with EngineClosedError, the model's
        and the cache's memory is given back. Idempotent; raises what the runner's own `close` raised."""
        self._loop.inbox.put(None)
        if self._thread is not threading.current_thread():  # garbage collection may run anywhere
            self._thread.join()
        error, self._loop.close_error = self._loop.close_error, None
        if error is not None:
            raise error

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_loop"):
            self._loop.inbox.put(None)


def _answer(future: Future[None], ask: Callable[[], None]) -> None:
    try:
        ask()
        future.set_result(None)
    except Exception as error:  # noqa: BLE001 - raised where the future is awaited
        future.set_exception(error)


def _context_limit(runner: Runner, model_context: int) -> str:
    """What makes a request's most tokens what they are."""
    positions = runner.num_pages * runner.page_size
    page_bytes = getattr(runner, "page_bytes", None)  # a runner that has no memory to speak of does not say
    if positions < runner.max_context:
        needed = -(-runner.max_context // runner.page_size)
        held = format_bytes(runner.num_pages * page_bytes) if page_bytes else f"{runner.num_pages} pages"
        enough = format_bytes(needed * page_bytes) if page_bytes else f"{needed} pages"
        return (
            f"the KV cache of {held} holds {positions} positions (the model could take {runner.max_context}): "
            f"raise kv_cache, to {enough} for all of them"
        )
    if runner.max_context < model_context:
        return f"max_context is {runner.max_context} (the model could take {model_context}): raise max_context"
    return f"the model's context holds {model_context} positions"
