"""The runner for real models: a step of scheduled sequences becomes one flattened forward pass."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from cai_runtime.engine.cuda_graphs import DecodeGraphs, Forward
from cai_runtime.engine.runner import PendingSampled, ScheduledSequence
from cai_runtime.errors import KernelError
from cai_runtime.kernels.batch import AttentionBatch
from cai_runtime.kernels.sampling import SamplingBatch, sample_cpu

if TYPE_CHECKING:
    from cai_runtime.kernels.triton.sampling import TritonSampler
    from cai_runtime.models.registry import CausalLM

# Rows of logits computed at a time, so that a large batch at a large vocabulary needs no gigabytes at once.
LOGIT_ROWS = 256


class ModelRunner:
    """Implements `Runner` over a model and the cache that the model allocated.

    cuda_graphs: record decode steps of up to `max_batch` sequences as CUDA graphs and replay them; on a GPU, with kernels
    that can be recorded (triton, cuda). `record_graphs` records every size; one that it did not is recorded when needed. The
    cache then has one page more than `num_pages`, for padding.
    capture: how a step is made repeatable, for tests; see `cuda_graphs.DecodeGraphs`.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        num_pages: int,
        page_size: int,
        cache_dtype: torch.dtype,
        max_context: int | None = None,
        cuda_graphs: bool = False,
        max_batch: int = 64,
        capture: Callable[[Forward], Forward] | None = None,
    ):
        if cuda_graphs and capture is None and model.device.type != "cuda":
            raise KernelError(f"CUDA graphs need a model on a GPU, this one is on {model.device}: cuda_graphs=False")
        self.page_size, self.num_pages = page_size, num_pages
        self.vocab_size = model.vocab_size
        self.model_context = model.max_context
        self.max_context = min(max_context or model.max_context, model.max_context)
        self.page_bytes = model.page_bytes(page_size, cache_dtype)
        model.allocate_cache(num_pages + (1 if cuda_graphs else 0), page_size, cache_dtype, self.max_context)
        self._model: CausalLM | None = model
        self._device = model.device
        self._sampler: TritonSampler | None = None
        self._graphs: DecodeGraphs | None = None
        if cuda_graphs:
            pages = min(-(-self.max_context // page_size), num_pages)
            self._graphs = DecodeGraphs(
                model, max_batch=max_batch, page_size=page_size, pages=pages, scratch_page=num_pages, capture=capture
            )

    def record_graphs(self, progress: bool | None = None) -> None:
        """Record every decode graph now, rather than when it is first needed, with a progress bar (None: on a terminal).

        Call before the engine's thread runs steps. Without CUDA graphs it does nothing. Raises KernelError when a step
        can't be recorded."""
        if self._graphs is not None:
            self._graphs.record_all(progress)

    @torch.inference_mode()
    def run(self, step: list[ScheduledSequence]) -> torch.Tensor:
        """The logits on the model's device; of a CUDA graph they are good until the next call."""
        if self._graphs is not None and self._graphs.takes(step):
            return self._graphs.prepare(step)()[: len(step)]
        model = self._opened
        ids, batch = self._flatten(step)
        ends = accumulate(len(s.token_ids) for s in step)
        rows = [end - 1 for s, end in zip(step, ends, strict=True) if s.sample]
        wanted = torch.tensor(rows, dtype=torch.int32, device=self._device)
        if len(rows) <= LOGIT_ROWS:
            return model.step(ids, wanted, batch)
        hidden = model.forward(ids, batch).index_select(0, wanted)
        logits = torch.empty(len(rows), self.vocab_size, dtype=torch.float32, device=self._device)
        for part, place in zip(hidden.split(LOGIT_ROWS), logits.split(LOGIT_ROWS), strict=True):
            place.copy_(self.logits(part))
        return logits

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> PendingSampled:
        """On a GPU by Triton, without waiting; on the CPU, and where the kernels' backend has no Triton, by the CPU."""
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
    def hidden_states(self, step: list[ScheduledSequence]) -> torch.Tensor:
        """Of every token of a step, [tokens, hidden], on the device; keys and values go into the cache as in `run`."""
        return self._opened.forward(*self._flatten(step))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of rows of hidden states, [rows, hidden], fp32 [rows, vocabulary] on the device."""
        return self._opened.logits(hidden)

    @property
    def _opened(self) -> CausalLM:
        if self._model is None:
            raise RuntimeError("the runner is closed")
        return self._model

    def close(self) -> None:
        if self._graphs is not None:
            self._graphs.close()
            self._graphs = None
        self._model = self._sampler = None

    def _flatten(self, step: list[ScheduledSequence]) -> tuple[torch.Tensor, AttentionBatch]:
        size = self.page_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, lengths = [0], []
        for s in step:
            count = len(s.token_ids)
            ids += s.token_ids
            span = range(s.start, s.start + count)
            positions += span
            slots += [s.pages[p // size] * size + p % size for p in span]
            starts.append(starts[-1] + count)
            lengths.append(s.start + count)
        used = [-(-n // size) for n in lengths]
        width = max(used)
        table = [[*s.pages[:n], *([0] * (width - n))] for s, n in zip(step, used, strict=True)]
        parts = (ids, positions, slots, starts, lengths, table)
        on_device = [torch.tensor(p, dtype=torch.int32, device="cpu").to(self._device) for p in parts]
        tokens, placed, own_slots, query_start, context_len, page_table = on_device
        return tokens, AttentionBatch.of(placed, own_slots, query_start, context_len, page_table)
