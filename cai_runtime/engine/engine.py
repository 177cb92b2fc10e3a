"""The engine: one thread owns the model; any number of threads and tasks submit requests to it."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from operator import index
from typing import Any

from cai_runtime.engine.detokenizer import Detokenizer, StopStrings, TokenDecoder
from cai_runtime.engine.handle import Handle, Stream
from cai_runtime.engine.lifetime import watch_exit
from cai_runtime.engine.loop import EngineLoop
from cai_runtime.engine.request import Request
from cai_runtime.engine.runner import Runner
from cai_runtime.engine.sampler import SequenceSampler
from cai_runtime.engine.sequence import Sequence
from cai_runtime.engine.stats import EngineStats
from cai_runtime.errors import EngineClosedError, InvalidRequestError, RequestTooLargeError


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
        self._loop = EngineLoop(runner, max_batch=max_batch, prefill_chunk=prefill_chunk, prefix_cache=prefix_cache)
        # Not a daemon: those are killed inside native code at exit, which may crash. _close_at_exit ends it instead.
        self._thread = threading.Thread(target=self._loop.run, name=f"cai-engine-{id(self):x}", daemon=False)
        watch_exit(self._loop)
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
        self._send(partial(self._loop.add, sequence), limit=self._max_waiting)
        return Handle(
            sequence.stream,
            request_id=request.request_id or "",
            prompt_tokens=len(prompt_ids),
            abort=partial(self._loop.inbox.put, partial(self._loop.abort, sequence.stream)),
            keep_alive=self,
        )

    def _send(self, command: Callable[[], None], limit: int | None = None) -> None:
        self._loop.send(command, limit)
        if not self._thread.is_alive() and not self._loop.closed:
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
        future: Future[None] = Future()
        try:
            self._send(partial(_answer, future, self._loop.scheduler.check_integrity))
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
