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
from typing import Any

from cai_runtime.byte_sizes import format_bytes
from cai_runtime.engine.beams import BeamGroup, BeamSampler
from cai_runtime.engine.cache_groups import bytes_held, bytes_wanted, groups_of, positions_held, split_pages
from cai_runtime.engine.detokenizer import TokenDecoder
from cai_runtime.engine.handle import Handle
from cai_runtime.engine.lifetime import check_same_process, enter_process, watch_exit
from cai_runtime.engine.loop import EngineLoop
from cai_runtime.engine.outbox import Outbox, TokenLog
from cai_runtime.engine.output import OutputSpec, TextOutput
from cai_runtime.engine.proposers import Proposer
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.engine.request_checks import check_beam, check_beam_stops, check_parts, rows_of
from cai_runtime.engine.runner import Runner
from cai_runtime.engine.sampling import SequenceSampler
from cai_runtime.engine.segments import Prompt, lay_out
from cai_runtime.engine.sequence import Sequence
from cai_runtime.engine.stats import EngineStats
from cai_runtime.errors import EngineClosedError, InvalidRequestError, RequestTooLargeError
from cai_runtime.options import PREFILL_CHUNK

logger = logging.getLogger("cai_runtime.engine")


class Engine:
    """Continuous batching over a `Runner`, in this process.

    `runner`: belongs to the engine from here on, which closes it. `tokenizer`: see `detokenizer.TokenDecoder`.
    `eos_token_ids`: tokens that end a text unless a request ignores them. `max_batch`: sequences in a step.
    `prefill_chunk`: prompt tokens in a step at most, beside the decoding sequences' one each. `prefill_time`: seconds
    that a step of both should take, which bounds its prompt tokens further (see `pacing.PrefillPace`); None: no bound.
    `prefix_cache`: whether prompts reuse the KV of equal beginnings. `max_waiting`: requests that may be under way beyond
    `max_batch` before `submit` refuses more; None: any. `proposer`: drafts the next tokens of decoding sequences (see
    `proposers`); the text is the same with and without. `clock`: monotonic seconds, for tests.

    Attributes: `tokenizer`, `decoder` (a `TokenDecoder` over it), `eos_token_ids`, `model_config` (config.json as a dict),
    `vocab_size`, `max_context` (the most tokens, prompt and generated, that one request may have), `model_context` (what
    the model could take), `context_limit` (a sentence: what makes max_context what it is), `has_head` (whether it
    writes text; else it embeds alone).

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
        prefill_chunk: int = PREFILL_CHUNK,
        prefill_time: float | None = 0.1,
        prefix_cache: bool = True,
        max_waiting: int | None = None,
        proposer: Proposer | None = None,
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
        positions, _ = positions_held(*groups_of(runner))
        self.max_context = min(runner.max_context, positions)
        self._able: frozenset[str] = frozenset(getattr(runner, "able", ()))
        self._copies_pages = hasattr(runner, "launch") or hasattr(runner, "copy_pages")
        self.has_head: bool = getattr(runner, "has_head", True)
        self._activations: str = getattr(runner, "activations", "")
        self.model_context: int = getattr(runner, "model_context", runner.max_context)
        self.context_limit = _context_limit(runner, self.model_context)
        if positions < runner.max_context:
            logger.warning("%s", self.context_limit)
        self.vocab_size = runner.vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.decoder = TokenDecoder(tokenizer)
        self._arrivals = itertools.count()
        self._process = os.getpid()
        self._loop = EngineLoop(
            runner,
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
            prefill_time=prefill_time,
            prefix_cache=prefix_cache,
            max_waiting=max_waiting,
            proposer=proposer,
            clock=clock,
        )
        # Not a daemon: those are killed inside native code at exit, which may crash. watch_exit() ends it instead.
        self._thread = threading.Thread(target=self._loop.run, name=f"cai-engine-{id(self):x}", daemon=False)
        watch_exit(self._loop)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests: it was not closed, did not stop on an internal error, and this is its process."""
        return not self._loop.inbox.closed and os.getpid() == self._process

    def submit(self, request: Request) -> Handle:
        """Queue a request; returns at once. May be called from any thread.

        Raises InvalidRequestError, RequestTooLargeError if it could never fit, QueueFullError, EngineClosedError, and
        what `Request.output` and `Request.mask` raise.
        Everything that goes wrong later is raised by the handle.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Iterable[Request]) -> list[Handle]:
        """Queue several requests, such as the choices of one, all or none: `submit` for each. What equal lists of prompt
        tokens have in common is computed once."""
        check_same_process(self._process)
        prompts: dict[tuple[int, int, bytes], tuple[Prompt, list[bytes]]] = {}  # with the digests of their pages
        outbox, sequences = Outbox(), []
        for i, request in enumerate(requests):
            key = id(request.prompt_ids), id(request.segments), request.cache_salt
            if key not in prompts:
                prompts[key] = self._checked_prompt(request), []
            sequences.append(self._sequence(request, *prompts[key], TokenLog(outbox, i)))
        handles = [
            Handle(
                sequence.log,
                request_id=sequence.request.request_id or "",
                prompt_tokens=sequence.num_prompt,
                abort=partial(self._loop.inbox.queue.put, partial(self._loop.abort, sequence.log)),
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

    def _sequence(self, request: Request, prompt: Prompt, prompt_digests: list[bytes], log: TokenLog) -> Sequence:
        params, prompt_ids = request.sampling, prompt.known_ids
        self._check(prompt, params)
        check_parts(request, prompt, able=self._able, has_head=self.has_head)
        check_beam(request, prompt, self._loop.scheduler, copies=self._copies_pages)
        arrival = next(self._arrivals)
        request = replace(request, request_id=request.request_id or f"request-{arrival}")
        ends: dict[int, str | None] = dict.fromkeys(() if params.ignore_eos else self.eos_token_ids)
        ends |= dict.fromkeys(params.stop_token_ids)
        ends |= {token_id: stop for stop in params.stop if (token_id := self.decoder.special_id(stop)) is not None}
        check_beam_stops(request, ends)
        possible = [token_id for token_id in ends if 0 <= token_id < self.vocab_size]
        spec = OutputSpec(self.decoder, prompt_ids, ends, params.stop, params.min_tokens, request.skip_special_tokens)
        sampler = SequenceSampler(params, prompt_ids, possible, seed=secrets.randbits(64), rules=request.rules)
        sequence = Sequence(
            arrival=arrival,
            request=request,
            prompt=prompt,
            sampler=sampler if request.beam is None else BeamSampler(sampler, rows_of(request.beam, params.logprobs)),
            output=(request.output or TextOutput)(spec),
            log=log,
            ends=frozenset(ends),
            mask=None if request.mask is None else request.mask(possible),
            prompt_digests=prompt_digests,
            submitted_at=self._loop.clock(),
        )
        if request.beam is not None:
            sequence.beam = BeamGroup(sequence, request.beam)
        return sequence

    def _checked_prompt(self, request: Request) -> Prompt:
        segments = request.segments or (request.prompt_ids,)
        if request.segments and request.prompt_ids:
            raise InvalidRequestError("a request has prompt_ids and segments; give one of them")
        prompt = lay_out(segments, able=self._able, cache_salt=request.cache_salt)
        self._check_ids("prompt_ids", prompt.known_ids)
        return prompt

    def _check(self, prompt: Prompt, params: SamplingParams) -> None:
        if params.max_tokens < 0:
            raise InvalidRequestError(f"max_tokens is {params.max_tokens}; it must be at least 0")
        if params.prompt_logprobs is not None and prompt.given:
            raise InvalidRequestError("prompt_logprobs need a prompt of tokens alone; this one has given rows")
        self._check_ids("logit_bias", params.logit_bias)
        length = len(prompt.token_ids)
        if length + params.max_tokens > self.max_context:
            raise RequestTooLargeError(
                f"{length} prompt tokens and max_tokens {params.max_tokens} need "
                f"{length + params.max_tokens} positions, but {self.context_limit}"
            )
        if prompt.encoder is not None and not self._loop.scheduler.cache.room_for_encoder(prompt.encoder.rows):
            raise RequestTooLargeError(
                f"the encoder's output of {prompt.encoder.rows} rows is too long for this model: split the input"
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
            activations=self._activations,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page of the KV cache is accounted for. Runs between two steps."""
        check_same_process(self._process)
        future: Future[None] = Future()
        try:
            self._loop.inbox.send(partial(_answer, future, self._loop.scheduler.check_integrity))
        except EngineClosedError:
            self._thread.join()
            self._loop.scheduler.check_integrity()
        else:
            future.result()

    def close(self) -> None:
        """End the engine after the step it is in: every unfinished request fails with EngineClosedError, the model's
        and the cache's memory is given back. Idempotent; raises what the runner's own `close` raised."""
        self._loop.inbox.stop()
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
            self._loop.inbox.stop()


def _answer(future: Future[None], ask: Callable[[], None]) -> None:
    try:
        ask()
        future.set_result(None)
    except Exception as error:  # noqa: BLE001 - raised where the future is awaited
        future.set_exception(error)


def _context_limit(runner: Runner, model_context: int) -> str:
    """What makes a request's most tokens what they are."""
    groups, counts = groups_of(runner)
    positions, group = positions_held(groups, counts)
    if positions < runner.max_context:
        enough = split_pages(groups, runner.max_context)
        # A runner that has no memory to speak of does not say how much a page takes.
        said = all(g.page_bytes for g in groups)
        held = format_bytes(bytes_held(groups, counts)) if said else f"{counts[group]} pages"
        wanted = bytes_wanted(groups, counts, runner.max_context)
        whole = format_bytes(wanted, at_least=True) if said else f"{enough[group]} pages"
        of_group = f" in its group {group!r}" if len(groups) > 1 else ""
        return (
            f"the KV cache of {held} holds {positions} positions{of_group} (the model could take {runner.max_context}): "
            f"raise kv_cache, to {whole} for all of them"
        )
    if runner.max_context < model_context:
        return f"max_context is {runner.max_context} (the model could take {model_context}): raise max_context"
    return f"the model's context holds {model_context} positions"
