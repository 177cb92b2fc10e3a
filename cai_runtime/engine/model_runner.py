"""The runner for real models: a step becomes one flattened forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from cai_runtime.engine.cache_groups import positions_held
from cai_runtime.engine.cache_layouts import PageCopy
from cai_runtime.engine.cuda_graphs import DecodeGraphs, Forward
from cai_runtime.engine.runner import Pass, PendingSampled
from cai_runtime.engine.runner_thread import SMALL, CallThread, Done
from cai_runtime.engine.seats import Seats
from cai_runtime.engine.segments import GIVEN
from cai_runtime.engine.step import NEXT, Feed, ScheduledSequence, Step, seated
from cai_runtime.errors import KernelError
from cai_runtime.kernels.batch import GivenEmbeddings
from cai_runtime.kernels.cache_groups import CacheGroup, pools
from cai_runtime.kernels.sampling import Sampled, SamplingBatch, sample_cpu

if TYPE_CHECKING:
    from cai_runtime.engine.cache import EncoderPass
    from cai_runtime.kernels.batch import AttentionBatch
    from cai_runtime.kernels.triton.sampling import TritonSampler
    from cai_runtime.models.registry import CausalLM, EncoderDecoderLM

# Rows of logits computed at a time, so that a large batch at a large vocabulary needs no gigabytes at once.
LOGIT_ROWS = 256


class ModelRunner:
    """Implements `Runner` over a model and the caches that it has the model allocate.

    groups: what `model.cache_groups` gave; a window may be declared as keeping all positions. counts: pages of each, one
    number for groups of one pool.
    cuda_graphs: record decode steps of up to `max_batch` sequences as CUDA graphs and replay them; on a GPU, with kernels
    that can be recorded (triton, cuda). `record_graphs` records every size; one that it did not is recorded when needed. The
    caches then have one page more than `counts`, for padding.
    capture: how a step is made repeatable, for tests; see `cuda_graphs.DecodeGraphs`.

    Attributes: `page_size`, of all groups but an encoder's; `num_pages`, from 0 on, may be named by sequences that have no
    seat. `able`: what it takes and gives besides tokens and logits, see `Runner`.
    """

    def __init__(
        self,
        model: CausalLM,
        groups: Sequence[CacheGroup],
        counts: Mapping[str, int],
        *,
        cache_dtype: torch.dtype,
        max_context: int | None = None,
        cuda_graphs: bool = False,
        max_batch: int = 64,
        capture: Callable[[Forward], Forward] | None = None,
    ):
        self.has_head = getattr(model, "has_head", True)
        self.activations = ""  # see EngineStats
        if cuda_graphs and not self.has_head:
            raise KernelError(
                "CUDA graphs are of decode steps, which a model without a head has not: cuda_graphs=False"
            )
        if cuda_graphs and capture is None and model.device.type != "cuda":
            raise KernelError(f"CUDA graphs need a model on a GPU, this one is on {model.device}: cuda_graphs=False")
        self.able: frozenset[str] = getattr(model, "able", frozenset({"given_rows", "hidden_states"}))
        if cuda_graphs and "encoder" in self.able:
            raise KernelError("CUDA graphs are not recorded of a decoder with an encoder: cuda_graphs=False")
        self.groups, self.counts = tuple(groups), dict(counts)
        self.page_size = page_size = groups[0].page_size
        self._encoders = [group.name for group in groups if group.kind == "encoder"]
        paged = [group for group in groups if group.kind != "encoder"]
        self._shares = {g.name: (len(pool), i) for pool in pools(paged) for i, g in enumerate(pool)}
        self.num_pages = min(counts[name] // n for name, (n, _) in self._shares.items())
        self.vocab_size = model.vocab_size
        self.model_context = model.max_context
        self.max_context = min(max_context or model.max_context, model.max_context)
        context = min(self.max_context, positions_held(groups, counts)[0])
        model.allocate({n: count + cuda_graphs for n, count in counts.items()}, page_size, cache_dtype, context)
        self._model: CausalLM | None = model
        self._device = model.device
        self._threaded = model.device.type == "cpu" and not cuda_graphs
        self._thread = CallThread(f"cai-runner-{id(self):x}")
        names = [group.name for group in groups]
        self._seats, self._unseated = (Seats(page_size, names, self._encoders) for _ in range(2))
        self.ahead = not self._threaded
        self._last = torch.zeros(max_batch, dtype=torch.int32, device=model.device)  # by seat, the token sampled last
        self._sampler: TritonSampler | None = None
        self._graphs: DecodeGraphs | None = None
        if cuda_graphs:
            self._graphs = DecodeGraphs(
                model,
                max_batch=max_batch,
                page_size=page_size,
                pages=-(-context // page_size),
                scratch_pages=self.counts,
                capture=capture,
            )

    def record_graphs(self, progress: bool | None = None) -> None:
        """Record every decode graph now, rather than when it is first needed, with a progress bar (None: on a terminal).

        Call before the engine's thread runs steps. Without CUDA graphs it does nothing. Raises KernelError when a step
        can't be recorded."""
        if self._graphs is not None:
            self._graphs.record_all(progress)

    def recorded(self, step: Sequence[ScheduledSequence]) -> Forward:
        """The CUDA graph of a decode step of sequences that have no seat, its inputs written, for benchmarks."""
        placed = seated(step, self._shares)
        self._unseated.write(placed.pages)
        numbers = self._unseated.numbers(placed.feeds)
        if self._graphs is None or not self._graphs.takes(numbers):
            raise KernelError("no CUDA graph is recorded for such a step")
        return self._graphs.prepare(numbers)

    def launch(self, step: Step) -> Pass:
        """On the CPU in the runner's thread. On a GPU here, without waiting for it."""
        if self._threaded:
            return self._thread.submit(partial(self._logits, self._seats, step), small=len(step.feeds) <= SMALL)
        made = Done(self._logits(self._seats, step))
        made.seats = [feed.seat for feed in step.feeds for _ in range(feed.wanted)]
        return made

    def run(self, step: Sequence[ScheduledSequence]) -> torch.Tensor:
        """The logits of a step of sequences that have no seat, on the model's device; of a CUDA graph they are good until
        the next call. Runs in this thread: use it while no engine does."""
        return self._logits(self._unseated, seated(step, self._shares))

    @torch.inference_mode()
    def _logits(self, seats: Seats, step: Step) -> torch.Tensor:
        """fp32 [rows wanted, vocabulary] on the model's device."""
        seats.write(step.pages)
        if step.copies:
            self._copy_pages(step.copies)
        if step.encode:
            self._encode(seats, step.encode)
        model, numbers = self._opened, seats.numbers(step.feeds)
        known = self._with_sampled(step, numbers.ids) if (numbers.ids == NEXT).any() else None
        given = None
        if any(feed.inputs for feed in step.feeds):
            given = self._given(step.feeds)
            numbers.ids[numbers.ids == GIVEN] = 0  # any token's: the rows take its place
        if self._graphs is not None and given is None and self._graphs.takes(numbers):
            return self._graphs.prepare(numbers, known)()[: len(step.feeds)]
        ids, wanted, batch = numbers.on(self._device)
        ids = ids if known is None else known
        keeps_hidden = any(feed.hidden is not None for feed in step.feeds)
        attends = any(feed.attention is not None for feed in step.feeds)
        if len(wanted) <= LOGIT_ROWS and not keeps_hidden and not attends and self.has_head:
            return model.step(ids, wanted, batch, given)
        states = self._attend(seats, step.feeds, ids, batch) if attends else model.forward(ids, batch, given)
        if keeps_hidden:
            _give_hidden(step.feeds, states)
        hidden = states.index_select(0, wanted)
        logits = torch.empty(len(wanted), self.vocab_size, dtype=torch.float32, device=self._device)
        if not len(wanted):
            return logits
        for part, place in zip(hidden.split(LOGIT_ROWS), logits.split(LOGIT_ROWS), strict=True):
            place.copy_(self.logits(part))
        return logits

    def _encode(self, seats: Seats, passes: Sequence[EncoderPass]) -> None:
        """Run the encoder over the inputs of a step, all at once."""
        if not self._encoders:
            raise KernelError("this model has no encoder")
        pages = seats.pages(self._encoders[0], [p.seat for p in passes])
        self._encoder_decoder.encode([p.input.features for p in passes], pages)

    def _attend(self, seats: Seats, feeds: Sequence[Feed], ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """The hidden states of a step [tokens, hidden]. Feeds that want cross-attention weights get them."""
        model = self._encoder_decoder
        layers = frozenset(layer for feed in feeds if feed.attention for layer, _ in feed.attention.heads)
        states, queries = model.forward_attending(ids, batch, layers)
        end = 0
        for feed in feeds:
            end += len(feed.ids)
            if feed.attention is None:
                continue
            rows, pages = slice(end - feed.attention.count, end), seats.pages(self._encoders[0], [feed.seat])[0]
            table = torch.from_numpy(pages).to(self._device)
            found = [
                model.attention_weights(layer, [head for _, head in heads], queries[layer][rows], table)
                for layer, heads in groupby(feed.attention.heads, key=itemgetter(0))
            ]
            feed.attention.weights = np.concatenate(found)
        return states

    def _copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Carry out page copies in order: several of a group at once, unless one reads what another writes."""
        pending: dict[str, dict[int, int]] = {}  # by group, source by target
        for copy in copies:
            targets = pending.setdefault(copy.group, {})
            if copy.source in targets or copy.target in targets or copy.target in targets.values():
                self._opened.copy_pages(copy.group, list(targets.values()), list(targets))
                targets.clear()
            targets[copy.target] = copy.source
        for group, targets in pending.items():
            self._opened.copy_pages(group, list(targets.values()), list(targets))

    def _given(self, feeds: Sequence[Feed]) -> GivenEmbeddings:
        """The rows that feeds bring in place of embeddings: tensors or arrays [n, hidden]."""
        index, rows, at = [], [], 0
        for feed in feeds:
            for placed in feed.inputs:
                index.append(torch.arange(at + placed.start, at + placed.end, dtype=torch.int64, device=self._device))
                rows.append(torch.as_tensor(placed.rows, device=self._device))
            at += len(feed.ids)
        return GivenEmbeddings(torch.cat(index), torch.cat(rows))

    def sample(self, made: Any, batch: SamplingBatch) -> PendingSampled:
        """On a GPU by Triton, without waiting; on the CPU, and where the kernels' backend has no Triton, by the CPU."""
        if self._threaded:
            small = len(batch) <= SMALL
            return self._thread.submit(lambda: self.sample_logits(made.wait(), batch).wait(), small=small)
        sampled: Any = self.sample_logits(made.wait(), batch)
        self._keep_sampled(made.seats, sampled.ids)
        return _on_its_way(sampled, self._device)

    @torch.inference_mode()
    def _keep_sampled(self, seats: list[int], ids: torch.Tensor | np.ndarray) -> None:
        """Note on the device which token each seat sampled last."""
        if max(seats, default=0) >= len(self._last):
            grown = torch.zeros(2 * max(seats) + 1, dtype=torch.int32, device=self._device)
            grown[: len(self._last)] = self._last
            self._last = grown
        tokens = ids if isinstance(ids, torch.Tensor) else torch.from_numpy(ids)
        self._last.index_copy_(0, self._upload(np.array(seats, np.int64)), tokens.to(self._device, non_blocking=True))

    def _with_sampled(self, step: Step, ids: np.ndarray) -> torch.Tensor:
        """The ids of a step on the device, int32 [T], `NEXT` replaced by what the seat sampled last. Where that failed it is
        -1: any token does, as its sequence has failed."""
        seats = self._upload(np.repeat([feed.seat for feed in step.feeds], [len(feed.ids) for feed in step.feeds]))
        given = self._upload(ids)
        return torch.where(given == NEXT, self._last.index_select(0, seats).clamp_min(0), given)

    def _upload(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self._device, non_blocking=True)

    @torch.inference_mode()
    def sample_logits(self, logits: torch.Tensor, batch: SamplingBatch) -> PendingSampled:
        """Choose a token from each row of what `run` returned, which is overwritten."""
        if logits.device.type == "cpu":
            return sample_cpu(logits, batch)
        if self._sampler is None:
            from cai_runtime.kernels import triton

            if not triton.available():
                return sample_cpu(logits.cpu(), batch)
            from cai_runtime.kernels.triton.sampling import TritonSampler

            self._sampler = TritonSampler(self._device)
        return self._sampler(logits, batch)

    @torch.inference_mode()
    def hidden_states(self, step: Sequence[ScheduledSequence]) -> torch.Tensor:
        """Of every token of a step, [tokens, hidden], on the device; keys and values go into the cache as in `run`."""
        placed = seated(step, self._shares)
        self._unseated.write(placed.pages)
        ids, _, batch = self._unseated.numbers(placed.feeds).on(self._device)
        return self._opened.forward(ids, batch)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of rows of hidden states, [rows, hidden], fp32 [rows, vocabulary] on the device."""
        return self._opened.logits(hidden)

    @property
    def _encoder_decoder(self) -> EncoderDecoderLM:
        return cast("EncoderDecoderLM", self._opened)

    @property
    def _opened(self) -> CausalLM:
        if self._model is None:
            raise RuntimeError("the runner is closed")
        return self._model

    def close(self) -> None:
        self._thread.close()
        if self._graphs is not None:
            self._graphs.close()
            self._graphs = None
        self._model = self._sampler = None


def _give_hidden(feeds: Sequence[Feed], states: torch.Tensor) -> None:
    """Copy to the feeds the hidden states that they want. states: [tokens, hidden] of the step."""
    end = 0
    for feed in feeds:
        end += len(feed.ids)
        if feed.hidden is not None:
            feed.hidden.rows = states[end - feed.hidden.count : end].to(torch.float32, copy=True)


def _on_its_way(sampled: PendingSampled, device: torch.device) -> PendingSampled:
    """The same, its tokens on the way to the host: reading them does not wait for the step that is launched next."""
    if device.type != "cuda" or not hasattr(sampled, "tensors"):
        return sampled
    with torch.cuda.device(device):
        return _Copied(sampled)


class _Copied:
    def __init__(self, sampled: Any):
        copies = {}
        for name, source in sampled.tensors.items():
            copies[name] = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
            copies[name].copy_(source, non_blocking=True)
        self._sampled = replace(sampled, tensors=copies)
        self._there = torch.cuda.Event()
        self._there.record()

    def wait(self) -> Sampled:
        self._there.synchronize()
        return self._sampled.wait()
