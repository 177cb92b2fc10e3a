"""The step loop: the engine's thread feeds the model, samples, and delivers the tokens."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial

from cai_runtime.engine.beams import search_on
from cai_runtime.engine.cache import CacheManager
from cai_runtime.engine.cache_groups import groups_of
from cai_runtime.engine.flight import (
    Flight,
    Launched,
    forget_frames,
    is_out_of_memory,
    lost_the_device,
    take_rows,
)
from cai_runtime.engine.inbox import Inbox
from cai_runtime.engine.masks import MaskedRow, fill_masks
from cai_runtime.engine.outbox import TokenLog, deliver
from cai_runtime.engine.pacing import PrefillPace, StepLimits
from cai_runtime.engine.proposers import Proposer, checked_draft
from cai_runtime.engine.request import Delta
from cai_runtime.engine.runner import Runner, SimpleRunner
from cai_runtime.engine.runner_thread import launching
from cai_runtime.engine.sampling import TokenScorer, sampling_batch
from cai_runtime.engine.scheduler import Planned, Scheduler
from cai_runtime.engine.sequence import Sequence
from cai_runtime.engine.stats import EngineStats
from cai_runtime.engine.step import Step
from cai_runtime.errors import (
    CaiError,
    EngineError,
    RequestAbortedError,
    RunnerError,
)

logger = logging.getLogger("cai_runtime.engine")


class EngineLoop:
    """The state of the engine's thread. It holds no Engine, so that a forgotten Engine can be collected, which closes it.

    clock: seconds, monotonic. For the other arguments see `Engine`.
    """

    def __init__(
        self,
        runner: Runner | SimpleRunner,
        *,
        max_batch: int,
        prefill_chunk: int,
        prefill_time: float | None,
        prefix_cache: bool,
        max_waiting: int | None,
        clock: Callable[[], float],
        proposer: Proposer | None = None,
    ):
        self.inbox = Inbox(max_batch=max_batch, max_waiting=max_waiting)
        self.stats = EngineStats()
        cache = CacheManager(*groups_of(runner), prefix_cache=prefix_cache)
        draft = None if proposer is None else partial(checked_draft, proposer, vocab_size=runner.vocab_size)
        self.scheduler = Scheduler(cache, self.stats, max_batch=max_batch, draft=draft)
        self.close_error: Exception | None = None
        self.clock = clock
        self._pace = PrefillPace(prefill_time, prefill_chunk)
        self._limits = StepLimits()
        self._runner: Runner | None = launching(runner)
        self._sequences: dict[TokenLog, Sequence] = {}
        self._flight: Flight | None = None  # the step under way
        self._texts: list[tuple[Sequence, float]] = []  # with tokens that have no text yet, and the tokens' time
        self._outputs: list[tuple[TokenLog, Delta]] = []  # not delivered yet

    def send_requests(self, sequences: list[Sequence]) -> None:
        """Queue sequences, all or none; from any thread. Raises what `Inbox.send` raises."""
        self.inbox.send(partial(self._add, sequences), requests=len(sequences))

    # The engine's thread
    #
    # While the model computes a step, this thread works on the step before: text, stop strings, delivery. Before the next
    # launch it does only what that step depends on: taking the tokens, and ending sequences by token ids.

    def run(self) -> None:
        """The step loop."""
        try:
            while True:
                ahead = self._launch_ahead()
                self._complete(ahead)
                if ahead is not None or not self.scheduler.has_work:
                    self._hand_out()
                if not self._receive():
                    break
                if self._flight is None:
                    self._launch()
                    self._hand_out()
            self._hand_out()
            for launched in self._flight.parts if self._flight is not None else ():
                with contextlib.suppress(Exception):
                    launched.wait()  # nobody wants its tokens, but the runner is closed next
        except BaseException as error:  # noqa: BLE001 - raised in every caller, so that none of them waits for ever
            forget_frames(error)
            self.inbox.crash = error
            logger.error("the engine stopped on an internal error: %r", error)
        self._shut_down()

    def _receive(self) -> bool:
        """Call the commands of the inbox; wait for more while there is nothing to run. False: the engine shall stop."""
        while True:
            if self.inbox.queue.empty() and (self._flight is not None or self.scheduler.has_work):
                return True
            command = self.inbox.queue.get()
            if command is None:
                return False
            command()

    def _launch(self) -> None:
        """Schedule a step and launch it, in several passes if the runner lately failed on this many sequences. A row's
        logits do not depend on the number of passes."""
        begin = self.clock()
        budget = self._pace.budget(decoding=self.scheduler.is_decoding)
        step = self.scheduler.schedule(min(budget, self._limits.prompt_tokens or budget))
        for sequence in self.scheduler.newly_admitted:
            sequence.log.times.queue = begin - sequence.submitted_at
        self.scheduler.newly_admitted.clear()
        size = self._limits.sequences or len(step)
        parts = [self._launch_part(step[at : at + size]) for at in range(0, len(step), size)]
        prompt_tokens = sum(len(planned.feed.ids) for planned in step if not planned.is_decode)
        prompt_tokens += sum(launched.encoded for launched in parts)
        self._flight = Flight(parts, begin, prompt_tokens)

    def _launch_ahead(self) -> Flight | None:
        """Launch the step behind the one under way, whose tokens are still on the device. A text that ends with one of them
        drops its row. None where the next step depends on more than those tokens. Where a sequence has a mask, which does,
        only the pass is launched: `_complete` samples from it."""
        if self._flight is None or not getattr(self._runner, "ahead", False) or self._limits.sequences is not None:
            return None
        under_way = [planned for launched in self._flight.parts for planned in launched.part]
        step = self.scheduler.schedule_ahead([p for p in under_way if self._is_alive(p.sequence)])
        return Flight([self._launch_part(step, ahead=True)], self.clock(), 0) if step else None

    def _launch_part(self, part: list[Planned], *, again: bool = False, ahead: bool = False) -> Launched:
        """Launch one pass and the sampling behind it. again: after a failure, so that what the runner knows is unclear.
        ahead: see `_launch_ahead`."""
        assert self._runner is not None
        cache, launched, step = self.scheduler.cache, Launched(part), Step([])
        samplers, positions = launched.samplers, launched.positions
        for planned in part:
            sequence, feed = planned.sequence, planned.feed
            step.feeds.append(feed)
            if again or sequence.held.is_changed:
                step.pages += cache.page_changes(sequence, everything=again)
                step.copies += sequence.held.copies
            if sequence.prompt.encoder is not None and (passes := cache.encoder_passes(sequence)):
                step.encode += passes
                launched.encoded += sum(encoder.input.rows for encoder in passes)
            end = feed.start + len(feed.ids)
            if planned.scored:
                first, k = end - feed.wanted + 1, sequence.request.sampling.prompt_logprobs
                scored = range(first, first + planned.scored)
                samplers += [TokenScorer(sequence.token_ids[position], k or 0) for position in scored]
                positions += scored
            if sequence.mask is not None and feed.wanted > planned.scored:
                launched.masked.append(MaskedRow(len(samplers), sequence.mask, planned.draft, sequence.ends))
            for i in range(feed.wanted - planned.scored):
                if i:
                    launched.drafted[len(samplers)] = planned.draft[:i]
                samplers.append(sequence.sampler)
                positions.append(end - feed.wanted + planned.scored + i + 1)
        try:
            launched.made = self._runner.launch(step)
        except Exception as error:  # noqa: BLE001 - raised by Launched.wait, like a failure of the pass
            launched.error = error
            return launched
        if samplers and not (ahead and launched.masked):
            self._sample(launched)
        return launched

    def _sample(self, launched: Launched) -> None:
        """Launch the sampling from a pass. Masks are filled here, while the model computes the pass."""
        assert self._runner is not None and launched.made is not None
        samplers, mask = launched.samplers, None
        try:
            if launched.masked:
                mask, launched.mask_errors = fill_masks(launched.masked, len(samplers), self._runner.vocab_size)
            batch = sampling_batch(samplers, launched.positions, launched.drafted, mask)
            launched.sampled = self._runner.sample(launched.made, batch)
        except Exception as error:  # noqa: BLE001 - such as a device out of memory: not the engine's failure
            launched.tokens = [error] * len(samplers)

    def _complete(self, ahead: Flight | None = None) -> None:
        """Wait for the step under way, take its tokens, and note its duration. ahead: the step that was launched after it,
        which is then under way. It is dropped if this step fails, since its inputs were wrong."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        failed = self.stats.retries
        for launched in flight.parts:
            self._settle(launched)
        if self.scheduler.groups:
            search_on(self.scheduler, self.stats, self.clock(), self._put_out)
        if self.stats.retries == failed:
            self._pace.observe(flight.prompt_tokens, self.clock() - flight.begin)
            self._limits.relax(most_sequences=self.scheduler.max_batch, most_tokens=self._pace.most)
            if ahead is not None:
                ahead.begin = self.clock()  # until now the device was busy with this step
                self._flight = ahead
                for launched in ahead.parts:
                    if launched.masked and launched.error is None:  # a row for each sequence: no drafts are fed ahead
                        alive = [m for m in launched.masked if self._is_alive(launched.part[m.row].sequence)]
                        launched.masked = alive
                        self._sample(launched)

    def _settle(self, launched: Launched) -> bool:
        """Wait for a pass. If the model fails, run the pass again in halves, until only one sequence fails. That sequence is
        fed without its draft, and after a lack of memory in halves of its tokens. Any other failure ends its request.

        Returns False if one sequence caused the failure. Otherwise their number did: the number that worked is kept."""
        try:
            tokens = launched.wait()
        except Exception as error:
            forget_frames(error)
            if lost_the_device(error):
                raise RunnerError(
                    f"the GPU can't be used in this process any more ({error}): open the model in a new process"
                ) from error
            part = [planned.known() for planned in launched.part if self._is_alive(planned.sequence)]
            if not part:
                return True
            only = part[0] if len(part) == 1 and not part[0].draft else None
            if only is not None and (len(only.feed.ids) == 1 or not is_out_of_memory(error)):
                self._fail(only.sequence, RunnerError, "the model failed on this request", error)
                return False
            self.stats.retries += 1
            logger.warning("the model failed on a step of %s: trying halves (%r)", _size(part), error)
        else:
            self._take(launched, tokens)
            return True
        return self._try_halves(part)

    def _try(self, part: list[Planned]) -> bool:
        part = [planned for planned in part if self._is_alive(planned.sequence)]  # a request may have several sequences
        return not part or self._settle(self._launch_part(part, again=True))

    def _try_halves(self, part: list[Planned]) -> bool:
        if len(part) > 1:
            size = (len(part) + 1) // 2
            through = [self._try(half) for half in (part[:size], part[size:])]
            if all(through):
                self._limits.lower(sequences=size)
            return all(through)
        sequence, count = part[0].sequence, len(part[0].feed.ids)
        if part[0].draft:
            self._try([Planned.of(sequence, 1)])
            return False
        size = (count + 1) // 2
        self._try([Planned.of(sequence, size)])
        if not self._is_alive(sequence):  # its request has failed
            return False
        self._limits.lower(prompt_tokens=size)
        self._try([Planned.of(sequence, count - size)])
        return False

    def _is_alive(self, sequence: Sequence) -> bool:
        """Whether the request is unfinished. It may end while its step is under way: by a stop string, by an abort."""
        return sequence.log in self._sequences

    def _take(self, launched: Launched, tokens: list[int | Exception]) -> None:
        """Give the sequences of a step that went through their tokens. Text that ends now makes room for the next step; the
        rest of the text waits until that is launched."""
        self.stats.steps += 1
        now = self.clock()
        at = 0
        for planned in launched.part:
            sequence, wanted = planned.sequence, planned.feed.wanted
            first, at = at, at + wanted
            if not self._is_alive(sequence):
                continue
            count, error = take_rows(planned, tokens[first:at], launched.found, first)
            self.scheduler.advance(planned, count)
            if not planned.at_end and error is None:  # nothing but a part of a prompt
                continue
            if planned.draft:
                self.stats.tokens_drafted += len(planned.draft)
                self.stats.drafts_taken += max(count - 1, 0)
            if error is None:
                self.scheduler.commit(sequence)
                if sequence.may_end():
                    self._put_out(sequence, now)
                else:
                    self._texts.append((sequence, now))
            else:
                if count:
                    self._put_out(sequence, now)
                if self._is_alive(sequence):
                    self._end_with(sequence, error)

    def _hand_out(self) -> None:
        """Make the text of the tokens taken so far, and deliver all outputs."""
        texts, self._texts = self._texts, []
        try:
            for sequence, now in texts:
                if self._is_alive(sequence):
                    self._put_out(sequence, now)
        finally:
            outputs, self._outputs = self._outputs, []
            deliver(outputs)

    def _put_out(self, sequence: Sequence, now: float) -> None:
        """Add the text of a sequence's new tokens, which came at `now`, to the outputs."""
        try:
            delta = sequence.put_out()
        except Exception as error:  # noqa: BLE001 - a tokenizer or a parameter that breaks fails its request alone
            self._end_with(sequence, error)
            return
        self.stats.tokens_decoded += len(delta.token_ids)
        if sequence.last_token_at is None:
            sequence.first_token_at = now
        else:
            self.stats.worst_token_gap = max(self.stats.worst_token_gap, now - sequence.last_token_at)
        sequence.last_token_at = now
        if delta.finish_reason is not None:
            self._finish(sequence, now)
        self._outputs.append((sequence.log, delta))

    def _end_with(self, sequence: Sequence, error: Exception) -> None:
        if isinstance(error, CaiError):
            self._end(sequence, error)
        else:
            self._fail(sequence, EngineError, "the engine failed on this request", error)

    def _finish(self, sequence: Sequence, now: float) -> None:
        """Free the seat and the pages of a finished sequence, and note its times."""
        self._forget(sequence)
        assert sequence.first_token_at is not None
        times, decoding = sequence.log.times, now - sequence.first_token_at
        times.first_token = sequence.first_token_at - sequence.submitted_at
        times.per_token = decoding / max(1, sequence.num_generated - 1)
        self.stats.finished += 1
        self.stats.queue_seconds += times.queue
        self.stats.first_token_seconds += times.first_token
        self.stats.decode_seconds += decoding

    def _add(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._sequences[sequence.log] = sequence
            self.scheduler.add(sequence)

    def abort(self, log: TokenLog) -> None:
        sequence = self._sequences.get(log)
        if sequence is not None:
            self._end(sequence, RequestAbortedError(f"{sequence.request.request_id} was aborted"))

    def _fail(self, sequence: Sequence, kind: type[EngineError], message: str, cause: Exception) -> None:
        error = kind(f"{message}: {cause!r}")
        error.__cause__ = cause
        self._end(sequence, error)

    def _end(self, sequence: Sequence, error: CaiError) -> None:
        """Free the seat and the pages of a failed sequence, then deliver the error."""
        self._forget(sequence)
        if isinstance(error, RequestAbortedError):
            self.stats.aborted += 1
        else:
            self.stats.failed += 1
        outputs, self._outputs = self._outputs, []  # what came before the error
        deliver([*outputs, (sequence.log, error)])

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.log]
        self.inbox.end_request()
        self.scheduler.remove(sequence)

    def _shut_down(self) -> None:
        self.inbox.close()
        with contextlib.suppress(Exception):
            self._hand_out()  # the last texts of requests that ended before a crash
        while not self.inbox.queue.empty():
            command = self.inbox.queue.get()
            if command is not None:
                command()
        for sequence in list(self._sequences.values()):
            with contextlib.suppress(Exception):  # a crash may have left the books in disorder; the caller must wake up
                self._forget(sequence)
            self.stats.failed += 1
            deliver([(sequence.log, self.inbox.closed_error())])
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


def _size(part: list[Planned]) -> str:
    return f"{len(part)} sequences and {sum(len(planned.feed.ids) for planned in part)} tokens"
